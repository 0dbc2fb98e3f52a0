"""Routing in CUDA C++: the whole forward, budget included, is one launch (Triton's is two, three with a budget)."""

from __future__ import annotations

import torch

from hnet_kernels.library import kernels
from hnet_kernels.native import Rows

from .common import call, empty, extension


def route(q, k, cu_seqlens, logit_bias, candidates, max_chunks, padded):
    (T, D), N = q.shape, cu_seqlens.shape[0] - 1
    i32 = torch.int32
    prob, selected, norms = empty(q, T), empty(q, T), empty(q, 3, T)
    mask, prob_sum, entropy_sum = empty(q, T, dtype=torch.bool), empty(q, N), empty(q, N)
    chunk_index, cu_chunks, num_dropped = empty(q, T, dtype=i32), empty(q, N + 1, dtype=i32), empty(q, dtype=i32)
    chunk_start = empty(q, T if max_chunks is None else max_chunks, dtype=i32)
    scratch = empty(q, extension().cuda_scratch, dtype=i32)
    call(
        "cuda_route_fwd", q, q.dtype, Rows(q), Rows(k), cu_seqlens, N, T, D, logit_bias, candidates,
        -1 if max_chunks is None else max_chunks,
        prob, selected, mask, *norms, chunk_index, chunk_start, cu_chunks, prob_sum, entropy_sum, num_dropped, scratch,
    )  # fmt: skip
    if max_chunks is None:
        chunk_start = chunk_start[: int(cu_chunks[-1])]  # the one wait for the device
    return prob, mask, selected, chunk_index, chunk_start, cu_chunks, prob_sum, entropy_sum, num_dropped, norms


def route_bwd(*args):
    return kernels("triton", "routing").route_bwd(*args)  # bytes, not launches, are its cost: one kernel is enough


def route_step(q_prev, k, is_first, logit_bias, candidates):
    B, D = k.shape
    prob, selected, mask = empty(k, B), empty(k, B), empty(k, B, dtype=torch.bool)
    call(
        "cuda_route_step", k, k.dtype, Rows(q_prev), Rows(k), B, D, logit_bias, is_first, candidates,
        prob, selected, mask,
    )  # fmt: skip
    return prob, mask, selected
