"""Chunks as lines of text: bars, or colours of a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.text import Text

from .boundaries import Segmentation

BARS = "|‖⦀"  # where chunks begin of the first stage shown; of the second too; of more
# Two take turns with every chunk, pairs of them with every chunk of the next stage shown. They stay four colours on
# terminals that have 16.
COLOURS = (("white on #1f4d78", "white on #8a5a00"), ("white on #007a7a", "white on #7c2d8c"))
# What would steer a terminal or turn its text around, and line ends and tabs, as signs.
SIGNS = {c: chr(0x2400 + c) for c in range(32)} | {9: "⇥", 10: "⏎\n", 0x7F: "␡"}
SIGNS |= {c: f"\\u{c:04x}" for c in (*range(0x80, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F))}
SIGNS |= {c: f"\\u{c:04x}" for c in range(0x2066, 0x206A)}


def show(chunk: bytes) -> str:
    """Readable: control characters as signs, bytes that are no whole character as \\xNN."""
    return chunk.decode("utf-8", errors="backslashreplace").translate(SIGNS)


def levels(s: Segmentation, stage: int | None = None) -> np.ndarray:
    """(bytes,) uint8: of how many of the stages shown a chunk begins at each byte. All stages, or one."""
    return s.depth if stage is None else (s.depth > stage).astype(np.uint8)


def _parts(s: Segmentation, stage: int | None) -> Iterator[tuple[int, str]]:
    """(level, text) of every chunk of the first stage shown; level 0 for what goes on with the chunk before."""
    level = levels(s, stage)
    edges = sorted({0, *np.flatnonzero(level).tolist(), len(s.text)})
    for a, b in zip(edges, edges[1:], strict=False):
        yield int(level[a]), show(s.text[a:b])


def render_plain(s: Segmentation, stage: int | None = None) -> str:
    """A bar before every chunk but the first of the file. Pieces of a file: one after the other."""
    out: list[str] = []
    for level, text in _parts(s, stage):
        out += [BARS[min(level, len(BARS)) - 1] if level and (out or s.offset) else "", text]
    return "".join(out)


def render_rich(s: Segmentation, stage: int | None = None, turns: list[int] | None = None) -> Text:
    """Chunks in alternating colours, on alternating hues for those of the next stage, underlined for one further.

    turns: 3 counts of chunks so far, which the call moves on: give every piece of a file the same list.
    """
    turns = [0, 0, 0] if turns is None else turns
    out = Text()
    for level, text in _parts(s, stage):
        for i in range(min(level, len(turns))):
            turns[i] += 1
        style = COLOURS[turns[1] % 2][turns[0] % 2]
        out.append(text, style=f"underline {style}" if turns[2] % 2 else style)
    return out
