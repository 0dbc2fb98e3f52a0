"""Text with its chunk boundaries made visible."""

from __future__ import annotations

import torch
from rich.text import Text

from hnet.config import BOS
from hnet.model.causal_lm import HNetForCausalLM

COLOURS = ("on grey30", "on dark_green")


@torch.no_grad()
def boundaries(model: HNetForCausalLM, text: bytes) -> list[list[int]]:
    """For each stage with routing, the byte offsets in `text` where its chunks begin, outermost first.

    BOS is fed before the text; a chunk that begins at BOS counts as beginning at offset 0.
    """
    ids = torch.tensor([BOS, *text], device=model.embeddings.weight.device)
    out = model(ids, cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device))
    positions = torch.arange(len(ids), device=ids.device)
    stages = []
    for r in out.routing:
        positions = positions[r.boundary_mask]
        stages.append(sorted({max(p - 1, 0) for p in positions.tolist()}))
    return stages


def chunks(text: bytes, starts: list[int]) -> list[bytes]:
    edges = [*starts, len(text)]
    return [text[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True) if a < b]


def show(chunk: bytes) -> str:
    """Readable on one line: line ends as ⏎, bytes that are no whole character as \\xNN."""
    return chunk.decode("utf-8", errors="backslashreplace").replace("\n", "⏎\n").replace("\t", "⇥")


def render_plain(text: bytes, starts: list[int]) -> str:
    """Chunks separated by a middle dot bar."""
    return "|".join(show(c) for c in chunks(text, starts))


def render_rich(text: bytes, starts: list[int]) -> Text:
    """Chunks in alternating colours."""
    out = Text()
    for i, c in enumerate(chunks(text, starts)):
        out.append(show(c), style=COLOURS[i % len(COLOURS)])
    return out
