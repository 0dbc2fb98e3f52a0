"""Dechunk: chunk rows back to positions, smoothed by an EMA over chunks.

    y_m = (1 - P_m) y_{m-1} + P_m z_m        out_t = STE(c_t) y[chunk_index_t] + residual_t

with P_m = clamp(p[chunk_start_m], 1e-4, 1 - 1e-4), y = 0 before a sequence, and STE the straight-through estimator
(forward 1, backward the identity). Backward, with g_m = sum_{t in m} dout_t + (1 - P_{m+1}) g_{m+1}:

    dz_m = P_m g_m     dP_m = <g_m, z_m - y_{m-1}>     dc_t = <dout_t, y[chunk_index_t]>     dresidual = dout

A boundary has P > 1/2, so y_{m-k} weighs less than 2^-k in y_m. Kernels use it: a tile starts the recurrence from
zero 32 chunks early, exact to fp32 rounding, and needs nothing from the tile before.

Public functions `dechunk` and `dechunk_step`; below them the autograd formula and the schema of the op. Plain PyTorch
in `reference.py`, kernels in `csrc/cpu/dechunk.cpp` and `triton/dechunk.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .library import define, kernels
from .types import Routing
from .validation import (
    check_device,
    check_matrix,
    check_routing,
    check_routing_values,
    check_state,
    check_vector,
    probability_dtype,
    readable,
)


def _check_residual(residual: Tensor | None, rows: int, z: Tensor) -> None:
    if residual is None:
        return
    check_matrix("residual", residual)
    shape = rows, z.shape[1]
    if residual.shape != shape:
        raise ValueError(
            f"residual must have shape {shape}, got {tuple(residual.shape)}, next to z of {tuple(z.shape)}"
        )
    check_device("residual", residual, "z", z)
    if residual.dtype != z.dtype and torch.float64 in (residual.dtype, z.dtype):
        raise TypeError(f"residual must not be {residual.dtype} next to {z.dtype} z")


def dechunk(z: Tensor, r: Routing, residual: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Smooth chunk rows by their boundary probability and give every position its chunk's row (H-Net paper, eq. 5-9).

    y_m = (1 - P_m) y_{m-1} + P_m z_m;  out_t = STE(c_t) y[chunk_index_t] + residual_t.

    Args:
        z: (M, D) fp32|bf16|fp16 (fp64 with the reference), one row for each chunk of `r`.
        r: Routing that made the chunks, P > 1/2 at every chunk start.
        residual: (T, D), any of these dtypes, added in fp32. Default: nothing is added.
        backend: as in `route`.

    Returns:
        out (T, D), dtype of z; sums in fp32. Gradients go to z, residual, r.boundary_prob and r.selected_prob.

    Raises:
        TypeError, ValueError: z does not have the chunks of r; residual has another shape; r is on another device.
        RuntimeError: the backend named cannot run here.

    Equivalent to:
        for m in range(M): y[m] = P[m] * z[m] + (1 - P[m]) * (y[m - 1] if m is not the first of its sequence else 0)
        out = y[r.chunk_index] + residual
    """
    check_matrix("z", z)
    check_routing(r, "z", z)
    if z.shape[0] != r.chunk_start.shape[0]:
        raise ValueError(f"z must have the {r.chunk_start.shape[0]} chunks of r, got {z.shape[0]}")
    T = r.chunk_index.shape[0]
    for name in ("boundary_prob", "selected_prob"):
        check_vector(f"r.{name}", getattr(r, name), T, probability_dtype(z), "z", z)
    _check_residual(residual, T, z)
    chosen = dispatch.resolve(backend, "dechunk", z)
    if chosen == "reference":
        check_routing_values(r)
        return reference.dechunk(z, r, residual)
    layout = r.chunk_start, r.chunk_index, r.cu_chunks, r.cu_seqlens
    inputs = z, r.boundary_prob, r.selected_prob, *layout, residual
    keep = chosen == "triton" and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return _dechunk(*inputs, keep, chosen)[0]


