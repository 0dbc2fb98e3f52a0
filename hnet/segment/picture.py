"""Chunks as a PNG file."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from hnet.errors import UserError

from .boundaries import Segmentation, Stage

COLUMNS = 96
MOST_ROWS = 400
TINTS = ("#c3dcf5", "#fbdcae")  # chunks of the first stage shown take turns
LINES = ("#7b3fa0", "#1b7f4b")  # and those of the stages inside it, as lines below
Cell = tuple[int, int, int, int, str]  # row, column, width, byte, what is drawn


def draw(s: Segmentation, out: BinaryIO, *, stages: Sequence[int], title: str) -> None:
    """A row for each line of text, COLUMNS wide, in fonts that matplotlib finds: it draws no ligatures and nothing from
    right to left. Bytes that are no whole character within a chunk are drawn as hex.

    Raises:
        UserError: over MOST_ROWS rows.
    """
    import matplotlib.pyplot as plt
    from matplotlib import font_manager
    from matplotlib.patches import Rectangle

    level = np.zeros(len(s.text) + 1, dtype=np.int64)
    for stage in stages:
        level[s.stages[stage].starts] += 1
    cells = list(_cells(s.text, level))
    rows = max((row for row, *_ in cells), default=0) + 1
    if rows > MOST_ROWS:
        raise UserError(f"the picture would have {rows} rows, at most {MOST_ROWS}: lower --bytes, or write html")
    turns = np.cumsum(level[:-1, None] > np.arange(len(stages)), axis=0) % 2  # (bytes, stages)
    noto = sorted({f.name for f in font_manager.fontManager.ttflist if f.name.startswith(("Noto Sans", "Lohit"))})
    height = 1.6 + 0.25 * (len(stages) - 1)  # of a row; a column is 1 wide, a character 2 high
    with plt.rc_context({"font.family": ["DejaVu Sans Mono", "DejaVu Sans", *noto]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        fig = plt.figure(figsize=(COLUMNS * 0.083 + 0.3, (rows * height + 2.6) * 0.135), dpi=110)
        ax = fig.add_axes((0.15 / fig.get_figwidth(), 0, 1 - 0.3 / fig.get_figwidth(), 1))
        ax.set(xlim=(0, COLUMNS), ylim=(rows * height + 0.3, -2.3))
        ax.axis("off")
        ax.text(0, -1.2, title, fontsize=9, va="center", family="sans-serif")
        for row, column, width, byte, text in cells:
            y = row * height
            ax.add_patch(Rectangle((column, y), width, 1.3, color=TINTS[turns[byte, 0]], lw=0))
            for k in range(1, len(stages)):
                y_line = y + 1.1 + 0.25 * k
                ax.add_patch(Rectangle((column, y_line), width, 0.14, color=LINES[turns[byte, k]], lw=0))
            hexed = len(text) > 1 and text.isascii()
            color, size = ("#c2185b", 5) if hexed else ("#8a8d91" if text == "⏎" else "#1c1d1f", 8.5)
            ax.text(column + width / 2, y + 0.68, text, fontsize=size, ha="center", va="center_baseline",
                    color=color, parse_math=False)  # fmt: skip
        fig.savefig(out, format="png", facecolor="white")
        plt.close(fig)


def joined(pieces: Sequence[Segmentation]) -> Segmentation:
    """Pieces of a file as one."""
    stages = []
    for parts in zip(*(p.stages for p in pieces), strict=True):
        shifted = [
            (s.offsets + p.offset, s.probability, s.starts + p.offset) for s, p in zip(parts, pieces, strict=True)
        ]
        stages.append(Stage(*(np.concatenate(x) for x in zip(*shifted, strict=True))))
    loss = np.concatenate([np.zeros(0, np.float32), *(p.loss for p in pieces)])
    return Segmentation(b"".join(p.text for p in pieces), loss, tuple(stages))


def _cells(text: bytes, level: np.ndarray) -> Iterator[Cell]:
    """Cells of all characters in order; what does not fit goes on in the next row."""
    row = column = at = 0
    while at < len(text):
        size = _whole(text, at)
        if size and not level[at + 1 : at + size].any():
            shown = text[at : at + size].decode()
            while (n := _whole(text, at + size)) and not level[at + size : at + size + n].any():
                if not unicodedata.category(text[at + size : at + size + n].decode()).startswith("M"):
                    break
                shown += text[at + size : at + size + n].decode()  # marks stand on their letter
                size += n
        else:
            size, shown = 1, f"{text[at]:02X}"
        first = shown[0]
        if first == "\n":
            yield row, column, 1, at, "⏎"
            row, column, at = row + 1, 0, at + 1
            continue
        if first == "\t":
            width, shown = 4 - column % 4, ""
        elif unicodedata.category(first).startswith("C") and len(shown) == 1:
            width, shown = 2, f"{ord(first):02X}"
        else:
            wide = len(shown) > 1 and shown.isascii()
            width = 2 if wide or unicodedata.east_asian_width(first) in "WF" else 1
        if column + width > COLUMNS:
            row, column = row + 1, 0
        yield row, column, width, at, shown
        column, at = column + width, at + size


def _whole(text: bytes, at: int) -> int:
    """Bytes of the UTF-8 character that begins there; 0 where none does."""
    for n in range(1, 5):
        try:
            return n if at + n <= len(text) and text[at : at + n].decode() else 0
        except UnicodeDecodeError:
            continue
    return 0
