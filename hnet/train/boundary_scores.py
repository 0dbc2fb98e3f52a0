"""Where boundaries of the held-out text are, at every evaluation: on character starts, at words. Needs no package."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hnet.data.packing import Batch
from hnet.segment.characters import Characters
from hnet.segment.scores import shares, word_edges

KEPT = ("char_start_share", "space_share", "word_start_share")


class BoundaryScores:
    """What the held-out text is made of, found at the first evaluation and kept: about 40 bytes a byte, of at most the
    first 2^20 positions."""

    def __init__(self) -> None:
        self.chars: Characters | None = None
        self.given = np.zeros(0, dtype=np.int64)

    def scores(self, chunk_starts: np.ndarray, packs: Iterable[Batch]) -> dict[str, float]:
        """Keys of metrics.jsonl.

        chunk_starts: (stages, positions) bool, of the packs end to end, perhaps cut short.
        packs: all of the evaluation's in order, looked at in the first call only. First positions of sequences, which
            stand for no byte, are given boundaries and taken for white space.
        """
        if self.chars is None or len(self.chars.of) != chunk_starts.shape[1]:
            self._read(packs, chunk_starts.shape[1])
        assert self.chars is not None
        result: dict[str, float] = {}
        for i, mask in enumerate(chunk_starts):
            free = np.setdiff1d(np.flatnonzero(mask), self.given, assume_unique=True)
            found = shares(self.chars, free)
            result |= {f"stage{i}/{name}": found[name] for name in KEPT}
            result[f"stage{i}/word_starts_found"] = word_edges(self.chars, free, self.given, chance=False).recall
        return result

    def _read(self, packs: Iterable[Batch], length: int) -> None:
        text, given, size = [], [], 0
        for batch in packs:
            if size >= length:
                break
            ids = batch.input_ids.numpy().astype(np.uint8)
            begins = batch.cu_seqlens[:-1].numpy()
            ids[begins[begins < len(ids)]] = ord("\n")
            text.append(ids)
            given.append(size + begins)
            size += len(ids)
        self.chars = Characters(np.concatenate(text)[:length].tobytes())
        self.given = np.unique(np.concatenate(given))
        self.given = self.given[self.given < length]
