"""`hnet segment --score`: numbers in place of the chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

if TYPE_CHECKING:
    from hnet.segment import Segmentation
    from hnet.segment.morphemes import Morphemes

MORFESSOR = "morfessor"


def write_scores(
    stream: TextIO,
    found: Iterable[Segmentation],
    stages: list[int],
    *,
    morphemes: str | None,
    separator: str,
    as_json: bool,
) -> None:
    """Of the outermost of `stages` first, with baselines at its rate. morphemes: a file, or MORFESSOR, which is trained
    on the words of the text. As tables, or a line of JSON a row.

    Raises:
        UserError: the file will not do, or a package is missing.
    """
    from hnet.segment.report import AHEAD, plain, score_rows, tables

    text, starts, decided = joined(found, stages)
    rows, notes = score_rows(text, starts, known_morphemes(text, morphemes, separator))
    for row in rows:
        row |= decided.get(row["name"].removesuffix(AHEAD), {})
    if as_json:
        for row in rows:
            stream.write(json.dumps(plain(row), ensure_ascii=False) + "\n")
        return
    from rich.console import Console

    about = [f"{name}: p {d['p_on']:.2f} on boundaries, {d['p_off']:.2f} elsewhere" for name, d in decided.items()]
    bits = next(iter(decided.values()))["bits_per_byte"]
    about.append(f"{len(text):,} bytes, {bits:.3f} bits per byte (ends of documents are not predicted here)")
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 140)
    console.print(tables(rows, [*about, *notes]))


def known_morphemes(text: bytes, given: str | None, separator: str) -> Morphemes | None:
    from hnet.segment.characters import Characters
    from hnet.segment.morphemes import morfessor, read_morphemes

    if given == MORFESSOR:
        return morfessor(Characters(text))
    return None if given is None else read_morphemes(given, separator)


def joined(
    found: Iterable[Segmentation], stages: list[int]
) -> tuple[bytes, dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """The text; by the name of each stage the bytes where its chunks begin, how decided its router is, and the bits per
    byte of the model."""
    from hnet.model.router_metrics import NEAR, decisiveness

    texts: list[bytes] = []
    size, nats = 0, 0.0
    starts: dict[int, list[np.ndarray]] = {i: [] for i in stages}
    sums = {i: np.zeros(5) for i in stages}  # positions, chunks, p on boundaries, p elsewhere, near 1/2
    for piece in found:
        for i in stages:
            s = piece.stages[i]
            on = np.isin(s.offsets, s.starts, assume_unique=True)
            p = s.probability.astype(np.float64)
            sums[i] += [len(p), on.sum(), p[on].sum(), p[~on].sum(), (np.abs(p - 0.5) < NEAR).sum()]
            starts[i].append(s.starts + size)
        texts.append(piece.text)
        size, nats = size + len(piece.text), nats + float(piece.loss.sum(dtype=np.float64))
    about = {"bits_per_byte": nats / math.log(2) / size if size else math.nan}
    text = b"".join(texts)
    return (
        text,
        {f"stage {i}": np.concatenate([np.zeros(0, dtype=np.int64), *starts[i]]) for i in stages},
        {f"stage {i}": decisiveness(*sums[i]) | about for i in stages},
    )