def dechunk_step(
    z: Tensor,
    boundary_prob: Tensor,
    boundary_mask: Tensor,
    state: Tensor,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One decoding step of `dechunk` for B sequences; equal to the last position of the full form. No gradient.

    state <- (1 - P) state + P z where boundary_mask, else unchanged;  out = state + residual.

    Args:
        z: (B, D) fp32|bf16|fp16, the new chunk rows; rows without a boundary are ignored.
        boundary_prob: (B,) fp32 and boundary_mask: (B,) bool, from `route_step`.
        state: (B, D) fp32, the EMA of each sequence; zero before its first chunk. Not modified.
        residual: (B, D), any dtype. Default: nothing is added.
        backend: as in `route`.

    Returns:
        out (B, D), dtype of z, and the new state (B, D) fp32.

    Raises:
        TypeError, ValueError, RuntimeError: as in `dechunk`.
    """
    check_matrix("z", z)
    B = z.shape[0]
    check_vector("boundary_mask", boundary_mask, B, torch.bool, "z", z)
    check_vector("boundary_prob", boundary_prob, B, probability_dtype(z), "z", z)
    check_state("state", state, B, "the rows", z)
    _check_residual(residual, B, z)
    chosen = dispatch.resolve(backend, "dechunk_step", z)
    if chosen == "reference":
        return reference.dechunk_step(z, boundary_prob, boundary_mask, state, residual)
    return _dechunk_step(z, boundary_prob, boundary_mask, state, residual, chosen)


# --- autograd -----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    z, prob, _, *layout, residual, keep, ctx.chosen = inputs
    y = output[1]
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(y)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y if keep else z, prob, *layout)


def _backward(ctx, dout, _):
    wanted = ctx.residual_dtype if ctx.needs_input_grad[7] else None
    # the kernel writes it on a GPU, where a look at the padding would wait, and for an fp32 residual of 16-bit rows
    written = wanted if ctx.chosen == "triton" or wanted == torch.float32 != dout.dtype else None
    dz, dprob, dselected, dresidual = _dechunk_bwd(dout, *ctx.saved_tensors, written, ctx.chosen)
    if written is None:
        dresidual = None if wanted is None else _without_padding(dout, ctx.saved_tensors[-1]).to(wanted)
    return dz, dprob, dselected, None, None, None, None, dresidual, None, None


def _without_padding(dout: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Zero past the last sequence; dout itself where a look at it is free and shows that there is nothing past it."""
    T = dout.shape[0]
    if readable(cu_seqlens) and int(cu_seqlens[-1]) == T:
        return dout
    real = torch.arange(T, device=dout.device) < cu_seqlens[-1]
    return torch.where(real[:, None], dout, 0)


# --- schema and shapes --------------------------------------------------------------------------------------------


def _dechunk_fake(z, prob, *args):
    keep = args[-2]
    return z.new_empty(prob.shape[0], z.shape[1]), prob.new_empty(z.shape if keep else 0)


def _dechunk_bwd_fake(dout, rows, prob, *args):
    dtype = args[-2]
    dresidual = prob.new_empty(0) if dtype is None else dout.new_empty(dout.shape, dtype=dtype)
    return dout.new_empty(rows.shape), prob.new_empty(prob.shape), prob.new_empty(prob.shape), dresidual


_dechunk = define(  # with `keep`, also y (M, D) fp32 for the backward
    "dechunk(Tensor z, Tensor boundary_prob, Tensor selected_prob, Tensor chunk_start, Tensor chunk_index, "
    "Tensor cu_chunks, Tensor cu_seqlens, Tensor? residual, bool keep, str backend) -> (Tensor, Tensor)",
    lambda *args: kernels(args[-1], "dechunk").dechunk(*args[:-1]),
    _dechunk_fake,
    _setup_context,
    _backward,
)
_dechunk_bwd = define(  # rows: the y that the forward kept, else z
    "dechunk_bwd(Tensor dout, Tensor rows, Tensor boundary_prob, Tensor chunk_start, Tensor chunk_index, "
    "Tensor cu_chunks, Tensor cu_seqlens, ScalarType? residual_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda *args: kernels(args[-1], "dechunk").dechunk_bwd(*args[:-1]),
    _dechunk_bwd_fake,
)
_dechunk_step = define(
    "dechunk_step(Tensor z, Tensor boundary_prob, Tensor boundary_mask, Tensor state, Tensor? residual, str backend) "
    "-> (Tensor, Tensor)",
    lambda *args: kernels(args[-1], "dechunk").dechunk_step(*args[:-1]),
    lambda z, prob, mask, state, *_: (z.new_empty(z.shape), state.new_empty(state.shape)),
)
