"""Inputs of the op benchmarks: packs whose chunks have a given mean length."""

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    T: int
    D: int
    chunk: int  # mean positions a chunk
    N: int = 8

    def __str__(self) -> str:
        return f"T{self.T}-D{self.D}-chunk{self.chunk}"


SMOKE = Shape(512, 64, 5, 4)
GPU = [Shape(T, D, chunk) for T in (8192, 65536, 262144) for D in (1024, 1536, 2048) for chunk in (3, 6)]
GRAPHS = [Shape(T, D, 6) for T in (8192, 65536, 262144) for D in (1024, 2048)]
# Compiling a baseline takes seconds, so torch.compile races on these, on the others with --compile all.
COMPILED = {Shape(8192, 1024, 6), Shape(65536, 1024, 6), Shape(262144, 1024, 6)}


def raced_compiled(config, shape: Shape) -> bool:
    """Whether torch.compile's contenders race on a GPU, by the option --compile."""
    return {"none": False, "some": shape in COMPILED, "all": True}[config.getoption("--compile")]


def ragged(T: int, N: int, seed: int = 0) -> Tensor:
    """cu_seqlens of N sequences of uneven length."""
    g = torch.Generator().manual_seed(seed)
    cuts = (torch.rand(N, generator=g) + 0.3).cumsum(0)
    cu = torch.cat([torch.zeros(1), cuts / cuts[-1] * T]).round().to(torch.int32)
    return cu


def qk(
    T: int, D: int, mean_chunk: float, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random q and k whose boundaries come once every `mean_chunk` positions."""
    g = torch.Generator(device).manual_seed(seed)
    q = torch.randn(T, D, generator=g, device=device)
    sign = torch.where(torch.rand(T, 1, generator=g, device=device) < 1 / mean_chunk, -1.0, 1.0)
    k = sign * q + 1.5 * torch.randn(T, D, generator=g, device=device)
    return q.to(dtype), torch.cat([k[:1], k[:-1]]).to(dtype)


def rows(n: int, D: int, dtype: torch.dtype, device: str, grad: bool = False) -> Tensor:
    return torch.randn(n, D, device=device).to(dtype).requires_grad_(grad)
