"""What decoding remembers, one slot (row) for each sequence of the batch.

Slots are independent: sequences may have different lengths and fire boundaries at different bytes, so every layer's
`step` takes the slots it advances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class AttentionCache:
    """Keys and values (after rotary). With a window the rows are a ring; without, they grow up to `max_length`."""

    k: Tensor  # (B, capacity, heads, width)
    v: Tensor
    length: Tensor  # (B,) int64, positions seen
    max_length: int

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def reserve(self, rows: int) -> None:
        """Make room for `rows` positions a slot (a window needs no more than itself)."""
        rows = min(rows, self.max_length)
        if rows <= self.capacity:
            return
        before = self.capacity
        grown = min(max(rows, 2 * before), self.max_length)
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_zeros(old.shape[0], grown, *old.shape[2:])
            new[:, :before] = old
            setattr(self, name, new)


@dataclass
class ConvCache:
    tail: Tensor  # (B, kernel - 1, channels), the last inputs, oldest first


@dataclass
class MambaCache:
    tail: Tensor  # (B, d_conv - 1, channels)
    ssm: Tensor  # (B, heads, headdim, d_state) fp32


LayerCache = AttentionCache | ConvCache | MambaCache


@dataclass
class RouteCache:
    q_last: Tensor  # (B, d_model), the last position's W_q x
    seen: Tensor  # (B,) bool, any position yet
    ema: Tensor  # (B, d_model) fp32, the dechunked value
    tail: Tensor  # (B, 3) uint8, the last bytes, for boundaries at the ends of characters


@dataclass
class StageCache:
    """One stage. The innermost has only `layers`."""

    layers: list[LayerCache]  # encoder, or main network
    decoder: list[LayerCache]
    route: RouteCache | None = None
    inner: StageCache | None = None


@dataclass
class HNetCache:
    root: StageCache
    length: Tensor  # (B,) int64, bytes seen
    max_length: int

    def checked(self, slots: Tensor) -> Tensor:
        """`slots`, if they are places of this cache, each named once: two rows for one slot would have no order.

        Raises:
            ValueError: they are not.
        """
        named = slots.tolist()
        if slots.dim() != 1 or slots.dtype != torch.int64:
            raise ValueError(f"slots must be (n,) int64, got {tuple(slots.shape)} {slots.dtype}")
        if len(set(named)) < len(named) or not all(0 <= s < len(self.length) for s in named):
            raise ValueError(f"slots must be distinct and from 0 to {len(self.length) - 1}, got {named}")
        return slots


def write_kv(cache: AttentionCache, k: Tensor, v: Tensor, slots: Tensor, at: Tensor) -> None:
    """Put rows k, v (n, heads, width) at positions `at` of `slots`; the ring wraps."""
    at = at % cache.capacity
    cache.k[slots, at] = k.to(cache.k.dtype)
    cache.v[slots, at] = v.to(cache.v.dtype)


def allocate_kv(batch: int, heads: int, width: int, max_length: int, window: int, like: Tensor) -> AttentionCache:
    limit = min(max_length, window + 1) if window >= 0 else max_length
    shape = (batch, min(limit, 256), heads, width)
    return AttentionCache(
        like.new_zeros(shape), like.new_zeros(shape), torch.zeros(batch, dtype=torch.int64, device=like.device), limit
    )
