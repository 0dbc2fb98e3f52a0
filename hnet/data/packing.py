"""Documents to batches: every batch has the same number of bytes, packed, none of it padding.

A document is cut into pieces of at most `seq_len` bytes. A piece becomes one sequence: BOS before it, EOS after it if
it ends its document; inputs are all but the last symbol and targets all but the first, so every position has a target.
Pieces are shuffled anew each epoch and fill batches in that order; where a batch is full the rest of the piece opens
the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hnet.data.corpus import Corpus

BOS, EOS = 254, 255


@dataclass
class Batch:
    input_ids: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, the next symbol
    cu_seqlens: Tensor  # (N+1,) int32
    max_seqlen: int

    @property
    def num_targets(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self

        def move(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True)

        return Batch(move(self.input_ids), move(self.targets), move(self.cu_seqlens), self.max_seqlen)


def make_batch(sequences: list[np.ndarray]) -> Batch:
    """Sequences of symbols, each at least two long, to one packed batch."""
    inputs = np.concatenate([s[:-1] for s in sequences])
    targets = np.concatenate([s[1:] for s in sequences])
    lengths = [len(s) - 1 for s in sequences]
    return Batch(
        torch.from_numpy(inputs.astype(np.int64)),
        torch.from_numpy(targets.astype(np.int64)),
        torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        max(lengths),
    )


def pieces(corpus: Corpus, seq_len: int) -> np.ndarray:
    """(pieces, 3) int64: document, first byte, end byte within it; at most seq_len - 1 bytes, room for BOS or EOS."""
    step = max(seq_len - 1, 1)
    rows = [
        (d, a, min(a + step, size))
        for d, size in enumerate(np.diff(corpus.offsets).tolist())
        for a in range(0, size, step)
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def symbols(corpus: Corpus, document: int, begin: int, end: int) -> np.ndarray:
    text = corpus.document(document)
    ends = [EOS] if end == len(text) else []
    return np.concatenate([[BOS], text[begin:end], ends]).astype(np.uint8)


class PackStream:
    """Endless batches of exactly `batch_bytes` positions, in an order set by `seed` alone.

    Its state is small and exact: the epoch, the next piece, and how much of that piece is already used.
    """

    def __init__(self, corpus: Corpus, seq_len: int, batch_bytes: int, seed: int) -> None:
        if seq_len < 2 or batch_bytes < 1:
            raise ValueError(f"seq_len must be at least 2 and batch_bytes at least 1, got {seq_len} and {batch_bytes}")
        if corpus.num_bytes < batch_bytes:
            raise ValueError(
                f"the corpus has {corpus.num_bytes} bytes, fewer than one batch of {batch_bytes}: "
                "add data or lower batch_bytes"
            )
        self.corpus, self.batch_bytes, self.seed = corpus, batch_bytes, seed
        self.pieces = pieces(corpus, seq_len)
        self.epoch = self.index = self.used = 0
        self._shuffle()

    def _shuffle(self) -> None:
        self.order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.pieces))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index, "used": self.used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.index, self.used = state["epoch"], state["index"], state["used"]
        self._shuffle()

    @property
    def epochs(self) -> float:
        """Passes over the corpus so far."""
        return self.epoch + self.index / len(self.pieces)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        room, sequences = self.batch_bytes, []
        while room:
            document, begin, end = self.pieces[self.order[self.index]]
            whole = symbols(self.corpus, document, begin + self.used, end)
            part = whole[: room + 1]
            sequences.append(part)
            room -= len(part) - 1
            if len(part) == len(whole):
                self._advance()
            else:
                self.used += len(part) - 1
        return make_batch(sequences)

    def _advance(self) -> None:
        self.index, self.used = self.index + 1, 0
        if self.index == len(self.pieces):
            self.epoch, self.index = self.epoch + 1, 0
            self._shuffle()


def eval_batches(corpus: Corpus, seq_len: int, batch_bytes: int, max_bytes: int) -> Iterator[Batch]:
    """The first `max_bytes` of a corpus in order, whole pieces, batches of at most about `batch_bytes`."""
    sequences: list[np.ndarray] = []
    room, left = batch_bytes, max_bytes
    for document, begin, end in pieces(corpus, seq_len):
        if left <= 0:
            break
        s = symbols(corpus, document, begin, end)
        if sequences and len(s) - 1 > room:
            yield make_batch(sequences)
            sequences, room = [], batch_bytes
        sequences.append(s)
        room -= len(s) - 1
        left -= len(s) - 1
    if sequences:
        yield make_batch(sequences)
