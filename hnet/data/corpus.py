"""Documents in memory, and holding some of them out."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hnet.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """Documents as byte strings: document i is buffer[begin[i] : end[i]]. Parts of a corpus share its buffer."""

    buffer: np.ndarray  # (any,) uint8
    begin: np.ndarray  # (documents,) int64
    end: np.ndarray  # (documents,) int64

    @staticmethod
    def of(documents: Iterable[bytes]) -> Corpus:
        """Empty documents are left out."""
        parts = [d for d in documents if d]
        return Corpus.cut(np.frombuffer(b"".join(parts), dtype=np.uint8), np.cumsum([*map(len, parts)], dtype=np.int64))

    @staticmethod
    def cut(buffer: np.ndarray, ends: np.ndarray) -> Corpus:
        """Documents that lie end to end from the first byte on, by where they end. Empty ones are left out."""
        bounds = np.concatenate([[0], ends]).astype(np.int64)
        empty = bounds[1:] == bounds[:-1]
        if empty.any():
            bounds = bounds[np.concatenate([[True], ~empty])]
        return Corpus(buffer, bounds[:-1], bounds[1:])

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def sizes(self) -> np.ndarray:
        """(documents,) int64, bytes"""
        return self.end - self.begin

    @property
    def num_bytes(self) -> int:
        return int(self.sizes.sum())

    def document(self, i: int) -> np.ndarray:
        return self.buffer[self.begin[i] : self.end[i]]

    def longest(self, among: int | None = None) -> bytes:
        """The longest of the first `among` documents, or of all."""
        return self.document(int(self.sizes[:among].argmax())).tobytes()

    def select(self, documents: Iterable[int] | np.ndarray) -> Corpus:
        """These documents in this order; copies no text."""
        which = documents if isinstance(documents, np.ndarray) else np.fromiter(documents, dtype=np.int64)
        return Corpus(self.buffer, self.begin[which], self.end[which])

    def shuffled(self, seed: int) -> Corpus:
        return self.select(np.random.default_rng(seed).permutation(len(self)))

    def describe(self) -> dict[str, Any]:
        """What a checkpoint notes about the data it was made with: enough to notice other documents or another order,
        without reading them."""
        return {"documents": len(self), "bytes": self.num_bytes, "crc": zlib.crc32(self.sizes.data)}

    @property
    def amount(self) -> str:
        return f"{self.num_bytes:,} bytes in {len(self):,} documents"

    def splits(self, shards: int) -> bool:
        return True

    def passes(self, cursor: dict[str, Any] | None) -> float:
        return float(cursor["epoch"]) if cursor else 0.0

    def windows(
        self, cursor: dict[str, Any] | None, least: int, shard: int = 0, shards: int = 1
    ) -> Iterator[tuple[dict[str, Any], Corpus]]:
        """Itself, once an epoch, for ever, to every shard: it is there already, and the pieces are shared out. See
        `PackStream`.

        Raises:
            ValueError: it has fewer than `least` bytes.
        """
        if self.num_bytes < least:
            raise UserError(
                f"the corpus has {self.num_bytes} bytes, fewer than one batch of {least}: add data or lower batch_bytes"
            )
        epoch = cursor["epoch"] if cursor else 0
        while True:
            yield {"epoch": epoch}, self
            epoch += 1


class Source(Protocol):
    """What packs are made of: `Corpus`, `LocalStream` or `DocumentStream`."""

    @property
    def amount(self) -> str:
        """How much there is, for people."""

    def describe(self) -> dict[str, Any]:
        """What a checkpoint notes of it: plain values that are others for other data."""

    def splits(self, shards: int) -> bool:
        """Whether it can be read in so many parts, so that nobody decodes another's documents."""

    def passes(self, cursor: dict[str, Any] | None) -> float:
        """Passes over the data (or over a shard) so far."""

    def windows(
        self, cursor: dict[str, Any] | None, least: int, shard: int = 0, shards: int = 1
    ) -> Iterator[tuple[dict[str, Any], Corpus]]:
        """(where it begins, documents) of every window of a shard, for ever; shuffling is within a window."""


