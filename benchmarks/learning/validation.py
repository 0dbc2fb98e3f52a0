"""Held-out nats a byte, from log-probabilities alone: the same function for every model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LogProbs = Callable[[Tensor], Tensor]


@torch.no_grad()
def nats_per_byte(log_probs: LogProbs, text: Tensor, context: int, batch: int = 16) -> float:
    """-mean_i log p(x_i | the bytes before it in its window), every byte of `text` but the first, each once.

    Windows of context + 1 bytes overlap by one: a byte has from 1 to `context` bytes before it, (context + 1) / 2 on
    average. The last window may be shorter.

    Args:
        log_probs: (n, L) int64 bytes, L <= context -> (n, L, 256) floating point, of the byte after each. It may use
            no byte that comes later; a test of every model here looks.
        text: (bytes,) int64 in [0, 256), at least two.
        context: most bytes that a model sees, at least 1.
        batch: windows at once.

    Raises:
        ValueError: a size out of range, or what should be probabilities of all 256 bytes does not add up to 1.
    """
    if context < 1 or batch < 1 or text.dim() != 1 or len(text) < 2:
        raise ValueError(f"text must have two bytes and context and batch be 1, got {len(text)}, {context}, {batch}")
    full = (len(text) - 1) // context
    groups = [torch.arange(i, min(i + batch, full)) * context for i in range(0, full, batch)]
    total, count = 0.0, 0
    for starts in groups:
        windows = text[starts[:, None] + torch.arange(context + 1)]
        total += _nats(log_probs, windows)
        count += len(starts) * context
    if (rest := text[full * context :]).numel() > 1:
        total += _nats(log_probs, rest[None])
        count += len(rest) - 1
    assert count == len(text) - 1
    return total / count


def _nats(log_probs: LogProbs, windows: Tensor) -> float:
    """windows (n, L + 1)"""
    found = log_probs(windows[:, :-1]).double()
    if found.shape != (*windows[:, 1:].shape, 256):
        raise ValueError(f"log_probs must be of 256 bytes at each of {tuple(windows[:, 1:].shape)}, got {found.shape}")
    off = found.logsumexp(-1).abs().max().item()
    if not off < 1e-3:  # not a number is no probability either
        raise ValueError(f"log_probs do not add up to 1: they are off by a factor of e^{off:.3g}")
    return -found.gather(-1, windows[:, 1:, None]).sum().item()
