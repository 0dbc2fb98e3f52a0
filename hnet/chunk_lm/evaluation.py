"""How well a ChunkLM predicts text: the one evaluation of training and of `hnet eval`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hnet.data.corpus import Corpus
from hnet.data.packing import IGNORED
from hnet.errors import UserError
from hnet.model.score import Score

from .model import ChunkLM
from .windows import chunk_lm_loss, documents_of, eval_windows


@torch.no_grad()
def evaluate_chunk_lm(
    model: ChunkLM,
    corpus: Corpus,
    autocast: Callable[[], AbstractContextManager],
    *,
    seq_len: int,
    batch_size: int,
    max_bytes: int | None = None,
    stride: int | None = None,
) -> Score:
    """About `max_bytes` bytes (None: as many as there are), at the model's cutoff.

    Without a stride: windows spread evenly over `corpus`, each of which scores the bytes it is trained to predict.
    With one, in [1, seq_len], and the causal head: all text in order, every byte once, with at least seq_len - stride
    bytes of its document before it, where there are so many. The first byte of a document has nothing before it and
    counts 8 bits; documents no longer than a window lie end to end, as in training.

    Raises:
        ValueError: a size or the stride out of range, a stride with the chunk head.
    """
    c, device, before = model.config, model.head.weight.device, model.training
    if not 1 <= seq_len <= c.seq_len:
        raise UserError(f"seq_len must be 1 to {c.seq_len} for this ChunkLM, got {seq_len}")
    if stride is not None and not c.causal:
        raise UserError("stride must be left out for a chunk head: it predicts the bytes after a whole window")
    if stride is not None and not 1 <= stride <= seq_len:
        raise UserError(f"stride must be 1 to seq_len ({seq_len}), got {stride}")
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    if stride is None:
        each = seq_len if c.causal else c.chunk
        windows = max((corpus.num_bytes if max_bytes is None else max_bytes) // each, 1)
        for w in eval_windows(corpus, seq_len, c.chunk, batch_size, windows, c.causal):
            with autocast():
                _, ce = chunk_lm_loss(model, w.to(device))
            total += ce.double() * w.num_bytes
            count += w.num_bytes
    else:
        for ids, targets, first in sliding_windows(corpus, seq_len, stride, batch_size, max_bytes):
            if ids.shape[1]:
                with autocast():
                    logits = model(ids.to(device))
                flat = targets.to(device).flatten()
                loss = F.cross_entropy(logits.float().flatten(0, 1), flat, ignore_index=IGNORED, reduction="none")
                total += loss.double().sum()
            total += first * math.log(256)
            count += first + int((targets != IGNORED).sum())
    model.train(before)
    return Score(total.item(), count, count)


def sliding_windows(
    corpus: Corpus, seq_len: int, stride: int, batch_size: int, max_bytes: int | None
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Windows every `stride` bytes of every document, the last one moved back so that it ends with the document.

    Yields input_ids (B, T), targets (B, T), the byte after each position, or IGNORED where a window before had it; and
    how many first bytes of documents, which no window can predict, belong to the batch.
    """
    data, begins, lengths, _ = documents_of(corpus, seq_len + 1, least=1)
    left = math.inf if max_bytes is None else max_bytes
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        if left <= 0:
            return
        left -= length
        size = min(seq_len, length - 1)
        starts = np.minimum(np.arange(0, max(length - 1 - size, 0) + stride, stride), length - 1 - size)
        starts = np.unique(starts)
        done = np.concatenate([[0], starts[:-1] + size])  # targets up to this byte are scored
        for i in range(0, len(starts), batch_size):
            at = starts[i : i + batch_size, None] + np.arange(size + 1)
            ids = torch.from_numpy(data[begin + at].astype(np.int64))
            targets = ids[:, 1:].clone()
            targets[torch.from_numpy(at[:, 1:] <= done[i : i + batch_size, None])] = IGNORED
            yield ids[:, :-1], targets, int(i == 0)
