"""Random windows of a corpus, and the loss on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hnet.data.corpus import Corpus
from hnet.errors import UserError

from .model import ChunkLM


class Windows(NamedTuple):
    """Windows of text and what follows them."""

    input_ids: Tensor  # (B, T) int64
    targets: Tensor  # (B, chunk) int64, the bytes after each window

    @property
    def num_targets(self) -> int:
        """Bytes predicted: those after the windows."""
        return self.targets.numel()

    @property
    def num_bytes(self) -> int:
        """Of them bytes of text: all."""
        return self.num_targets

    def to(self, device: torch.device) -> Windows:
        if device.type == "cpu":
            return self
        return type(self)(*(x.pin_memory().to(device, non_blocking=True) for x in self))


class NextByteWindows(Windows):
    """The same for a next-byte head."""

    @property
    def num_targets(self) -> int:
        """Bytes predicted: the one after each position."""
        return self.input_ids.numel()


class WindowStream:
    """Endless batches of windows; every place of the corpus where one fits is equally likely, with replacement.

    A window and its target lie within one document. Documents too short for that are laid end to end, in order, and
    serve as one more document: only there does a window cross from one text into another. If even together they are too
    short they are not used: `unused_bytes` says how many.

    Batch i depends on (seed, i) alone, so the state is one number.

    Args:
        corpus: documents. seq_len: bytes of a window. chunk: bytes of its target. batch_size: windows.
        causal: they are for a next-byte head.

    Raises:
        ValueError: a size below 1, or no place where a window fits.
    """

    def __init__(
        self, corpus: Corpus, seq_len: int, chunk: int, batch_size: int, seed: int, causal: bool = False
    ) -> None:
        for name, value in (("seq_len", seq_len), ("chunk", chunk), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.seq_len, self.chunk, self.batch_size, self.seed, self.causal = seq_len, chunk, batch_size, seed, causal
        self.batches = 0
        self.data, self.begins, lengths, self.unused_bytes = documents_of(corpus, seq_len + chunk)
        self.places = (lengths - (seq_len + chunk) + 1).cumsum()
        if not len(self.places):
            raise UserError(
                f"the corpus has {corpus.num_bytes} bytes, fewer than one window of seq_len + chunk = "
                f"{seq_len + chunk}: add data or lower seq_len"
            )

    @property
    def epochs(self) -> float:
        """Bytes read over bytes there are (windows overlap, so some are read more often than others)."""
        return self.batches * self.batch_size * self.seq_len / max(int(self.places[-1]), 1)

    def close(self) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]

    def __iter__(self) -> Iterator[Windows]:
        return self

    def __next__(self) -> Windows:
        draws = np.random.default_rng((self.seed, self.batches)).integers(0, self.places[-1], self.batch_size)
        self.batches += 1
        document = np.searchsorted(self.places, draws, side="right")
        begin = self.begins[document] + draws - np.where(document > 0, self.places[document - 1], 0)
        return _cut(self.data, begin, self.seq_len, self.chunk, self.causal)


def eval_windows(
    corpus: Corpus, seq_len: int, chunk: int, batch_size: int, max_windows: int, causal: bool = False
) -> Iterator[Windows]:
    """At most `max_windows` windows, evenly spread over the corpus, the same at every call."""
    data, begins, lengths, _ = documents_of(corpus, seq_len + chunk)
    places = (lengths - (seq_len + chunk) + 1).cumsum()
    if not len(places):
        raise UserError(f"held-out text has no document of seq_len + chunk = {seq_len + chunk} bytes: add some")
    count = min(max_windows, int(places[-1]))
    draws = (np.arange(count) * int(places[-1])) // count
    document = np.searchsorted(places, draws, side="right")
    begin = begins[document] + draws - np.where(document > 0, places[document - 1], 0)
    for i in range(0, count, batch_size):
        yield _cut(data, begin[i : i + batch_size], seq_len, chunk, causal)


def documents_of(corpus: Corpus, size: int, least: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(data, begins, lengths, unused bytes) of the documents of at least `size` bytes, the short ones joined, which are
    used if they come to `least` bytes together (default: size)."""
    begins, lengths = corpus.begin, corpus.sizes
    short = lengths < size
    joined = int(lengths[short].sum())
    if not joined:
        return corpus.buffer, begins, lengths, 0
    if joined < (size if least is None else least):
        return corpus.buffer, begins[~short], lengths[~short], joined
    rest = np.concatenate([corpus.document(i) for i in np.flatnonzero(short).tolist()])
    data = np.concatenate([corpus.buffer, rest]) if not short.all() else rest
    begin = len(data) - joined
    return data, np.append(begins[~short], begin), np.append(lengths[~short], joined), 0


def _cut(data: np.ndarray, begin: np.ndarray, seq_len: int, chunk: int, causal: bool) -> Windows:
    ids = torch.from_numpy(data[begin[:, None] + np.arange(seq_len + chunk)].astype(np.int64))
    return (NextByteWindows if causal else Windows)(ids[:, :seq_len], ids[:, seq_len:])


def chunk_lm_loss(
    model: ChunkLM, windows: Windows, cutoff: int | None = None, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(loss, cross entropy), () fp32, nats a predicted byte; they differ by label smoothing only.

    Chunk head: mean over the `chunk` bytes after each window. Next-byte head: mean over all positions of the window,
    the last of which predicts the first byte after it.
    """
    logits, targets = model(windows.input_ids, cutoff), windows.targets
    if model.config.causal:
        targets = torch.cat([windows.input_ids[:, 1:], targets[:, :1]], 1)
    if logits.shape[:2] != targets.shape:
        raise ValueError(f"targets must be {tuple(logits.shape[:2])} for this model, got {tuple(targets.shape)}")
    flat, targets = logits.float().flatten(0, 1), targets.flatten()
    ce = F.cross_entropy(flat, targets)
    if not label_smoothing:
        return ce, ce
    return F.cross_entropy(flat, targets, label_smoothing=label_smoothing), ce
