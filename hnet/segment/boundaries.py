"""Where a model begins its chunks, how surely, and how well it predicted every byte."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from hnet.config import BOS
from hnet.errors import UserError, user_path
from hnet.model.causal_lm import HNetForCausalLM
from hnet_kernels import Routing


class Stage(NamedTuple):
    """One stage with routing. All offsets are bytes from the beginning of `Segmentation.text`.

    The positions of the outermost stage are the bytes; those of every other stage are the chunks of the one outside it,
    at the offset where each begins. BOS stands at no byte: what it begins, it begins at byte 0. So without context
    `starts[0] == 0` always, whether or not the model began a chunk at the first byte itself.
    """

    offsets: np.ndarray  # (positions,) int64, rising
    probability: np.ndarray  # (positions,) float32 in [0, 1], of a boundary there
    starts: np.ndarray  # (chunks,) int64, rising: those of `offsets` where chunks begin


@dataclass(frozen=True)
class Segmentation:
    text: bytes
    loss: np.ndarray  # (bytes,) float32, nats of every byte, given those before it
    stages: tuple[Stage, ...]  # outermost first
    offset: int = 0  # of `text` in the file it is a piece of, bytes

    @property
    def depth(self) -> np.ndarray:
        """(bytes,) uint8: of how many stages a chunk begins at each byte. Every chunk is made of whole chunks of the
        stage outside it, so a stage begins one wherever the depth is above its number."""
        depth = np.zeros(len(self.text), dtype=np.uint8)
        for stage in self.stages:
            depth[stage.starts] += 1
        return depth


@torch.no_grad()
def segment(model: HNetForCausalLM, text: bytes, *, context: bytes = b"", offset: int = 0) -> Segmentation:
    """The chunks `model` makes of `text`, all of it in one pass after BOS.

    Args:
        model: on any device; it is put into evaluation mode for the call.
        text: any bytes, valid UTF-8 or not. Memory grows with its length: `segment_file` takes any.
        context: what stands before it. The model sees it, but nothing of it is in the answer; a chunk that begins in it
            and goes on in the text has no start there.
        offset: only noted down.
    """
    ids = torch.tensor([BOS, *context, *text], device=model.embeddings.weight.device)
    before = model.training
    model.eval()
    out = model(ids, cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device))
    model.train(before)
    first = len(context)
    logits, targets = out.logits[first : len(ids) - 1].float(), ids[first + 1 :]
    loss = F.cross_entropy(logits, targets, reduction="none").cpu().numpy()
    return Segmentation(text, loss, tuple(_stages(out.routing, len(text), first)), offset)


def _stages(routing: list[Routing], size: int, context: int) -> Iterator[Stage]:
    positions = np.arange(-1 - context, size)  # of BOS and every byte, from the beginning of the text
    if not context and size:
        positions[0] = 0
    for r in routing:
        probability, mask = r.boundary_prob.float().cpu().numpy(), r.boundary_mask.cpu().numpy()
        last = np.append(positions[1:] != positions[:-1], True)  # at byte 0 there may be BOS's position and its own
        here = last & (positions >= 0)
        starts = np.unique(positions[mask])
        yield Stage(positions[here], probability[here], starts[starts >= 0])
        positions = positions[mask]


def segment_file(
    model: HNetForCausalLM,
    file: str | Path | BinaryIO,
    *,
    seq_len: int = 8192,
    context: int | None = None,
    max_bytes: int | None = None,
) -> Iterator[Segmentation]:
    """The chunks of a file of any size, piece by piece, in memory for one piece.

    The pieces lie end to end and are the whole file. They end at the last line end in the second half of what the model
    sees at once, else between two characters. Every piece is seen after BOS and up to `context` bytes of the text
    before it; so boundaries are those of `segment` with that context, not those of the whole file in one pass.

    Args:
        file: a path, or a file open for reading bytes.
        seq_len: positions the model sees at once: BOS, context and piece. Best what it was trained with.
        context: bytes; default: a quarter of seq_len.
        max_bytes: stop after so many; default: all.

    Raises:
        UserError: seq_len under 2, context not in [0, seq_len - 2], a file that cannot be read.
    """
    context = seq_len // 4 if context is None else context
    if seq_len < 2 or not 0 <= context <= seq_len - 2:
        raise UserError(
            f"seq_len must be at least 2 and context 0 to seq_len - 2, got seq_len {seq_len} and context {context}"
        )
    with ExitStack() as stack:
        with user_path(str(file)):
            stream = stack.enter_context(open(file, "rb")) if isinstance(file, str | Path) else file
        for offset, before, piece in _pieces(stream, seq_len, context, max_bytes):
            yield segment(model, piece, context=before, offset=offset)


def _pieces(stream: BinaryIO, seq_len: int, context: int, max_bytes: int | None) -> Iterator[tuple[int, bytes, bytes]]:
    """(offset, context, piece)"""
    before, rest, offset = b"", b"", 0
    left = float("inf") if max_bytes is None else max_bytes
    while True:
        room = seq_len - 1 - len(before)
        while len(rest) <= room and left and (more := stream.read(int(min(room + 1 - len(rest), left)))):
            rest += more
            left -= len(more)
        if not rest:
            return
        piece = rest[: _cut(rest, room)]
        yield offset, before, piece
        rest, offset = rest[len(piece) :], offset + len(piece)
        before = (before + piece)[-context:] if context else b""
        before = before[_to_character(before) :]


def _cut(text: bytes, room: int) -> int:
    """How much of `text` makes the next piece of at most `room` bytes."""
    if len(text) <= room:
        return len(text)
    line = text.rfind(b"\n", room // 2, room) + 1
    if line:
        return line
    back = next((n for n in range(min(4, room)) if not _inside(text[room - n])), 0)
    return room - back


def _to_character(text: bytes) -> int:
    """Bytes at the beginning that go on with a character begun before; 0 where there is none in four bytes."""
    return next((n for n, byte in enumerate(text[:4]) if not _inside(byte)), 0)


def _inside(byte: int) -> bool:
    """A byte that is not the first of a UTF-8 character."""
    return byte & 0xC0 == 0x80
