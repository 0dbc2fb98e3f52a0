"""Residual add and RMSNorm in one pass.

    s = x + residual        h = weight * s / sqrt(mean(s^2) + eps)

Public function `add_rms_norm`; below it the autograd formula and the schema of the op. Plain PyTorch in `reference.py`,
which also runs on a GPU; kernel in `csrc/cpu/rms_norm.cpp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .library import define, kernels
from .validation import check_channels, check_matrix, check_rows, probability_dtype


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """h = weight * s / sqrt(mean(s^2) + eps) of s = x + residual (RMSNorm, arXiv 1910.07467, before a layer).

    Args:
        x: (T, D) fp32|bf16|fp16 (fp64 with the reference), what the layer before put out.
        residual: (T, D) fp32 (fp64 next to fp64), the sum so far; None: x is the first of the sum.
        weight: (D,) floating point, taken as fp32.
        eps: added to the mean of squares.
        backend: as in `route`; the op has kernels for a CPU, elsewhere the reference runs.

    Returns:
        h (T, D), dtype of x, and s (T, D) fp32. Gradients go to x, residual and weight.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
        RuntimeError: the backend named cannot run here.

    Equivalent to:
        s = x.float() + residual
        h = torch.nn.functional.rms_norm(s, (D,), weight.float(), eps).to(x.dtype)
    """
    check_matrix("x", x)
    if residual is not None:
        check_rows("residual", residual, x.shape, probability_dtype(x), x)
    check_channels("weight", weight, (x.shape[1],), x)
    chosen = dispatch.resolve(backend, "add_rms_norm", x)
    if chosen == "reference":
        return reference.add_rms_norm(x, residual, weight, eps)
    h, total, _ = _add_rms_norm(x, residual, weight, eps, chosen)
    return h, total


# --- autograd -----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    _, residual, weight, _, ctx.chosen = inputs
    h, total, inv_rms = output
    ctx.first, ctx.dtype = residual is None, h.dtype
    ctx.save_for_backward(total, inv_rms, weight)
    ctx.mark_non_differentiable(inv_rms)
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dtotal, _):
    total, inv_rms, weight = ctx.saved_tensors
    if dh is None:
        dh = torch.zeros_like(total, dtype=ctx.dtype)
    dx, dresidual, dweight = _add_rms_norm_bwd(dh, dtotal, total, inv_rms, weight, ctx.chosen)
    if ctx.first:
        return dx, None, dweight, None, None
    return dx, dx if ctx.dtype == torch.float32 else dresidual, dweight, None, None


# --- schema and shapes --------------------------------------------------------------------------------------------


def _fake(x, *_):
    return x.new_empty(x.shape), *(x.new_empty(shape, dtype=torch.float32) for shape in (x.shape, x.shape[:1]))


def _bwd_fake(dh, dtotal, total, inv_rms, weight, *_):
    shape = (0,) if dh.dtype == torch.float32 else total.shape
    return dh.new_empty(dh.shape), total.new_empty(shape), weight.new_empty(weight.shape)


_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    lambda *args: kernels(args[-1], "rms_norm").add_rms_norm(*args[:-1]),
    _fake,
    _setup_context,
    _backward,
)
_add_rms_norm_bwd = define(
    "add_rms_norm_bwd(Tensor dh, Tensor? dtotal, Tensor total, Tensor inv_rms, Tensor weight, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    lambda *args: kernels(args[-1], "rms_norm").add_rms_norm_bwd(*args[:-1]),
    _bwd_fake,
)
