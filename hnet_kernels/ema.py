"""Exponential moving average over packed sequences, for any weights.

    y_t = (1 - p_t) y_{t-1} + p_t z_t

`dechunk` fuses the case an H-Net needs; this is the general one. Public function `ema`; below it the autograd formula
and the schema of the op. Plain PyTorch in `reference.py`, kernels in `csrc/cpu/ema.cpp` and `triton/ema.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .library import define, kernels
from .validation import (
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_matrix,
    check_state,
    check_vector,
    probability_dtype,
)


def ema(
    z: Tensor,
    p: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = (1 - p_t) y_{t-1} + p_t z_t within each sequence (H-Net paper, eq. 5).

    Args:
        z: (T, D) fp32|bf16|fp16 (fp64 with the reference).
        p: (T,) fp32, weights in [0, 1]; not clamped.
        cu_seqlens: (N+1,) int32, from 0 to T.
        initial_state: (N, D) fp32, y before each sequence. Default: zero.
        return_final_state: also return y after each sequence.
        backend: as in `route`.

    Returns:
        y (T, D), dtype of z, sums in fp32; with return_final_state also (N, D) fp32. Gradients go to z, p and
        initial_state.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; a bad cu_seqlens (values are checked on CPU only).
        RuntimeError: the backend named cannot run here.

    Equivalent to:
        for t in range(T): y[t] = p[t] * z[t] + (1 - p[t]) * (initial_state[n] if t == cu_seqlens[n] else y[t - 1])
    """
    check_matrix("z", z)
    T = z.shape[0]
    check_vector("p", p, T, probability_dtype(z), "z", z)
    check_cu_seqlens(cu_seqlens, "z", z)
    if initial_state is not None:
        check_state("initial_state", initial_state, cu_seqlens.shape[0] - 1, "cu_seqlens", z)
    chosen = dispatch.resolve(backend, "ema", z)
    if chosen == "reference":
        check_cu_seqlens_values(cu_seqlens, T)
        y, final = reference.ema(z, p, cu_seqlens, initial_state)
    else:
        y, final = _ema(z, p, cu_seqlens, initial_state, chosen)
    return (y, final) if return_final_state else y


# --- autograd -----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    z, p, cu_seqlens, initial_state, ctx.chosen = inputs
    ctx.save_for_backward(z, p, cu_seqlens, initial_state)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal):
    z, p, cu_seqlens, initial_state = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(z)
    dz, dp, dinitial = _ema_bwd(dy, dfinal, z, p, cu_seqlens, initial_state, ctx.chosen)
    return dz, dp, None, None if initial_state is None else dinitial, None


# --- schema and shapes --------------------------------------------------------------------------------------------


def _ema_fake(z, p, cu_seqlens, *_):
    return z.new_empty(z.shape), z.new_empty((cu_seqlens.shape[0] - 1, z.shape[1]), dtype=torch.float32)


def _ema_bwd_fake(dy, dfinal, z, p, cu_seqlens, initial_state, *_):
    shape = (0,) if initial_state is None else initial_state.shape
    return z.new_empty(z.shape), p.new_empty(p.shape), p.new_empty(shape)


_ema = define(
    "ema(Tensor z, Tensor p, Tensor cu_seqlens, Tensor? initial_state, str backend) -> (Tensor, Tensor)",
    lambda *args: kernels(args[-1], "ema").ema(*args[:-1]),
    _ema_fake,
    _setup_context,
    _backward,
)
_ema_bwd = define(
    "ema_bwd(Tensor dy, Tensor? dfinal, Tensor z, Tensor p, Tensor cu_seqlens, Tensor? initial_state, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    lambda *args: kernels(args[-1], "ema").ema_bwd(*args[:-1]),
    _ema_bwd_fake,
)
