"""A stage's round trip, route -> pool -> dechunk and the ratio loss, forward and backward, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import hnet_kernels as hk

from ..kernels.cases import cu_of, leaf, qk_with_rate, rand

LENGTHS = [700, 1, 1500, 0, 299]


@dataclass
class Stage:
    q: Tensor
    k: Tensor
    x: Tensor
    residual: Tensor
    cu: Tensor
    dout: Tensor
    dratio: Tensor

    def take(self, other: Stage) -> None:
        """Copy the values of `other` into these very tensors, as a user of a CUDA graph does."""
        with torch.no_grad():
            for name, tensor in vars(self).items():
                tensor.copy_(getattr(other, name))


def make_stage(device: str, dtype: torch.dtype, D: int = 96, lengths: list[int] = LENGTHS, seed: int = 0) -> Stage:
    T = sum(lengths)
    q, k = qk_with_rate(T, D, 0.3, dtype, seed)
    x, residual, dout = (rand(T, D, dtype=dtype, seed=seed + i) for i in (1, 2, 3))
    q, k, x, residual = (leaf(t.to(device)) for t in (q, k, x, residual))
    return Stage(q, k, x, residual, cu_of(lengths, device), dout.to(device), torch.tensor(0.3 + seed, device=device))


def round_trip(s: Stage, budget: int | None, backend: str | None = None, **route) -> list[Tensor]:
    """Everything it gives: out, the ratio loss, the fields of the Routing, the four gradients."""
    with hk.backend(backend or "auto"):
        r = hk.route(s.q, s.k, s.cu, max_chunks=budget, **route)
        out = hk.dechunk(hk.pool(s.x, r), r, s.residual)
        ratio = hk.ratio_loss(r, 4.0)
        grads = torch.autograd.grad((out, ratio), (s.q, s.k, s.x, s.residual), (s.dout, s.dratio))
    return [out, ratio, *r, *grads]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """Bit for bit."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"result {i} differs in {(a != b).sum().item()} of {a.numel()} elements"
