"""Documents to batches: every batch has the same number of bytes, packed, none of it padding.

A document is cut into pieces of at most `seq_len` bytes. A piece becomes one sequence: BOS before it, EOS after it if
it ends its document; inputs are all but the last symbol and targets all but the first, so every position has a target.
Pieces are shuffled anew each epoch and laid end to end; pack k is the `batch_bytes` positions from k * batch_bytes on.
Where a pack ends inside a piece, the rest of the piece opens the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hnet.config import BOS, EOS
from hnet.data.corpus import Corpus
from hnet.errors import UserError


@dataclass
class Batch:
    input_ids: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, the next symbol
    cu_seqlens: Tensor  # (N+1,) int32
    max_seqlen: int
    num_bytes: int  # targets that are bytes of documents; the others are EOS
    filler: bool = False  # runs through the model so that every rank runs as often, but counts for nothing

    @property
    def num_targets(self) -> int:
        return 0 if self.filler else self.targets.shape[0]

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self

        def move(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True)

        return dataclasses.replace(
            self, input_ids=move(self.input_ids), targets=move(self.targets), cu_seqlens=move(self.cu_seqlens)
        )


@dataclass
class Packed:
    """A batch as it travels between processes: an eighth of its size as tensors."""

    inputs: np.ndarray  # (T,) uint8
    targets: np.ndarray  # (T,) uint8
    cu_seqlens: np.ndarray  # (N+1,) int32
    num_bytes: int

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self) -> Batch:
        return Batch(
            torch.from_numpy(self.inputs.astype(np.int64)),
            torch.from_numpy(self.targets.astype(np.int64)),
            torch.from_numpy(self.cu_seqlens),
            int(np.diff(self.cu_seqlens).max()),
            self.num_bytes,
        )


def concatenate(packs: list[Packed]) -> Packed:
    if len(packs) == 1:
        return packs[0]
    begins = np.cumsum([0, *map(len, packs)], dtype=np.int32)
    return Packed(
        np.concatenate([p.inputs for p in packs]),
        np.concatenate([p.targets for p in packs]),
        np.concatenate([[0], *(p.cu_seqlens[1:] + b for p, b in zip(packs, begins, strict=False))]).astype(np.int32),
        sum(p.num_bytes for p in packs),
    )


class Pieces:
    """The pieces of a corpus, at most seq_len - 1 bytes each: room for BOS or EOS."""

    def __init__(self, corpus: Corpus, seq_len: int) -> None:
        self.corpus, step = corpus, seq_len - 1
        counts = -(-corpus.sizes // step)
        self.begin = corpus.begin  # (pieces,) int64, in corpus.buffer
        ends = corpus.end
        if counts.max() > 1:
            first = np.repeat(counts.cumsum() - counts, counts)
            self.begin = np.repeat(corpus.begin, counts) + (np.arange(len(first)) - first) * step
            ends = np.repeat(corpus.end, counts)
        self.size = np.minimum(ends - self.begin, step).astype(np.int32)  # (pieces,) bytes
        self.last = self.begin + self.size == ends  # (pieces,) bool, EOS follows

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def positions(self) -> np.ndarray:
        """(pieces,) int32: a target for every byte, and one for EOS."""
        return self.size + self.last

    def pack(self, which: np.ndarray | slice, used: int = 0, room: int | None = None) -> Packed:
        """One sequence each, without the first `used` positions of the first, and nothing beyond `room` positions;
        `room` must end within the last."""
        begin, last = self.begin[which].copy(), self.last[which].copy()
        length = self.size[which].astype(np.int64) + last
        begin[0] += used
        length[0] -= used
        if room is not None and (over := int(length.sum()) - room) > 0:
            length[-1] -= over
            last[-1] = False
        cu_seqlens = np.concatenate([[0], length.cumsum()]).astype(np.int32)
        source = np.arange(cu_seqlens[-1]) + np.repeat(begin - cu_seqlens[:-1], length)
        targets = self.corpus.buffer.take(source, mode="clip")  # EOS of the last document is beyond the buffer
        targets[cu_seqlens[1:][last] - 1] = EOS
        inputs = np.empty_like(targets)
        inputs[1:] = targets[:-1]
        inputs[cu_seqlens[:-1]] = BOS
        return Packed(inputs, targets, cu_seqlens, len(targets) - int(last.sum()))


class Shuffled:
    """Pieces in random order, end to end: a row of `positions` positions that can be read from anywhere."""

    def __init__(self, pieces: Pieces, seed: tuple[int, int]) -> None:
        self.pieces = pieces
        self.order = np.arange(len(pieces), dtype=np.min_scalar_type(len(pieces)))
        np.random.default_rng(seed).shuffle(self.order)
        self.ends = pieces.positions[self.order].cumsum(dtype=np.int64)
        self.positions = int(self.ends[-1])

    def pack(self, position: int, room: int) -> Packed:
        """`room` positions from `position` on, or as many as there are."""
        first = int(np.searchsorted(self.ends, position, side="right"))
        used = position - (int(self.ends[first - 1]) if first else 0)
        end = int(np.searchsorted(self.ends, position + room)) + 1
        return self.pieces.pack(self.order[first:end], used, room)


class Source(Protocol):
    """What packs are made of: `Corpus`, or `DocumentStream`."""

    def describe(self) -> dict[str, Any]: ...

    def windows(self, cursor: dict[str, Any] | None, least: int) -> Iterator[tuple[dict[str, Any], Corpus]]:
        """(where it begins, documents) of every window, for ever; shuffling is within a window."""


class PackStream:
    """Endless packs of exactly `batch_bytes` positions, in an order set by `seed` and `seq_len` alone.

    Packs are numbered over all ranks; this stream yields packs rank, rank + world_size, ... so a step of W ranks times
    A packs each trains on the same packs as one rank with W * A. Its state is global: it counts positions of all
    ranks, is the same on every rank that took as many packs, and may be loaded with another world size or batch_bytes.

    Raises:
        ValueError: sizes out of range, or a corpus smaller than one batch.
    """

    def __init__(
        self, source: Source, seq_len: int, batch_bytes: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if seq_len < 2 or batch_bytes < 1:
            raise UserError(f"seq_len must be at least 2 and batch_bytes at least 1, got {seq_len} and {batch_bytes}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.source, self.seq_len, self.batch_bytes, self.seed = source, seq_len, batch_bytes, seed
        self.rank, self.world_size = rank, world_size
        self._pieces: Pieces | None = None
        self._seek(0, 0, None)

    # --- reading --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.take().batch()

    def take(self) -> Packed:
        """This rank's pack of the next world_size packs."""
        self.position += self.rank * self.batch_bytes
        parts, room = [], self.batch_bytes
        while room:
            part = self._settle(self._shuffled or self._open_window()).pack(self.position, room)
            parts.append(part)
            room -= len(part)
            self.position += len(part)
        self.position += (self.world_size - 1 - self.rank) * self.batch_bytes
        return concatenate(parts)

    def skip(self, packs: int) -> None:
        """Leave out that many packs of every rank, without making them."""
        self.position += packs * self.world_size * self.batch_bytes

    def _settle(self, shuffled: Shuffled) -> Shuffled:
        """Go on to the window that `position` is in."""
        while self.position >= shuffled.positions:
            self.position -= shuffled.positions
            self.window += 1
            shuffled = self._open_window()
        return shuffled

    def _seek(self, window: int, position: int, cursor: dict[str, Any] | None) -> None:
        """position: where the next step begins, in positions after the beginning of the window; may be beyond it."""
        self.window, self.position, self.cursor = window, position, cursor
        self._windows: Iterator[tuple[dict[str, Any], Corpus]] | None = None
        self._shuffled: Shuffled | None = None
        if isinstance(self.source, Corpus):  # costs nothing, and complains now
            self._open_window()

    def _open_window(self) -> Shuffled:
        if self._windows is None:
            self._windows = self.source.windows(self.cursor, self.batch_bytes)
        self.cursor, corpus = next(self._windows)
        if self._pieces is None or self._pieces.corpus is not corpus:
            self._pieces = Pieces(corpus, self.seq_len)
        self._shuffled = Shuffled(self._pieces, (self.seed, self.window))
        return self._shuffled

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Small, of plain numbers, strings and dictionaries."""
        if self._shuffled is not None:
            self._settle(self._shuffled)
        return {
            "window": self.window, "position": self.position, "cursor": self.cursor, "epochs": self.epochs,
            "made_with": self._made_with(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state was made with other data, seed or seq_len, where it would mean other bytes.
        """
        have = self._made_with()
        for name, value in state["made_with"].items():
            if have.get(name) != value:
                raise UserError(
                    f"the checkpoint's place in the data does not fit: {name} was {value!r} and is {have.get(name)!r}"
                )
        self._seek(state["window"], state["position"], state["cursor"])

    def _made_with(self) -> dict[str, Any]:
        return {"seed": self.seed, "seq_len": self.seq_len, **self.source.describe()}

    def __getstate__(self) -> dict[str, Any]:
        # For processes that are not forked; an iterator cannot travel, and load_state_dict makes a new one.
        return {**self.__dict__, "_windows": None}

    @property
    def epochs(self) -> float:
        """Passes over the corpus so far, by all ranks together; whole ones only for a stream, whose end is unknown."""
        done = self.cursor["epoch"] if self.cursor else 0
        if isinstance(self.source, Corpus) and self._shuffled is not None:
            return done + self.position / self._shuffled.positions
        return float(done)

    @property
    def corpus(self) -> Corpus:
        """The documents, when they are in memory."""
        if not isinstance(self.source, Corpus):
            raise TypeError("the documents of a stream are not in memory")
        return self.source

    def close(self) -> None:
        """Nothing to do; `Workers` has something."""


def eval_batches(
    corpus: Corpus, seq_len: int, batch_bytes: int, max_bytes: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """The first `max_bytes` of a corpus in order, whole pieces, batches of at most about `batch_bytes`; of them batches
    rank, rank + world_size, ... Every rank gets equally many: where one would have fewer, its last is a filler."""
    pieces, count = Pieces(corpus, seq_len), 0
    for group in _groups(pieces.positions, batch_bytes, max_bytes):
        if count % world_size == rank:
            yield pieces.pack(group).batch()
        count += 1
    if count and -count % world_size > world_size - 1 - rank:
        filler = pieces.pack(next(_groups(pieces.positions, batch_bytes, max_bytes))).batch()
        yield dataclasses.replace(filler, num_bytes=0, filler=True)


def _groups(positions: np.ndarray, batch_bytes: int, max_bytes: int) -> Iterator[slice]:
    """Neighbouring pieces that share a batch."""
    first = size = 0
    left = max_bytes
    for i, n in enumerate(positions):
        if left <= 0 or (size and size + n > batch_bytes):
            yield slice(first, i)
            first, size = i, 0
        if left <= 0:
            return
        size += int(n)
        left -= int(n)
    if size:
        yield slice(first, len(positions))
