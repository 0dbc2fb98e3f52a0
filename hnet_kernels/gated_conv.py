"""Gated short convolution over packed sequences, the mixer of layout letters c and C between its two projections.

    out_t = (bias + sum_j weight[:, K-1-j] u_{t-j}) * silu(g_t)    j < K, never past the start of a sequence

Public function `gated_conv`; below it the autograd formula and the schema of the op. Plain PyTorch in `reference.py`,
kernel in `csrc/cpu/gated_conv.cpp`.
"""

from __future__ import annotations

from torch import Tensor

from . import dispatch, reference
from .library import define, kernels
from .validation import check_channels, check_cu_seqlens, check_cu_seqlens_values, check_matrix


def gated_conv(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, *, backend: str | None = None) -> Tensor:
    """out = conv(u) * silu(g) with u, g = x.chunk(2, dim=1), the convolution depthwise and causal.

    Args:
        x: (T, 2 D) fp32|bf16|fp16 (fp64 with the reference): u, then g.
        weight: (D, K) floating point, taken as fp32; the last column weighs the position itself.
        bias: (D,) floating point, taken as fp32.
        cu_seqlens: (N+1,) int32 from 0; positions past its end, if any, are padding and count as one more sequence.
        backend: as in `route`; the op has kernels for a CPU, elsewhere the reference runs.

    Returns:
        out (T, D), dtype of x, sums in fp32. Gradients go to x, weight and bias.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; a bad cu_seqlens (values are checked on CPU only).
        RuntimeError: the backend named cannot run here.

    Equivalent to:
        u, g = x.chunk(2, dim=1)   # of one sequence
        out = F.conv1d(F.pad(u.T, (K - 1, 0)), weight[:, None], bias, groups=D).T * F.silu(g)
    """
    check_matrix("x", x)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or 2 * weight.shape[0] != x.shape[1] or not weight.shape[1]:
        given = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight must have shape (D, K) next to x of (T, 2 D) = {tuple(x.shape)}, got {given}")
    check_channels("weight", weight, tuple(weight.shape), x)
    check_channels("bias", bias, (weight.shape[0],), x)
    check_cu_seqlens(cu_seqlens, "x", x)
    chosen = dispatch.resolve(backend, "gated_conv", x)
    if chosen == "reference":
        check_cu_seqlens_values(cu_seqlens, x.shape[0], padded=True)
        return reference.gated_conv(x, weight, bias, cu_seqlens)
    return _gated_conv(x, weight, bias, cu_seqlens, chosen)


# --- autograd -----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    *saved, ctx.chosen = inputs
    ctx.save_for_backward(*saved)


def _backward(ctx, dout):
    dx, dweight, dbias = _gated_conv_bwd(dout, *ctx.saved_tensors, ctx.chosen)
    return dx, dweight, dbias, None, None


# --- schema and shapes --------------------------------------------------------------------------------------------

_gated_conv = define(
    "gated_conv(Tensor x, Tensor weight, Tensor bias, Tensor cu_seqlens, str backend) -> Tensor",
    lambda *args: kernels(args[-1], "gated_conv").gated_conv(*args[:-1]),
    lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
    _setup_context,
    _backward,
)
_gated_conv_bwd = define(
    "gated_conv_bwd(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor cu_seqlens, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    lambda *args: kernels(args[-1], "gated_conv").gated_conv_bwd(*args[:-1]),
    lambda dout, x, weight, bias, *_: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    ),
)
