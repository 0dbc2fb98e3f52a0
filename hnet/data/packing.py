"""Documents to packed batches, none of it padding; `pack_stream` makes them endless, for training.

A document is cut into pieces of at most `seq_len` bytes. A piece becomes one sequence: BOS before it, EOS after it if
it ends its document; inputs are all but the last symbol and targets all but the first, so every position has a target.

A symbol or position is a byte or the end of a document; sizes called `num_bytes` count bytes of text alone.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hnet.config import BOS, EOS
from hnet.data.corpus import Corpus

IGNORED = -100  # a target that is not scored; F.cross_entropy's default


@dataclass
class Batch:
    input_ids: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, the next symbol, or IGNORED
    cu_seqlens: Tensor  # (N+1,) int32
    max_seqlen: int
    num_bytes: int  # scored targets that are bytes of documents; the others are EOS
    num_ignored: int = 0
    filler: bool = False  # runs through the model so that every rank runs as often, but counts for nothing

    @property
    def num_targets(self) -> int:
        return 0 if self.filler else self.targets.shape[0] - self.num_ignored

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
    """The pieces of a corpus, at most seq_len - 1 bytes each: room for BOS or EOS.

    With a stride they overlap: pieces of at most seq_len symbols begin every `stride` bytes of a document, until one
    reaches its end. What a piece shares with the one before, its first seq_len - stride symbols, is context.
    """

    def __init__(self, corpus: Corpus, seq_len: int, stride: int | None = None) -> None:
        self.corpus = corpus
        step, longest = (seq_len - 1, seq_len - 1) if stride is None else (stride, seq_len)
        counts = -(-corpus.sizes // step) if stride is None else 1 - np.minimum(seq_len - 1 - corpus.sizes, 0) // step
        self.begin = corpus.begin  # (pieces,) int64, in corpus.buffer
        ends = corpus.end
        if counts.max() > 1:
            first = np.repeat(counts.cumsum() - counts, counts)
            self.begin = np.repeat(corpus.begin, counts) + (np.arange(len(first)) - first) * step
            ends = np.repeat(corpus.end, counts)
        self.size = np.minimum(ends - self.begin, longest).astype(np.int32)  # (pieces,) bytes
        self.last = (self.begin + self.size == ends) & (self.size < seq_len)  # (pieces,) bool, EOS follows
        self.context = np.zeros(0, dtype=np.int32)  # (pieces,) bytes that the piece before has scored
        if stride is not None:
            self.context = np.full(len(self.begin), seq_len - stride, dtype=np.int32)
            self.context[counts.cumsum() - counts] = 0

    def part(self, shard: int, shards: int) -> Pieces:
        """Every `shards`-th piece from `shard` on; all, where there are fewer pieces than shards."""
        if shards == 1 or len(self) < shards:
            return self
        part = copy.copy(self)
        part.begin, part.size, part.last = (x[shard::shards].copy() for x in (self.begin, self.size, self.last))
        return part

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

    def __init__(self, pieces: Pieces, seed: tuple[int, ...]) -> None:
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


def eval_batches(
    corpus: Corpus,
    seq_len: int,
    batch_bytes: int,
    max_bytes: int | None,
    rank: int = 0,
    world_size: int = 1,
    stride: int | None = None,
) -> Iterator[Batch]:
    """The first `max_bytes` bytes of text of a corpus (None: all) in order, whole pieces, batches of at most about
    `batch_bytes` positions; of them batches rank, rank + world_size, ... Every rank gets equally many: where one would
    have fewer, its last is a filler.

    With a stride in [1, seq_len] every symbol is scored once, with at least seq_len - stride bytes before it where its
    document has them; the targets that only repeat are IGNORED.
    """
    pieces, count = Pieces(corpus, seq_len, stride), 0
    for group in _groups(pieces, batch_bytes, max_bytes):
        if count % world_size == rank:
            yield _eval_batch(pieces, group)
        count += 1
    if count and -count % world_size > world_size - 1 - rank:
        filler = _eval_batch(pieces, next(_groups(pieces, batch_bytes, max_bytes)))
        yield dataclasses.replace(filler, num_bytes=0, filler=True)


def _eval_batch(pieces: Pieces, group: slice) -> Batch:
    packed = pieces.pack(group)
    batch = packed.batch()
    if not len(pieces.context):
        return batch
    context, begins = pieces.context[group], packed.cu_seqlens[:-1]
    lengths = np.diff(packed.cu_seqlens)
    repeated = np.arange(len(packed)) < np.repeat(begins + context, lengths)
    batch.targets[torch.from_numpy(repeated)] = IGNORED
    shared = int(context.sum())
    return dataclasses.replace(batch, num_bytes=batch.num_bytes - shared, num_ignored=shared)


def _groups(pieces: Pieces, batch_bytes: int, max_bytes: int | None) -> Iterator[slice]:
    """Neighbouring pieces that share a batch."""
    first = size = 0
    left = math.inf if max_bytes is None else max_bytes
    new = pieces.size - pieces.context if len(pieces.context) else pieces.size
    for i, (n, scored) in enumerate(zip(pieces.positions, new, strict=True)):
        if left <= 0 or (size and size + n > batch_bytes):
            yield slice(first, i)
            first, size = i, 0
        if left <= 0:
            return
        size += int(n)
        left -= int(scored)
    if size:
        yield slice(first, len(pieces))
