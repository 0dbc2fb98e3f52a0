"""Inputs of the op benchmarks: packs whose chunks have a given mean length."""

import torch
from torch import Tensor


def ragged(T: int, N: int, seed: int = 0) -> Tensor:
    """cu_seqlens of N sequences of uneven length."""
    g = torch.Generator().manual_seed(seed)
    cuts = (torch.rand(N, generator=g) + 0.3).cumsum(0)
    cu = torch.cat([torch.zeros(1), cuts / cuts[-1] * T]).round().to(torch.int32)
    return cu


def qk(T: int, D: int, mean_chunk: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random q and k whose boundaries come once every `mean_chunk` positions."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(T, D, generator=g)
    sign = torch.where(torch.rand(T, 1, generator=g) < 1 / mean_chunk, -1.0, 1.0)
    k = sign * q + 1.5 * torch.randn(T, D, generator=g)
    return q.to(dtype), torch.cat([k[:1], k[:-1]]).to(dtype)
