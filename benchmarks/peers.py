"""A stage of dynamic chunking by h-net-dynamic-chunking (`pip install hnet-kernels[peers]`), set up to compute what
ours does, and both on the same weights.

It compares q of a position with k of the one before, where ours (and the published model) compares k with the q before:
its queries are our keys. Its ratio loss is the mean over sequences, an option of ours. Switched off: gradients scaled
between stages (`learning_rate_difference`) and through F (`straight_through_frac_vecs`). What stays different: p of a
first position comes from a parameter and is not 1, so all sequences here begin with the same row, for which that
parameter makes it 1; chunk rows are weighted by p before the inner network, not after, which is the same where there is
none; P is not kept below 1 - 1e-4; sequences are padded, not packed, and their chunks to those of the one with most.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hnet_kernels as hk

from . import baselines, stage
from .harness import Pass

PACKAGE = "h-net-dynamic-chunking"
MISSING = f"{PACKAGE} is not installed: pip install hnet-kernels[peers]"


def installed() -> bool:
    return importlib.util.find_spec("h_net_dynamic_chunking") is not None


def name() -> str:
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


class Inputs(NamedTuple):
    """B sequences of L positions of D channels, packed: (B L, D). q, k: x under the weights, leaves of their own"""

    B: int
    x: Tensor  # a boundary every fifth position, under the weights
    residual: Tensor
    w_q: Tensor  # (D, D), as ours has them
    w_k: Tensor
    q: Tensor
    k: Tensor
    dout: Tensor
    dratio: Tensor  # ()
    cu: Tensor


def inputs(B: int, L: int, D: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    sign = torch.where(torch.rand(B, L, 1, generator=g) < 0.2, -1.0, 1.0).to(device, dtype)
    x = sign.cumprod(1) * normal(D) + 0.8 * normal(B, L, D)  # cosines of neighbours are near 0.6 or -0.6
    x[:, 0] = x[0, 0].clone()
    x = x.view(B * L, D)
    w_q, w_k = (torch.eye(D, device=device, dtype=dtype) + 0.2 * D**-0.5 * normal(D, D) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x, normal(B * L, D), w_q, w_k, x @ w_q.T, x @ w_k.T)]
    cu = torch.arange(0, (B + 1) * L, L, dtype=torch.int32, device=device)
    return Inputs(B, *leaves, normal(B * L, D), torch.tensor(0.03, device=device, dtype=dtype), cu)


class Form(NamedTuple):
    """A way to compute the stage of some inputs: (out, ratio loss), and what gradients are asked for."""

    run: Callable[[], tuple[Tensor, Tensor]]
    leaves: tuple[Tensor, ...]

    def passes(self, x: Inputs) -> Pass:
        dout = (x.dout, x.dratio)
        return Pass(lambda i: self.run(), lambda i, out: torch.autograd.grad(out, self.leaves, dout))


def by_sequence(q: Tensor, k: Tensor, x: Tensor, residual: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
    """Our stage, its ratio loss the mean of those of the sequences"""
    r = hk.route(q, k, cu)
    return hk.dechunk(hk.pool(x, r), r, residual), hk.ratio_loss(r, stage.TARGET, reduction="sequence")


def ours(x: Inputs, projections: bool, compute: Any = by_sequence) -> Form:
    """With the two projections or without; `compute`: another form of a stage than ours."""
    if not projections:
        return Form(lambda: compute(x.q, x.k, x.x, x.residual, x.cu), (x.x, x.residual, x.q, x.k))

    def run() -> tuple[Tensor, Tensor]:
        return compute(F.linear(x.x, x.w_q), F.linear(x.x, x.w_k), x.x, x.residual, x.cu)

    return Form(run, (x.x, x.residual, x.w_q, x.w_k))


def plain(x: Inputs, projections: bool) -> Form:
    """Our fastest form in plain PyTorch, compiled, of static shapes"""
    mask = baselines.route_sums(x.q.detach(), x.k.detach(), x.cu)[1]
    budget = stage.rounded_budget(int(mask.sum()))
    form = stage.plain(baselines.route_sums, baselines.dechunk_scan, budget)
    return ours(x, projections, torch.compile(form, fullgraph=True))


def projections_alone(x: Inputs) -> Pass:
    """Both matrix products, and their gradients."""
    dout, leaves = (x.k.detach(), x.q.detach()), (x.x, x.w_q, x.w_k)
    return Pass(
        lambda i: (F.linear(x.x, x.w_q), F.linear(x.x, x.w_k)), lambda i, out: torch.autograd.grad(out, leaves, dout)
    )


class _Given(nn.Module):
    """Projections that have been made"""

    def __init__(self, made: Tensor) -> None:
        super().__init__()
        self.made = made

    def forward(self, tokens: Tensor) -> Tensor:
        return self.made


def peer(x: Inputs, projections: bool) -> Form:
    """The peer with copies of the weights of `x`. Its last leaf is one tensor for two of ours: both weights (2 D, D),
    or q and k side by side (B, L, 2 D); our k comes first."""
    from h_net_dynamic_chunking import DynamicSequenceChunker

    D = x.x.shape[1]
    module = DynamicSequenceChunker(
        D, target_avg_token_length=stage.TARGET, ratio_loss_weight=1.0, learning_rate_difference=1.0,
        straight_through_frac_vecs=False,
    ).to(x.x.device, x.x.dtype)  # fmt: skip
    with torch.no_grad():
        module.to_queries_keys.weight.copy_(torch.cat([x.w_k, x.w_q]))
        module.start_key_token.copy_(-x.k[0])
    last = module.to_queries_keys.weight
    if not projections:
        last = torch.cat([x.k, x.q], -1).detach().view(x.B, -1, 2 * D).requires_grad_()
        module.to_queries_keys = _Given(last)

    def run() -> tuple[Tensor, Tensor]:
        down, up, ratio = module(x.x.view(x.B, -1, D))
        return up(down).flatten(0, 1) + x.residual, ratio

    return Form(run, (x.x, x.residual, last))


def together(x: Inputs, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of our form as those of the peer's leaves."""
    dx, dresidual, dq, dk = gradients
    both = torch.cat([dk, dq]) if dq.shape[0] == dq.shape[1] else torch.cat([dk, dq], -1).view(x.B, -1, 2 * dq.shape[1])
    return dx, dresidual, both
