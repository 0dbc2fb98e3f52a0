"""One decoding step of dechunk in CUDA C++."""

from __future__ import annotations

from hnet_kernels.native import Rows

from .common import call, empty


def dechunk_step(z, boundary_prob, boundary_mask, state, residual):
    B, D = z.shape
    out, new_state = empty(z, B, D, dtype=z.dtype), empty(z, B, D)
    residual_dtype = z.dtype if residual is None else residual.dtype
    call(
        "cuda_dechunk_step", z, z.dtype, residual_dtype, Rows(z), Rows(residual), boundary_prob, boundary_mask, state,
        B, D, out, new_state,
    )  # fmt: skip
    return out, new_state
