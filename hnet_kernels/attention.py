"""Causal attention over packed sequences, in a sliding window or without one, rotary positions included.

    out_i = sum_j softmax_j(R_i q_i . R_j k_j / sqrt(width)) v_j    i - window <= j <= i, never past a sequence's start

Public function `attention`; below it the autograd formula and the schema of the op. Plain PyTorch in `reference.py`,
kernel in `csrc/cpu/attention.cpp`. On a GPU the reference runs: use flash attention there (torch.nn.attention.varlen).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .library import define, kernels
from .validation import ROW_DTYPES, check_cu_seqlens, check_cu_seqlens_values, check_device, check_tensor


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    window: int = -1,
    rotary: tuple[Tensor, Tensor] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(width)) v within each sequence and window, q and k rotated by their positions.

    Args:
        qkv: (T, 3, heads, width) fp32|bf16|fp16 (fp64 with the reference): queries, keys and values.
        cu_seqlens: (N+1,) int32 from 0; positions past its end, if any, are padding.
        window: a position sees itself and the `window` before it; -1: all before it.
        rotary: cos and sin, each (T, half) fp32, of the angle at each position: the first 2 * half channels are
            rotated, in halves (RoFormer, arXiv 2104.09864). They get no gradient. None: no rotation.
        backend: as in `route`; the op has kernels for a CPU, elsewhere the reference runs.

    Returns:
        out (T, heads, width), dtype of qkv, computed in fp32; padding rows are 0. The gradient goes to qkv.
        On a CPU with AVX512-BF16, products of bf16 qkv multiply bf16 (rotated q and k, probabilities, gradients of
        scores) and add up in fp32.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; a bad cu_seqlens (values are checked on CPU only).
        RuntimeError: the backend named cannot run here.

    Equivalent to:
        q, k, v = qkv.transpose(0, 2).unbind(1)   # of one sequence, without window and rotation
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
    """
    check_tensor("qkv", qkv)
    if qkv.dtype not in ROW_DTYPES:
        raise TypeError(f"qkv must be fp32, bf16, fp16 or fp64, got {qkv.dtype}")
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.shape[3]:
        raise ValueError(f"qkv must have shape (T, 3, heads, width), got {tuple(qkv.shape)}")
    check_cu_seqlens(cu_seqlens, "qkv", qkv)
    if isinstance(window, bool) or not isinstance(window, int) or window < -1:
        raise ValueError(f"window must be an integer >= 0, or -1 for no window, got {window!r}")
    cos, sin = (None, None) if rotary is None else check_rotary(rotary, qkv)
    chosen = dispatch.resolve(backend, "attention", qkv)
    if chosen == "reference":
        check_cu_seqlens_values(cu_seqlens, qkv.shape[0], padded=True)
        return reference.attention(qkv, cos, sin, cu_seqlens, window)
    return _attention(qkv, cos, sin, cu_seqlens, window, chosen)[0]


def check_rotary(rotary: tuple[Tensor, Tensor], qkv: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(rotary, tuple) or len(rotary) != 2:
        raise TypeError(f"rotary must be a pair (cos, sin), got {type(rotary).__name__}")
    for name, x in zip(("cos", "sin"), rotary, strict=True):
        check_tensor(f"rotary's {name}", x)
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rotary's {name} must be fp32, got {x.dtype}")
        T, width = qkv.shape[0], qkv.shape[3]
        if x.dim() != 2 or x.shape[0] != T or x.shape != rotary[0].shape or 2 * x.shape[1] > width:
            raise ValueError(
                f"rotary's {name} must have shape ({T}, half), half <= {width // 2}, next to qkv of "
                f"{tuple(qkv.shape)}, got {tuple(x.shape)}"
            )
        check_device(f"rotary's {name}", x, "qkv", qkv)
    return rotary


# --- autograd -----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    qkv, cos, sin, cu_seqlens, ctx.window, ctx.chosen = inputs
    ctx.save_for_backward(qkv, cos, sin, cu_seqlens, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _):
    dqkv = _attention_bwd(dout, *ctx.saved_tensors, ctx.window, ctx.chosen)
    return dqkv, None, None, None, None, None


# --- schema and shapes --------------------------------------------------------------------------------------------

_attention = define(
    "attention(Tensor qkv, Tensor? cos, Tensor? sin, Tensor cu_seqlens, int window, str backend) -> (Tensor, Tensor)",
    lambda *args: kernels(args[-1], "attention").attention(*args[:-1]),
    lambda qkv, *_: (
        qkv.new_empty(qkv.shape[0], *qkv.shape[2:]),
        qkv.new_empty((qkv.shape[0], qkv.shape[2]), dtype=torch.float32),
    ),
    _setup_context,
    _backward,
)
_attention_bwd = define(
    "attention_bwd(Tensor dout, Tensor qkv, Tensor? cos, Tensor? sin, Tensor cu_seqlens, Tensor lse, int window, "
    "str backend) -> Tensor",
    lambda *args: kernels(args[-1], "attention").attention_bwd(*args[:-1]),
    lambda dout, qkv, *_: qkv.new_empty(qkv.shape),
)
