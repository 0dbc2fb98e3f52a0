"""Several sources of documents, each with its share of the bytes trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .corpus import Source

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Mixture:
    """Sources drawn in proportion to their weights, which sum to 1. What each gives a shard is called its row."""

    sources: list[Source]
    weights: list[float]

    @property
    def amount(self) -> str:
        return "; ".join(f"{w:.1%} {s.amount}" for s, w in zip(self.sources, self.weights, strict=True))

    def describe(self) -> dict[str, Any]:
        shares = zip(self.sources, self.weights, strict=True)
        return {"sources": [{"weight": round(w, 9), **s.describe()} for s, w in shares]}


@dataclass
class Turns:
    """Which source each draw of one shard is from: the places of multiples of the golden ratio, from a start that
    depends on the seed, among the weights laid end to end. So every source has its share after any number of draws,
    to within a few, and draw t costs no more than draw 0."""

    weights: list[float]
    seed: tuple[int, ...]
    _done: int = 0
    _counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        self._counts = np.zeros(len(self.weights), dtype=np.int64)
        self._start = np.random.default_rng(self.seed).integers(2**64, dtype=np.uint64)
        self._ends = np.array([int(w * 2**64) for w in np.cumsum(self.weights[:-1])], dtype=np.uint64)

    def sources(self, begin: int, end: int) -> np.ndarray:
        """(end - begin,) int64: the source of draws begin to end - 1."""
        with np.errstate(over="ignore"):
            places = np.arange(begin, end, dtype=np.uint64) * _GOLDEN + self._start  # modulo 2**64
        return np.searchsorted(self._ends, places, side="right")

    def before(self, draw: int) -> np.ndarray:
        """(sources,) int64: how many of the draws before `draw` are of each."""
        if draw < self._done:
            self._done, self._counts = 0, np.zeros_like(self._counts)
        while self._done < draw:
            step = min(draw, self._done + (1 << 20))
            self._counts = self._counts + np.bincount(self.sources(self._done, step), minlength=len(self.weights))
            self._done = step
        return self._counts
