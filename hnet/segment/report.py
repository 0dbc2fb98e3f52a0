"""Scores of a segmentation beside those of baselines: rows of numbers, and tables of them for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .baselines import baselines
from .characters import Characters
from .morphemes import Morphemes
from .scores import ahead, score

BARS = " ▁▂▃▄▅▆▇█"
AHEAD = ", predicted"  # rows of `ahead`
LONGEST_BAR = 32  # bytes; longer chunks share the last bar
PLACES = {
    "char_start_share": "character\nstarts", "char_end_share": "character\nends", "grapheme_start_share": "graphemes",
    "space_share": "white\nspace", "word_start_share": "word\nstarts", "word_end_share": "word\nends",
}  # fmt: skip
EDGES = {
    "words": "starts of words",
    "morphemes": "starts of morphemes",
    "morphemes_inside": "starts of morphemes inside words",
}


def score_rows(
    text: bytes, segmentations: Mapping[str, np.ndarray], morphemes: Morphemes | None = None, seed: int = 0
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row of `score` for each of `segmentations` (bytes where chunks begin), one of what its chunks predict
    (`ahead`), then of each baseline, at the rate of the first of them; and what was left out for want of a package. A
    row's `name` says whose it is."""
    chars, notes = Characters(text), []
    try:
        graphemes = chars.grapheme_start is not None
    except ValueError as e:
        graphemes, notes = False, [f"graphemes are left out: {e}"]
    rows = []
    for name, starts in segmentations.items():
        for label, where in ((name, starts), (name + AHEAD, ahead(starts, len(text)))):
            rows.append({"name": label} | score(chars, where, morphemes=morphemes, graphemes=graphemes))
    rate = rows[0]["bytes_per_chunk"]
    if not math.isfinite(rate):
        return rows, notes
    others, left_out = baselines(chars, rate, seed)
    for name, starts in others.items():
        rows.append({"name": name} | score(chars, starts, morphemes=morphemes, graphemes=graphemes))
    return rows, notes + [f"{name} is left out: {why}" for name, why in left_out.items() if name != "every grapheme"]


def plain(x: Any) -> Any:
    """For JSON: null in place of numbers that mean nothing"""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


def tables(rows: list[dict[str, Any]], notes: list[str]) -> Group:
    """Sizes and places of all rows; agreement with words and morphemes; the sizes of the first row's chunks as bars."""
    parts: list[Any] = [place_table(rows)]
    parts += [edge_table(rows, key, title) for key, title in EDGES.items() if key in rows[0]]
    if "morpheme_coverage" in rows[0]:
        parts.append(f"{percent(rows[0]['morpheme_coverage'])} of the words are among those with known morphemes")
    parts += [size_bars(rows[0]), *notes]
    return Group(*(Text(p) if isinstance(p, str) else p for p in parts))


def place_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="chunks, and what they begin at, by character")
    names = {k: title for k, title in PLACES.items() if k in rows[0]}
    for title in ("", "chunks", "bytes\na chunk", "median", "CV", *names.values(), "words\nfound"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for r in rows:
        cells = [f"{r['chunks']:,}", number(r["bytes_per_chunk"]), number(r["bytes_per_chunk_median"], 0)]
        cells += [number(r["bytes_per_chunk_cv"]), *(percent(r[k]) for k in names), percent(r["word_starts_found"])]
        table.add_row(r["name"], *cells)
    return table


def edge_table(rows: list[dict[str, Any]], key: str, title: str) -> Table:
    table = Table(title=f"agreement with {title} ({rows[0][key]['gold']:,})")
    for head in ("", "precision", "recall", "F1", "R-value", "times chance", "z"):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for r in rows:
        a = r[key]
        cells = [number(a[k], 3) for k in ("precision", "recall", "f1", "r_value")]
        table.add_row(r["name"], *cells, number(a["enrichment"]), number(a["z"], 1))
    return table


def size_bars(row: dict[str, Any]) -> str:
    counts = np.zeros(LONGEST_BAR, dtype=np.int64)
    for size, chunks in row["histogram"]:
        counts[min(size, LONGEST_BAR) - 1] += chunks
    heights = np.ceil(counts / max(counts.max(), 1) * (len(BARS) - 1)).astype(int)
    return f"{row['name']}: bytes a chunk, 1 to {LONGEST_BAR} and more  |{''.join(BARS[h] for h in heights)}|"


def number(x: float, digits: int = 2) -> str:
    return f"{x:.{digits}f}" if math.isfinite(x) else "-"


def percent(x: float) -> str:
    return f"{100 * x:.1f} %" if math.isfinite(x) else "-"