def hold_out(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus, str]:
    """(rest, held out, what was done): about `fraction` of the bytes, at random, the same for the same seed.

    Whole documents, if that leaves a sensible share on either side: documents much larger than the share are not held
    out unless all are. Otherwise (one document; one that outweighs all others) blocks of documents, cut at line ends.

    Raises:
        ValueError: fraction outside (0, 1), or too little text to hold anything out.
    """
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction must be in (0, 1), got {fraction}")
    sizes, order = corpus.sizes, np.random.default_rng(seed).permutation(len(corpus))
    total = int(sizes.sum())
    target = fraction * total
    for largest, enough in ((2 * target, target / 2), (total / 2, target / 4)):
        held = _first(order, sizes, largest, target)[: len(corpus) - 1]
        if len(held) and sizes[held].sum() >= enough:
            mask = np.zeros(len(corpus), dtype=bool)
            mask[held] = True
            share = sizes[held].sum() / total
            what = f"held out at random: {len(held)} of {len(corpus)} documents ({share:.1%} of the bytes)"
            return corpus.select(np.flatnonzero(~mask)), corpus.select(held), what
    return _hold_out_blocks(corpus, fraction, seed)


def _first(order: np.ndarray, sizes: np.ndarray, largest: float, target: float) -> np.ndarray:
    """The first of `order` that are not above `largest` and together have `target` bytes, or all of these."""
    found, size = [order[:0]], 0
    for a in range(0, len(order), 1 << 20):  # most often one round will do
        fits = order[a : a + (1 << 20)]
        fits = fits[sizes[fits] <= largest]
        together = size + sizes[fits].cumsum()
        found.append(fits[: int(np.searchsorted(together, target)) + 1])
        if len(fits) and (size := int(together[-1])) >= target:
            break
    return np.concatenate(found)


def _hold_out_blocks(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus, str]:
    # About eight held-out blocks at least, so that they come from all over the text.
    size = int(np.clip(fraction * corpus.num_bytes / 8, 256, 65536))
    cuts = [_block_ends(corpus.document(i), size) for i in range(len(corpus))]
    ends = np.concatenate([e + b for e, b in zip(cuts, corpus.begin, strict=True)])
    begin = np.concatenate([np.concatenate([[0], e[:-1]]) + b for e, b in zip(cuts, corpus.begin, strict=True)])
    if len(ends) < 2:
        raise UserError(
            f"cannot hold anything out of {len(corpus)} document of {corpus.num_bytes} bytes: "
            "name held-out files with val_data, or add text"
        )
    order = np.random.default_rng(seed).permutation(len(ends))
    held = np.zeros(len(ends), dtype=bool)
    held[_first(order, ends - begin, math.inf, fraction * corpus.num_bytes)[: len(ends) - 1]] = True
    # Neighbours on the same side stay together, within a document.
    document = np.repeat(np.arange(len(corpus)), [len(e) for e in cuts])
    first = np.flatnonzero(np.concatenate([[True], (np.diff(held) != 0) | (np.diff(document) != 0)]))
    runs = Corpus(corpus.buffer, begin[first], ends[np.concatenate([first[1:], [len(ends)]]) - 1])
    share = (ends - begin)[held].sum() / corpus.num_bytes
    which = "the only document is" if len(corpus) == 1 else f"{len(corpus)} documents of very unequal size are"
    what = (
        f"{which} cut into blocks of about {size} bytes at line ends; held out at random: "
        f"{held.sum()} of {len(ends)} blocks ({share:.1%} of the bytes)"
    )
    return runs.select(np.flatnonzero(~held[first])), runs.select(np.flatnonzero(held[first])), what


def _block_ends(text: np.ndarray, size: int) -> np.ndarray:
    """Where blocks of about `size` bytes end: at line ends, or between characters where a line is very long."""
    ends = [0]
    while len(text) - ends[-1] > size * 3 // 2:
        at = ends[-1] + size
        newlines = np.flatnonzero(text[at - 1 : at + size] == 10)
        if len(newlines):
            at += int(newlines[0])
        else:
            while at < len(text) and at < ends[-1] + size + 4 and text[at] & 0xC0 == 0x80:  # inside a character
                at += 1
        ends.append(at)
    return np.array([*ends[1:], len(text)] if ends[-1] < len(text) else ends[1:], dtype=np.int64)
