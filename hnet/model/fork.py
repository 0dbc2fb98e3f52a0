"""The four ways that a stage's rows take after its encoder: residual projection, W_q, W_k, pool.

Autograd alone gives x four gradients and adds them up, three passes over (T, D), and keeps a copy of x in fp32 for the
residual's weight. Here there is one gradient: the pool's is the buffer, the products of the router accumulate into it,
and the residual's is added.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fork(
    x: Tensor, residual_proj: nn.Linear, q_proj: nn.Linear, k_proj: nn.Linear
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (T, D) -> residual (T, D) in the dtype of its weight, autocast or not; q and k (T, D) as autocast has them; and
    x for the pool. That last one may have one consumer only, whose gradient is written on."""
    kind, dtype = x.device.type, x.dtype
    if not all(isinstance(m, nn.Linear) for m in (residual_proj, q_proj, k_proj)):  # more than a weight: an adapter's
        with torch.autocast(kind, enabled=False):
            residual = residual_proj(x.to(residual_proj.weight.dtype))
        return residual, q_proj(x), k_proj(x), x
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    return _Fork.apply(x, residual_proj.weight, residual_proj.bias, q_proj.weight, k_proj.weight, dtype)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual_weight, residual_bias, q_weight, k_weight, dtype):
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype)
            residual = _linear(x.to(residual_weight.dtype), residual_weight, residual_bias, dtype)
            q, k = F.linear(rows, q_weight.to(dtype)), F.linear(rows, k_weight.to(dtype))
        ctx.save_for_backward(x, residual_weight, q_weight, k_weight)
        ctx.dtype = dtype
        return residual, q, k, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_residual, dq, dk, dx):
        x, residual_weight, q_weight, k_weight = ctx.saved_tensors
        needs, d_weights = ctx.needs_input_grad, [None, None, None]
        dx = dx.contiguous()  # as it comes from a pool; a sum's is one number seen many times
        with torch.autocast(x.device.type, enabled=False):
            branches = ((d_residual, residual_weight), (dq, q_weight), (dk, k_weight))
            for i, ((d, weight), needed) in enumerate(zip(branches, (needs[1], *needs[3:5]), strict=True)):
                if needed:
                    d_weights[i] = (d.T @ x.to(d.dtype)).to(weight.dtype)
                if needs[0]:
                    _add_product(dx, d, weight.to(d.dtype))
            d_bias = d_residual.sum(0) if needs[2] else None
        return dx if needs[0] else None, d_weights[0], d_bias, d_weights[1], d_weights[2], None


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    if into.dtype == a.dtype:
        torch.addmm(into, a, b, out=into)
    else:
        into.add_(_linear(a, b.T, None, into.dtype))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, around: torch.dtype) -> Tensor:
    """F.linear. fp32 among bf16 goes to oneDNN, where its neighbours go anyway: MKL, which PyTorch takes for fp32, runs
    at less than half of the speed on AMD. Among fp32 it does not: oneDNN compiles for every number of rows it meets."""
    onednn = around == torch.bfloat16 and x.dtype == torch.float32 and x.device.type == "cpu" and len(x)
    if onednn and _ONEDNN is not None and not torch.compiler.is_compiling():
        return _ONEDNN(x, weight.contiguous(), bias, "none", [], "")
    return F.linear(x, weight, bias)


def _onednn() -> Callable[..., Tensor] | None:
    """What torch.compile calls for a linear layer on a CPU"""
    namespace = getattr(torch.ops, "mkldnn", None)
    return getattr(namespace, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


_ONEDNN = _onednn()
