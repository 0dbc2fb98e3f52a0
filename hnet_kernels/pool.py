"""Pooling: one row for each chunk.

    boundary (the H-Net's):  z_m = x[chunk_start_m]        mean, max, last: over the rows of the chunk

Public function `pool`; below it the autograd formula and the schema of the op. Plain PyTorch in `reference.py`,
kernels in `csrc/cpu/pool.cpp` and `triton/pool.py`.
"""

from __future__ import annotations

from torch import Tensor

from . import dispatch, reference
from .library import define, kernels
from .types import Routing
from .validation import check_matrix, check_routing, check_routing_values

MODES = ("boundary", "mean", "max", "last")


def pool(x: Tensor, r: Routing, mode: str = "boundary", *, backend: str | None = None) -> Tensor:
    """One row for each chunk of `r` (H-Net paper, section 2.2.1: downsampling keeps the boundary rows).

    z_m = x[chunk_start_m]; or the mean, the elementwise maximum or the last row of the chunk.

    Args:
        x: (T, D) fp32|bf16|fp16 (fp64 with the reference), packed rows.
        r: Routing of the same T positions.
        mode: "boundary" | "mean" | "max" | "last". "boundary" is causal; the others read the whole chunk, which a
            decoder has not seen yet.
        backend: as in `route`.

    Returns:
        z (M, D), dtype of x; rows past `r.num_chunks` (only with max_chunks) are zero. The gradient of "max" goes to
        the first row that attains it.

    Raises:
        TypeError, ValueError: x is not (T, D) floating point; r has another T or device; unknown mode.
        RuntimeError: the backend named cannot run here.

    Equivalent to:
        z = x[r.boundary_mask]   # mode "boundary", no max_chunks
    """
    check_matrix("x", x)
    check_routing(r, "x", x)
    if x.shape[0] != r.chunk_index.shape[0]:
        raise ValueError(f"x must have the {r.chunk_index.shape[0]} positions of r, got {x.shape[0]}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    chosen = dispatch.resolve(backend, "pool", x)
    if chosen == "reference":
        check_routing_values(r)
        return reference.pool(x, r, mode)
    return _pool(x, r.chunk_start, r.chunk_index, r.cu_chunks, r.cu_seqlens, mode, chosen)


# --- autograd -----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    x, chunk_start, chunk_index, cu_chunks, cu_seqlens, ctx.mode, ctx.chosen = inputs
    ctx.T = x.shape[0]
    ctx.save_for_backward(x if ctx.mode == "max" else None, chunk_start, chunk_index, cu_chunks, cu_seqlens)


def _backward(ctx, dz):
    dx = _pool_bwd(dz, *ctx.saved_tensors, ctx.T, ctx.mode, ctx.chosen)
    return dx, None, None, None, None, None, None


# --- schema and shapes --------------------------------------------------------------------------------------------

_pool = define(
    "pool(Tensor x, Tensor chunk_start, Tensor chunk_index, Tensor cu_chunks, Tensor cu_seqlens, str mode, "
    "str backend) -> Tensor",
    lambda *args: kernels(args[-1], "pool").pool(*args[:-1]),
    lambda x, chunk_start, *_: x.new_empty(chunk_start.shape[0], x.shape[1]),
    _setup_context,
    _backward,
)
_pool_bwd = define(
    "pool_bwd(Tensor dz, Tensor? x, Tensor chunk_start, Tensor chunk_index, Tensor cu_chunks, Tensor cu_seqlens, "
    "SymInt T, str mode, str backend) -> Tensor",
    lambda *args: kernels(args[-1], "pool").pool_bwd(*args[:-1]),
    lambda dz, x, chunk_start, chunk_index, cu_chunks, cu_seqlens, T, *_: dz.new_empty(T, dz.shape[1]),
)
