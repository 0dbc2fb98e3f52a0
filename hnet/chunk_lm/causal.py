"""What the per-position head needs: a causal convolution, a causal mean, and their state between pieces of a text.

Signals are time-major, (T, C), as in `spectral`. A text may be processed in pieces of any lengths with the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spectral import toeplitz

MIN_BLOCK = 64


def causal_filter(u: Tensor, taps: Tensor, history: Tensor | None = None) -> Tensor:
    """y[t] = sum_j taps[j] u[t - j]: overlap-save with blocks of max(K - 1, 64) outputs, each one matrix product.

    Args:
        u: (T, C). taps: (K,). history: (K - 1, C), the values before u, default zeros.

    Returns:
        (T, C); output t is computed from u[..t] alone (later values meet weights that are exactly 0).
    """
    (T, C), K = u.shape, len(taps)
    if history is None:
        history = u.new_zeros(K - 1, C)
    size = max(K - 1, MIN_BLOCK)
    blocks = -(-T // size)
    if blocks == 1:
        return _band(taps, T, u.dtype) @ torch.cat([history, u])
    before, after = u.new_zeros(size - K + 1, C), u.new_zeros(blocks * size - T, C)
    x = torch.cat([before, history, u, after]).view(blocks + 1, size, C)
    band = torch.nn.functional.pad(_band(taps, size, u.dtype), (size - K + 1, 0))  # (size, 2 size)
    previous, own = (m.expand(blocks, size, size) for m in band.split(size, 1))
    y = torch.baddbmm(torch.bmm(previous, x[:-1]), own, x[1:])
    return y.view(blocks * size, C)[:T]


def _band(taps: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, rows + K - 1): row t holds the taps, last first, in columns t .. t + K - 1."""
    zeros = taps.new_zeros(rows - 1)
    return toeplitz(torch.cat([zeros, taps.flip(0), zeros]), rows).to(dtype)


def running_mean(u: Tensor, memory: int, mean: Tensor | None = None, count: int = 0) -> Tensor:
    """m[t] = m[t - 1] + (u[t] - m[t - 1]) / min(count + t + 1, memory)

    The mean of all values so far, until there are `memory`; from then on one that forgets at the rate 1 / memory, so
    that it stays defined, with the same weight for a new value, on a text of any length.

    Args:
        u: (T, C). memory: in positions. mean: (C,), m before u. count: values that went into it.

    Returns:
        (T, C) in fp32 or better
    """
    with torch.autocast(u.device.type, enabled=False):
        return _running_mean(u.to(torch.promote_types(u.dtype, torch.float32)), memory, mean, count)


def _running_mean(u: Tensor, memory: int, mean: Tensor | None, count: int) -> Tensor:
    T, C = u.shape
    mean = u.new_zeros(C) if mean is None else mean.to(u.dtype)
    filling = max(0, min(T, memory - count))
    parts = []
    if filling:
        n = torch.arange(count + 1, count + filling + 1, device=u.device, dtype=u.dtype)[:, None]
        parts.append((_cumsum(u[:filling]) + mean * count) / n)
        mean = parts[-1][-1]
    keep = 1.0 - 1.0 / memory
    for block in u[filling:].split(128) if filling < T else ():
        t = torch.arange(len(block), device=u.device, dtype=u.dtype)
        weights = (keep ** (t[:, None] - t).clamp(min=0) / memory).tril()
        parts.append(weights @ block + keep ** (t[:, None] + 1) * mean)
        mean = parts[-1][-1]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cumsum(u: Tensor, block: int = 32) -> Tensor:
    """cumsum over time in fp32 or better: sums inside blocks as products, then of whole blocks (PyTorch's takes four
    times as long along any but the last dimension)."""
    T, C = u.shape
    if len(u) <= block:
        return u.cumsum(0)
    x = torch.nn.functional.pad(u, (0, 0, 0, -T % block)).view(-1, block, C)
    inside = torch.bmm(u.new_ones(block, block).tril().expand(len(x), block, block), x)
    before = inside[:-1, -1].cumsum(0)
    return (inside + torch.nn.functional.pad(before, (0, 0, 1, 0))[:, None]).view(-1, C)[:T]
