"""Documents to batches: every batch has the same number of bytes, packed, none of it padding.

A document is cut into pieces of at most `seq_len` bytes. A piece becomes one sequence: BOS before it, EOS after it if
it ends its document; inputs are all but the last symbol and targets all but the first, so every position has a target.
Pieces are shuffled anew each epoch and laid end to end; pack k is the `batch_bytes` positions from k * batch_bytes on.
Where a pack ends inside a piece, the rest of the piece opens the next one.

A symbol or position is a byte or the end of a document; sizes called `num_bytes` count bytes of text alone.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hnet.config import BOS, EOS
from hnet.data.corpus import Corpus, Source
from hnet.data.mixture import Mixture, Turns
from hnet.errors import UserError

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


class Row:
    """What one source gives one shard: pieces end to end, shuffled within windows, for ever. Read forwards only."""

    def __init__(
        self, source: Source, shard: int, shards: int, seq_len: int, least: int, seed: tuple[int, ...]
    ) -> None:
        self.source, self.shard, self.shards, self.seq_len, self.least = source, shard, shards, seq_len, least
        self.seed = seed
        self.window, self.begin = 0, 0  # of the window that is open, or that is opened next
        self.cursor: dict[str, Any] | None = None
        self._windows: Iterator[tuple[dict[str, Any], Corpus]] | None = None
        self._pieces: Pieces | None = None
        self.shuffled: Shuffled | None = None

    def pack(self, position: int, room: int) -> Packed:
        """`room` positions from `position` on, or as many as the window has."""
        return self.settle(position).pack(position - self.begin, room)

    def settle(self, position: int) -> Shuffled:
        """Go on to the window that `position` is in."""
        while True:
            if self.shuffled is None:
                self._open_window()
            assert self.shuffled is not None
            if position - self.begin < self.shuffled.positions:
                return self.shuffled
            self.begin += self.shuffled.positions
            self.window += 1
            self.shuffled = None

    def _open_window(self) -> None:
        if self._windows is None:
            self._windows = self.source.windows(self.cursor, self.least, self.shard, self.shards)
        if not isinstance(self.source, Corpus):
            self._pieces = None  # the memory of the last window, before the next takes as much
        cursor, corpus = next(self._windows)
        if self._pieces is None or self._pieces.corpus is not corpus:
            pieces = Pieces(corpus, self.seq_len)
            self._pieces = pieces.part(self.shard, self.shards) if isinstance(self.source, Corpus) else pieces
        self.cursor, self.shuffled = cursor, Shuffled(self._pieces, (*self.seed, self.window))

    def passes(self, position: int) -> float:
        done = self.source.passes(self.cursor)
        if isinstance(self.source, Corpus) and self.shuffled is not None:
            done += (position - self.begin) / self.shuffled.positions
        return done

    def state(self) -> dict[str, Any]:
        return {"window": self.window, "begin": self.begin, "cursor": self.cursor}

    def load(self, state: dict[str, Any]) -> None:
        """Before the first window is opened."""
        self.window, self.begin, self.cursor = state["window"], state["begin"], state["cursor"]


class PackStream:
    """Endless packs of exactly `batch_bytes` positions, in an order that no number of ranks or workers changes.

    Packs are numbered over all ranks; this stream yields packs rank, rank + world_size, ... so a step of W ranks times
    A packs each trains on the same packs as one rank with W * A. Its state counts positions of all ranks and may be
    loaded with another world size or batch_bytes.

    **Shards.** One reader can only make every W-th pack of one long row of documents by reading all of them. So what
    does not fit in memory is cut into `shards` rows (the largest divisor of that for which every source has enough;
    a function of the data, not of the machines), each with its own cursor and windows, and pack k is of row
    k modulo shards. R readers (ranks x workers) where R divides the shards read disjoint rows; any other R reads the
    same packs, but some rows are then decoded by several. What that costs: all rows are read at the same rate, so
    their epochs end at slightly different times (they have equal shares of the bytes on disk, to within 4 %; of a
    Hugging Face dataset, of the files), shuffling is within windows of a row, and one reader of all has a file open for
    each shard. The unit of the draw is the first run's pack and stays that of the run; if a resumed run has packs of
    another size, neighbouring packs may share a row, still in the same order.

    A `Mixture` draws the source of each pack of a row by weight (`Turns`). A corpus in memory alone is one row.

    Every reader knows the exact place of the rows it reads; of the others, one it had earlier, from which it would
    read on. `merge` joins the states of readers to one that is exact throughout.

    Raises:
        ValueError: sizes out of range, or a corpus smaller than one batch.
    """

    def __init__(
        self, source: Source | Mixture, seq_len: int, batch_bytes: int, seed: int, rank: int = 0, world_size: int = 1,
        shards: int = 1,
    ) -> None:  # fmt: skip
        if seq_len < 2 or batch_bytes < 1:
            raise UserError(f"seq_len must be at least 2 and batch_bytes at least 1, got {seq_len} and {batch_bytes}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if shards < 1:
            raise UserError(f"shards must be at least 1, got {shards}")
        self.source, self.seq_len, self.batch_bytes, self.seed = source, seq_len, batch_bytes, seed
        self.rank, self.world_size = rank, world_size
        self.sources, self.weights = (source.sources, source.weights) if isinstance(source, Mixture) else ([source], [])
        if all(isinstance(s, Corpus) for s in self.sources):
            shards = 1
        self.shards = next(
            n for n in range(shards, 0, -1) if shards % n == 0 and all(s.splits(n) for s in self.sources)
        )
        self._alone = self.shards == len(self.sources) == 1  # one row: nothing is drawn
        self._start(0, None if self._alone else batch_bytes, [], 0.0)

    def _start(self, position: int, draw: int | None, rows: list[list[dict[str, Any]]], epochs: float) -> None:
        self.position = position  # where the next step begins, in positions of all rows together
        self.draw = draw  # positions taken from a row before it is the next one's turn; None: there is one row
        self._epochs = epochs
        self._turns: dict[int, Turns] = {}
        self._rows = [[self._row(s, i) for i in range(len(self.sources))] for s in range(self.shards)]
        for states, mine in zip(rows, self._rows, strict=False):
            for state, row in zip(states, mine, strict=True):
                row.load(state)
        for i, source in enumerate(self.sources):
            if isinstance(source, Corpus):  # costs nothing, and complains now
                self._rows[0][i].settle(self._rows[0][i].begin)

    def _row(self, shard: int, source: int) -> Row:
        seed = (self.seed,) if self._alone else (self.seed, shard, source)
        least = self.batch_bytes if self._alone else 1
        return Row(self.sources[source], shard, self.shards, self.seq_len, least, seed)

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
            row, at, most = self._place(self.position)
            part = row.pack(at, min(room, most))
            parts.append(part)
            room -= len(part)
            self.position += len(part)
        self.position += (self.world_size - 1 - self.rank) * self.batch_bytes
        return concatenate(parts)

    def skip(self, packs: int) -> None:
        """Leave out that many packs of every rank, without making them."""
        self.position += packs * self.world_size * self.batch_bytes

    def _place(self, position: int) -> tuple[Row, int, int]:
        """The row that `position` is in, where in it, and how many positions of the draw are left."""
        if self.draw is None:
            return self._rows[0][0], position, self.batch_bytes
        number, used = divmod(position, self.draw)
        turn, shard = divmod(number, self.shards)
        source, before = self._drawn(shard, turn)
        return self._rows[shard][source], before[source] * self.draw + used, self.draw - used

    def _drawn(self, shard: int, turn: int) -> tuple[int, list[int]]:
        """The source of a shard's draw number `turn`, and how many of those before are of each."""
        if len(self.sources) == 1:
            return 0, [turn]
        if shard not in self._turns:
            self._turns[shard] = Turns(self.weights, (self.seed, shard))
        turns = self._turns[shard]
        return int(turns.sources(turn, turn + 1)[0]), turns.before(turn).tolist()

    def _reached(self, shard: int) -> list[int]:
        """Where each row of a shard goes on, given that everything before `position` has been read."""
        if self.draw is None:
            return [self.position]
        number, used = divmod(self.position, self.draw)
        turn, now = divmod(number, self.shards)
        source, before = self._drawn(shard, turn + (shard < now))
        reached = [n * self.draw for n in before]
        if shard == now:
            reached[source] += used
        return reached

    # --- state ----------------------------------------------------------------------------------------------------

    def _opened(self) -> Iterator[tuple[int, Row, int]]:
        """(source, row, where it goes on) of the rows that were read from here."""
        for shard, rows in enumerate(self._rows):
            if any(row.shuffled is not None for row in rows):
                for source, (row, at) in enumerate(zip(rows, self._reached(shard), strict=True)):
                    if row.shuffled is not None:
                        yield source, row, at

    def state_dict(self) -> dict[str, Any]:
        """Small, of plain numbers, strings and dictionaries. Of several readers, see `merge`."""
        for _, row, at in self._opened():
            row.settle(at)
        return {
            "position": self.position, "draw": self.draw, "rows": [[r.state() for r in rows] for rows in self._rows],
            "epochs": self.epochs, "made_with": self._made_with(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state was made with other data, seed, seq_len or shards, where it would mean other bytes.
        """
        have = {"shards": 1} | self._made_with()
        for name, value in ({"shards": 1} | state["made_with"]).items():
            if have.get(name) != value:
                raise UserError(
                    f"the checkpoint's place in the data does not fit: {name} was {value!r} and is {have.get(name)!r}"
                )
        if "rows" in state:
            self._start(state["position"], state["draw"], state["rows"], state["epochs"])
        else:  # of a version that knew one row, and counted positions from its window on
            row = {"window": state["window"], "begin": 0, "cursor": state["cursor"]}
            self._start(state["position"], None, [[row]], state["epochs"])

    def _made_with(self) -> dict[str, Any]:
        shards = {} if self.shards == 1 else {"shards": self.shards}
        return {"seed": self.seed, "seq_len": self.seq_len, **shards, **self.source.describe()}

    def __getstate__(self) -> dict[str, Any]:
        # For processes that are not forked; an iterator cannot travel, and load_state_dict makes new rows.
        return {**self.__dict__, "_rows": []}

    def ahead(self, positions: int) -> Packed:
        """What comes next, at most that many positions, as one pack; it is not taken. For one corpus in memory."""
        shuffled, at = self._rows[0][0].settle(self.position), self.position - self._rows[0][0].begin
        return shuffled.pack(at, min(positions, shuffled.positions - at))

    @property
    def epochs(self) -> float:
        """Passes over the data so far, by all ranks together, judged by the rows read here; of a mixture, over the
        source with the fewest. Whole ones only for a Hugging Face dataset, whose end is unknown."""
        passes: dict[int, list[float]] = {}
        for source, row, at in self._opened():
            passes.setdefault(source, []).append(row.passes(at))
        return min((sum(p) / len(p) for p in passes.values()), default=self._epochs)

    def advice(self, readers: int) -> str:
        """What so many processes x workers cost more than they need, or nothing."""
        if self.shards % readers == 0 or all(isinstance(s, Corpus) for s in self.sources):
            return ""
        if self.shards == 1:
            return f"the data are too few to be read in parts: each of {readers} processes x workers decodes all"
        times = readers // math.gcd(self.shards, readers)
        return (
            f"the data are in {self.shards} shards, and {readers} readers (processes x workers) do not divide them: "
            f"{times} readers decode each; a divisor, or another number of shards, is faster"
        )

    @property
    def corpus(self) -> Corpus:
        """The documents, when they are in memory."""
        if not isinstance(self.source, Corpus):
            raise TypeError("the documents of a stream are not in memory")
        return self.source

    def close(self) -> None:
        """Nothing to do; `Workers` has something."""


def merge(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state of several readers that have come equally far: of every row, the place of who read most of it. The
    states of other streams are all alike, and the last is returned."""
    last = states[-1]
    if "rows" not in last:
        return last
    shards = zip(*(s["rows"] for s in states), strict=True)
    rows = [[max(row, key=lambda r: r["window"]) for row in zip(*shard, strict=True)] for shard in shards]
    return {**last, "rows": rows}


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
