"""Dechunk on a GPU: the EMA as a matrix product, so that tiles are independent and nothing is written twice.

Unrolled, the EMA gives position t, whose chunk is c,

    y_c = sum_{j <= c} V[t, j] z_j        V[t, j] = P_j prod_{k=j+1..c} (1 - P_k) = P_j 2^(L_c - L_j)

over the chunks of its sequence, with L the prefix sum of log2(1 - P). Every boundary has P > 1/2, so V halves with
each chunk and HALO chunks are enough: 32 for fp32, 16 for 16-bit rows (2^-16 of the largest input, far below
their rounding). L is kept in fixed point (2^-20), in which differences of sums are exact however long the sums are.

Backward, from one pass over dout, with U = V / P and G[t, j] = <dout_t, z_j>:

    g_m = sum_t U[t, m] dout_t     dz_m = P_m g_m     dP_m = <g_m, z_m - y_{m-1}>     dc_t = sum_j V[t, j] G[t, j]

where y_{m-1} is made again from z, once a tile. dP and dc are sums over all columns; each column block leaves its part
in scratch and a second, small kernel adds the parts in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    Kernel,
    block_columns,
    dense,
    dot_dtype,
    dot_precision,
    empty,
    jit,
    rows,
    search_steps,
    sequence_of,
    stride,
    to_dot,
    weighted_sum,
)

P_MIN, P_MAX = tl.constexpr(1e-4), tl.constexpr(1 - 1e-4)
FIXED = tl.constexpr(1048576.0)  # 2^20


@triton.jit
def _clamped(p):
    return tl.where(p < P_MIN, P_MIN, tl.where(p > P_MAX, P_MAX, p))


@triton.jit
def _decay(log, visible):
    """2^log where visible, else 0"""
    return tl.where(visible, tl.exp2(tl.where(visible, log, 0).to(tl.float32) / FIXED), 0.0)


@triton.jit
def _chunks(prob, chunk_start, j, on):
    """Clamped probability of chunks j, and log2(1 - P) in fixed point (0 where not `on`)"""
    start = tl.load(chunk_start + j, mask=on, other=0)
    p = _clamped(tl.load(prob + start, mask=on, other=0.5))
    return p, tl.where(on, (tl.log2(1.0 - p) * FIXED - 0.5).to(tl.int32), 0)


@jit
def _dechunk_fwd_kernel(
    z, prob, chunk_start, chunk_index, cu_chunks, cu_seqlens, residual, out, T, N, steps, z_stride, residual_stride,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HALO: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """WINDOW >= BLOCK_T + HALO chunks are all that a tile can need; it walks those it does, BLOCK_J at a time."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col = (c < D)[None, :]
    at = t.to(tl.int64)[:, None]
    on = t < tl.minimum(T, tl.load(cu_seqlens + N))
    chunk = tl.load(chunk_index + t, mask=on, other=-1)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if HAS_RESIDUAL:  # first of the large loads, so that it is on its way while the layout is looked up
        r = tl.load(residual + at * residual_stride + c[None, :], mask=on[:, None] & col, other=0.0)
        acc = r.to(tl.float32)
    oldest = tl.load(cu_chunks + sequence_of(t, cu_seqlens, N, steps), mask=on, other=0)  # chunk a position may see
    last = tl.max(chunk)
    lowest = tl.min(tl.where(on, chunk, last + 1))  # a tile of padding alone has no chunks: last is -1
    first = tl.maximum(lowest - HALO, 0)

    window = first + tl.arange(0, WINDOW)
    _, log_window = _chunks(prob, chunk_start, window, window <= last)
    log_here = tl.gather(tl.cumsum(log_window, 0), tl.maximum(chunk - first, 0), 0)  # L at each position's chunk
    log_before = last * 0
    for j0 in range(first, last + 1, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        p, log_keep = _chunks(prob, chunk_start, j, j <= last)
        log_j = log_before + tl.cumsum(log_keep, 0)
        log_before += tl.sum(log_keep)
        visible = (j[None, :] <= chunk[:, None]) & (j[None, :] >= oldest[:, None])
        weight = p[None, :] * _decay(log_here[:, None] - log_j[None, :], visible)
        rows = tl.load(z + j.to(tl.int64)[:, None] * z_stride + c[None, :], mask=(j <= last)[:, None] & col, other=0.0)
        acc = weighted_sum(weight, to_dot(rows, DOT), acc, DOT, PRECISION)

    tl.store(out + at * D + c[None, :], acc, mask=(t < T)[:, None] & col)


@triton.jit
def _position_of(chunk_start, m, num_chunks, end):
    """Where chunk m begins; the end of the pack from num_chunks on"""
    inside = m < num_chunks
    return tl.load(chunk_start + m, mask=inside, other=0) + tl.where(inside, 0, end)


@jit
def _dechunk_bwd_kernel(
    dout, z, prob, chunk_start, chunk_index, cu_chunks, cu_seqlens, dz, dp_part, dc_part, dresidual,
    T, M, N, steps, dout_stride, z_stride,
    D: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, HALO: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Chunks m0 .. m1 - 1 are this program's own. Its columns j are those and the HALO chunks before; the positions it
    reads are theirs and those of the HALO chunks after, as far as the decay lets them be felt."""
    OWN: tl.constexpr = BLOCK_J - HALO
    pid_d = tl.program_id(1)
    c = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    col = (c < D)[None, :]
    num_chunks = tl.load(cu_chunks + N)
    end = tl.load(cu_seqlens + N)
    m0 = tl.program_id(0) * OWN
    m1 = m0 + OWN

    j = m0 - HALO + tl.arange(0, BLOCK_J)
    real = (j >= 0) & (j < num_chunks)
    p, log_keep_j = _chunks(prob, chunk_start, j, real)
    log_j = tl.cumsum(log_keep_j, 0)
    sequence = sequence_of(tl.maximum(j, 0), cu_chunks, N, steps)
    limit = tl.load(cu_chunks + sequence + 1, mask=real, other=0)  # first chunk of the next sequence, which j is not in
    window = m0 - HALO + tl.arange(0, WINDOW)
    _, log_keep = _chunks(prob, chunk_start, window, (window >= 0) & (window < num_chunks))
    log_window = tl.cumsum(log_keep, 0)
    log_own = tl.sum(tl.where(window < m1, log_keep, 0))
    felt = (window >= m1) & (window < tl.minimum(m1 + HALO, num_chunks)) & (log_window - log_own > -32.0 * FIXED)
    stop = tl.minimum(m1, num_chunks) + tl.sum(felt.to(tl.int32))
    t_begin = _position_of(chunk_start, m0, num_chunks, end)
    t_own = _position_of(chunk_start, m1, num_chunks, end)
    t_end = _position_of(chunk_start, stop, num_chunks, end)

    row = j.to(tl.int64)[:, None]
    zj = to_dot(tl.load(z + row * z_stride + c[None, :], mask=real[:, None] & col, other=0.0), DOT)
    g = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    for t0 in range(t_begin, t_end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        on = t < t_end
        chunk = tl.load(chunk_index + t, mask=on, other=-1)
        log_here = tl.gather(log_window, tl.maximum(chunk - (m0 - HALO), 0), 0)
        visible = (j[None, :] <= chunk[:, None]) & (limit[None, :] > chunk[:, None])
        decay = _decay(log_here[:, None] - log_j[None, :], visible)
        at = t.to(tl.int64)[:, None]
        d = tl.load(dout + at * dout_stride + c[None, :], mask=on[:, None] & col, other=0.0)
        if HAS_DRESIDUAL:
            tl.store(dresidual + at * D + c[None, :], d, mask=(t < t_own)[:, None] & col)
        d = to_dot(d, DOT)
        g = weighted_sum(tl.trans(decay), d, g, DOT, PRECISION)  # dP is fp32: a bf16 decay would show in it
        products = tl.dot(d, tl.trans(zj), input_precision=PRECISION)
        dc = tl.sum(decay * p[None, :] * products, 1)
        tl.store(dc_part + pid_d.to(tl.int64) * T + t, dc, mask=t < t_own)

    own = (j >= m0) & (j < M)
    tl.store(dz + row * D + c[None, :], g * p[:, None], mask=own[:, None] & col)

    # y_{m-1} of the own chunks: rows m, columns j < m of the same sequence
    visible = (j[None, :] < j[:, None]) & (limit[None, :] > j[:, None])
    weight = p[None, :] * _decay((log_j - log_keep_j)[:, None] - log_j[None, :], visible)
    previous = weighted_sum(weight, zj, tl.zeros((BLOCK_J, BLOCK_D), tl.float32), DOT, PRECISION)
    dp = tl.sum(g * (zj.to(tl.float32) - previous), 1)
    tl.store(dp_part + pid_d.to(tl.int64) * M + j, dp, mask=own & real)

    if HAS_DRESIDUAL:  # rows after the last sequence: each program zeroes its share
        share = tl.cdiv(T - end, tl.num_programs(0))
        pad = end + tl.program_id(0) * share
        pad_end = tl.minimum(pad + share, T)
        for t0 in range(pad, pad_end, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            zero = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
            tl.store(dresidual + t.to(tl.int64)[:, None] * D + c[None, :], zero, mask=(t < pad_end)[:, None] & col)


@jit
def _dechunk_bwd_reduce_kernel(
    prob, chunk_start, chunk_index, cu_seqlens, dp_part, dc_part, dprob, dselected, T, M, N, parts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    on = t < tl.minimum(T, tl.load(cu_seqlens + N))
    m = tl.load(chunk_index + t, mask=on, other=0)
    p = tl.load(prob + t, mask=on, other=0.0)
    starts = on & (tl.load(chunk_start + m, mask=on, other=-1) == t) & (p >= P_MIN) & (p <= P_MAX)
    dc = tl.zeros((BLOCK,), tl.float32)
    dp = tl.zeros((BLOCK,), tl.float32)
    zero = tl.program_id(0).to(tl.int64) * 0
    for i in range(parts):
        dc += tl.load(dc_part + (zero + i) * T + t, mask=on, other=0.0)
        dp += tl.load(dp_part + (zero + i) * M + m, mask=starts, other=0.0)
    tl.store(dselected + t, dc, mask=t < T)
    tl.store(dprob + t, dp, mask=t < T)


@jit
def _dechunk_step_kernel(
    z, prob, mask, state, residual, out, new_state, z_stride, residual_stride,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    on = c < D
    y = tl.load(state + b * D + c, mask=on, other=0.0)
    if tl.load(mask + b) != 0:
        p = _clamped(tl.load(prob + b))
        y = (1.0 - p) * y + p * tl.load(z + b * z_stride + c, mask=on, other=0.0).to(tl.float32)
    tl.store(new_state + b * D + c, y, mask=on)
    if HAS_RESIDUAL:
        y += tl.load(residual + b * residual_stride + c, mask=on, other=0.0).to(tl.float32)
    tl.store(out + b * D + c, y, mask=on)


# --- launches -----------------------------------------------------------------------------------------------------


def _plan(D, dtype, gpu, block_t, block_j, block_d, warps, stages, **more):
    return {
        "D": D, "HALO": 32 if dtype == torch.float32 else 16, "DOT": dot_dtype(dtype), "PRECISION": dot_precision(gpu),
        "BLOCK_T": block_t, "BLOCK_J": block_j, "BLOCK_D": block_columns(D, block_d), "WINDOW": 128, **more,
    }, {"num_warps": warps, "num_stages": stages}  # fmt: skip


def _fwd_plan(D, dtype, gpu):
    block_t = 32 if dtype == torch.float32 else 64
    return _plan(D, dtype, gpu, block_t, 32, 128, 4, 1, HAS_RESIDUAL=True)


def _bwd_plan(D, dtype, gpu):
    if dtype == torch.float32:
        return _plan(D, dtype, gpu, 16, 64, 32, 4, 2, HAS_DRESIDUAL=False)
    if gpu == "sm_90":
        return _plan(D, dtype, gpu, 64, 64, 128, 4, 1, HAS_DRESIDUAL=True)
    if gpu == "sm_100":  # asynchronous matrix products leave registers for a larger tile
        return _plan(D, dtype, gpu, 64, 64, 64, 8, 3, HAS_DRESIDUAL=True)
    return _plan(D, dtype, gpu, 32, 64, 64, 8 if gpu == "sm_80" else 4, 3, HAS_DRESIDUAL=True)


FWD = Kernel(
    _dechunk_fwd_kernel,
    {
        "z": "*T", "prob": "*fp32", "chunk_start": "*i32", "chunk_index": "*i32", "cu_chunks": "*i32",
        "cu_seqlens": "*i32", "residual": "*R", "out": "*T", "T": "i32", "N": "i32", "steps": "i32", "z_stride": "i32",
        "residual_stride": "i32",
    },
    _fwd_plan,
)  # fmt: skip
BWD = Kernel(
    _dechunk_bwd_kernel,
    {
        "dout": "*T", "z": "*T", "prob": "*fp32", "chunk_start": "*i32", "chunk_index": "*i32", "cu_chunks": "*i32",
        "cu_seqlens": "*i32", "dz": "*T", "dp_part": "*fp32", "dc_part": "*fp32",
        "dresidual": "*fp32", "T": "i32", "M": "i32", "N": "i32", "steps": "i32", "dout_stride": "i32",
        "z_stride": "i32",
    },
    _bwd_plan,
)  # fmt: skip
REDUCE = Kernel(
    _dechunk_bwd_reduce_kernel,
    {
        "prob": "*fp32", "chunk_start": "*i32", "chunk_index": "*i32", "cu_seqlens": "*i32", "dp_part": "*fp32",
        "dc_part": "*fp32", "dprob": "*fp32", "dselected": "*fp32", "T": "i32", "M": "i32", "N": "i32", "parts": "i32",
    },
    lambda D, dtype, gpu: ({"BLOCK": 512}, {"num_warps": 4}),
)  # fmt: skip
STEP = Kernel(
    _dechunk_step_kernel,
    {
        "z": "*T", "prob": "*fp32", "mask": "*u8", "state": "*fp32", "residual": "*R", "out": "*T",
        "new_state": "*fp32", "z_stride": "i32", "residual_stride": "i32",
    },
    lambda D, dtype, gpu: ({"D": D, "HAS_RESIDUAL": True, "BLOCK_D": block_columns(D, 1024)}, {"num_warps": 4}),
)  # fmt: skip
KERNELS = {"dechunk_fwd": FWD, "dechunk_bwd": BWD, "dechunk_bwd_reduce": REDUCE, "dechunk_step": STEP}


def dechunk(z, prob, selected, chunk_start, chunk_index, cu_chunks, cu_seqlens, residual):
    D, T, N = z.shape[1], prob.shape[0], cu_seqlens.shape[0] - 1
    z, residual = rows(z), rows(residual)
    prob, chunk_start, chunk_index, cu_chunks, cu_seqlens = dense(prob, chunk_start, chunk_index, cu_chunks, cu_seqlens)
    out = empty(z, T, D, dtype=z.dtype)
    planned = FWD.blocks(z, D)
    FWD.launch(
        (triton.cdiv(T, planned["BLOCK_T"]), triton.cdiv(D, planned["BLOCK_D"])),
        z, D, z, prob, chunk_start, chunk_index, cu_chunks, cu_seqlens, residual, out, T, N, search_steps(N), stride(z),
        stride(residual), HAS_RESIDUAL=residual is not None,
    )  # fmt: skip
    return out


def dechunk_bwd(dout, z, prob, chunk_start, chunk_index, cu_chunks, cu_seqlens, fp32_residual):
    (T, D), M, N = dout.shape, z.shape[0], cu_seqlens.shape[0] - 1
    dout, z = rows(dout), rows(z)
    prob, chunk_start, chunk_index, cu_chunks, cu_seqlens = dense(prob, chunk_start, chunk_index, cu_chunks, cu_seqlens)
    planned = BWD.blocks(z, D)
    parts = triton.cdiv(D, planned["BLOCK_D"])
    dz, dprob, dselected = empty(z, M, D, dtype=z.dtype), empty(z, T), empty(z, T)
    dresidual = empty(z, T, D) if fp32_residual else empty(z, 0)
    if T == 0 or M == 0:
        return dz.zero_(), dprob.zero_(), dselected.zero_(), dresidual.zero_()
    dp_part, dc_part = empty(z, parts, M), empty(z, parts, T)
    BWD.launch(
        (triton.cdiv(M, planned["BLOCK_J"] - planned["HALO"]), parts),
        z, D, dout, z, prob, chunk_start, chunk_index, cu_chunks, cu_seqlens, dz, dp_part, dc_part,
        dresidual if fp32_residual else None, T, M, N, search_steps(N), stride(dout), stride(z),
        HAS_DRESIDUAL=fp32_residual,
    )  # fmt: skip
    REDUCE.launch(
        (triton.cdiv(T, 512),), z, D, prob, chunk_start, chunk_index, cu_seqlens, dp_part, dc_part, dprob, dselected,
        T, M, N, parts,
    )  # fmt: skip
    return dz, dprob, dselected, dresidual


def dechunk_step(z, boundary_prob, boundary_mask, state, residual):
    B, D = z.shape
    z, residual = rows(z), rows(residual)
    boundary_prob, boundary_mask, state = dense(boundary_prob, boundary_mask, state)
    out, new_state = empty(z, B, D, dtype=z.dtype), empty(z, B, D)
    planned = STEP.blocks(z, D)
    STEP.launch(
        (B, triton.cdiv(D, planned["BLOCK_D"])), z, D, z, boundary_prob, boundary_mask, state, residual, out,
        new_state, stride(z), stride(residual), HAS_RESIDUAL=residual is not None,
    )  # fmt: skip
    return out, new_state
