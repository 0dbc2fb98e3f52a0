"""Endless packs for training: every pack has the same number of positions.

Pieces of documents are shuffled anew each epoch and laid end to end; pack k is the `batch_bytes` positions from
k * batch_bytes on. Where a pack ends inside a piece, the rest of the piece opens the next one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hnet.errors import UserError

from .corpus import Corpus, Source
from .mixture import Mixture, Turns
from .packing import Batch, Packed, Pieces, Shuffled, concatenate


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
