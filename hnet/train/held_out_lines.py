"""A few lines of the held-out text whose boundaries are kept at every evaluation, for `hnet segment RUN --timeline`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from hnet.data.packing import Batch

LINES = 16
SHORTEST, LONGEST = 12, 120  # bytes; of a longer line its beginning is kept
LOOKED_AT = 1 << 16  # positions


class HeldOutLines:
    """The same lines whenever the evaluation is of the same text: spread over its first LOOKED_AT positions."""

    def __init__(self) -> None:
        self.where: list[tuple[int, str]] | None = None  # position of the first byte, text

    def read(self, chunk_starts: np.ndarray, packs: Iterable[Batch]) -> list[dict[str, Any]]:
        """[{"text", "starts"}]: a line, and for each stage the bytes of it where chunks begin.

        chunk_starts: (stages, positions) bool, of the packs end to end, perhaps cut short.
        packs: all of the evaluation's in order, looked at in the first call only.
        """
        if self.where is None:
            found = list(_lines(packs, chunk_starts.shape[1]))
            chosen = np.linspace(0, len(found) - 1, min(LINES, len(found))).round().astype(int)
            self.where = [found[i] for i in chosen]
        kept = []
        for at, text in self.where:
            here = chunk_starts[:, at : at + len(text.encode())]
            kept.append({"text": text, "starts": [np.flatnonzero(mask).tolist() for mask in here]})
        return kept


def _lines(packs: Iterable[Batch], length: int) -> Iterable[tuple[int, str]]:
    """Lines that are UTF-8, none of them across two sequences; first positions of sequences are no bytes of text."""
    begin, length = 0, min(length, LOOKED_AT)
    for batch in packs:
        ids, edges = batch.input_ids.numpy().astype(np.uint8), batch.cu_seqlens.tolist()
        for a, b in zip(edges, edges[1:], strict=False):
            at = begin + a + 1
            for line in ids[a + 1 : b].tobytes().split(b"\n"):
                kept = line[:LONGEST]
                while len(line) > len(kept) and line[len(kept)] & 0xC0 == 0x80 and kept:
                    kept = kept[:-1]
                if at + len(kept) > length:
                    return
                try:
                    text = kept.decode()
                except UnicodeDecodeError:
                    text = ""
                if len(text.strip()) >= SHORTEST:
                    yield at, text
                at += len(line) + 1
        begin += len(ids)
