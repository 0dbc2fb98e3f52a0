"""Dechunk on a GPU, at the speed of memory: whole rows, no matrix products, nothing of the size of T made on the way.

Forward: a program walks OWN chunks one after the other, y_m = (1 - P_m) y_{m-1} + P_m z_m in registers, and writes the
rows of each. Every boundary has P > 1/2, so y_{m-k} weighs less than 2^-k in y_m: it starts from zero up to 32 chunks
early, fewer where the decay is faster, exact to fp32 rounding of the largest input. Where there will be a backward it
keeps y (M, D) in fp32, and the backward needs neither z nor the EMA again:

1. one pass over dout, a program a chunk: s_m = sum of the rows of the chunk, dc_t = <dout_t, y_c>, the residual's
   gradient;
2. a walk over the chunks as in the forward, the other way: g_m = s_m + (1 - P_{m+1}) g_{m+1}, dz_m = P_m g_m,
   dP_m = <g_m, z_m - y_{m-1}> = <g_m, y_m - y_{m-1}> / P_m.

Blocks of SPLIT positions that lie inside one chunk have programs of their own, so that a long chunk keeps none busy for
long; in the backward they leave partial sums, which the walk adds in order. A sequence's first chunk takes nothing
over, not even times zero: what is not finite stays in its sequence.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .common import (
    SPLIT,
    Kernel,
    Plan,
    block_columns,
    cdiv,
    chunk_end,
    dense,
    empty,
    jit,
    outer_rows,
    rows,
    search_steps,
    sequence_of,
    stride,
)

P_MIN, P_MAX = tl.constexpr(1e-4), tl.constexpr(1 - 1e-4)
HALO = tl.constexpr(32)


@triton.jit
def _clamped(p):
    return tl.where(p < P_MIN, P_MIN, tl.where(p > P_MAX, P_MAX, p))


@triton.jit
def _log_keep(prob, chunk_start, m, on):
    """log2(1 - P) of chunks m, 0 where not `on`"""
    start = tl.load(chunk_start + m, mask=on, other=0)
    return tl.where(on, tl.log2(1.0 - _clamped(tl.load(prob + start, mask=on, other=0.5))), 0.0)


@jit
def _dechunk_fwd_kernel(
    z, prob, chunk_start, chunk_index, cu_chunks, cu_seqlens, residual, out, y, T, M, N, steps, z_stride,
    residual_stride,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_Y: tl.constexpr, SPLIT: tl.constexpr, OWN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The first cdiv(M, OWN) programs have OWN chunks each, the others a block of SPLIT positions."""
    pid = tl.program_id(0)
    groups = tl.cdiv(M, OWN)
    c = tl.arange(0, BLOCK_D)
    col = c < D
    lanes = tl.arange(0, BLOCK)
    pack_end = tl.load(cu_seqlens + N)
    num_chunks = tl.load(cu_chunks + N)
    m0 = pid * OWN
    m1 = tl.minimum(m0 + OWN, num_chunks)
    t0 = (pid - groups) * SPLIT
    if pid >= groups:
        m1 = m0  # nothing, unless the block lies inside a chunk
        if t0 + SPLIT <= pack_end:
            m0 = tl.load(chunk_index + t0)
            m1 = m0 + (m0 == tl.load(chunk_index + t0 + SPLIT - 1)).to(tl.int32)

    if m0 < m1:
        before = m0 - HALO + tl.arange(0, HALO)  # of these chunks, those that are felt in the first of this program's
        decay = tl.cumsum(_log_keep(prob, chunk_start, before, before >= 0), 0, reverse=True)
        m_begin = m0 - tl.sum(((before >= 0) & (decay > -HALO)).to(tl.int32))
        sequence = sequence_of(m_begin, cu_chunks, N, steps)
        next_sequence = tl.load(cu_chunks + sequence + 1)
        state = tl.zeros((BLOCK_D,), tl.float32)
        begin = tl.load(chunk_start + m_begin)
        p = _clamped(tl.load(prob + begin))
        row = tl.load(z + m_begin.to(tl.int64) * z_stride + c, mask=col, other=0.0)
        m = m_begin
        for _ in range(m1 - m_begin):
            end = chunk_end(chunk_start, m, num_chunks, pack_end)
            more = m + 1 < m1  # what the next chunk needs is on its way while this one's rows are written
            next_p = _clamped(tl.load(prob + end, mask=more, other=0.5))
            next_row = tl.load(z + (m + 1).to(tl.int64) * z_stride + c, mask=col & more, other=0.0)
            state = p * row.to(tl.float32) + tl.where(m == next_sequence, 0.0, (1.0 - p) * state)
            while next_sequence <= m:
                sequence += 1
                next_sequence = tl.load(cu_chunks + sequence + 1)
            if m >= m0:
                first = begin
                head_end, tail = outer_rows(begin, end, SPLIT)
                count = head_end - begin + end - tail
                if pid >= groups:
                    first = t0
                    head_end = t0 + SPLIT
                    count = head_end - first
                elif HAS_Y:
                    tl.store(y + m.to(tl.int64) * D + c, state, mask=col)
                for i in range(0, count, BLOCK):
                    at = first + i + lanes
                    t = tl.where(at < head_end, at, at - head_end + tail).to(tl.int64)[:, None]
                    on = (i + lanes < count)[:, None] & col[None, :]
                    v = tl.zeros((BLOCK, BLOCK_D), tl.float32) + state[None, :]
                    if HAS_RESIDUAL:
                        r = tl.load(residual + t * residual_stride + c[None, :], mask=on, other=0.0)
                        v += r.to(tl.float32)
                    tl.store(out + t * D + c[None, :], v, mask=on)
            begin, p, row = end, next_p, next_row
            m += 1

    if pid >= groups:
        for i in range(tl.maximum(t0, pack_end), tl.minimum(t0 + SPLIT, T), BLOCK):
            t = i + lanes
            on = (t < tl.minimum(t0 + SPLIT, T))[:, None] & col[None, :]
            tl.store(out + t.to(tl.int64)[:, None] * D + c[None, :], tl.zeros((BLOCK, BLOCK_D), tl.float32), mask=on)


@jit
def _dechunk_bwd_rows_kernel(
    dout, y, chunk_start, chunk_index, cu_chunks, cu_seqlens, sums, dprob, dselected, dresidual, T, M, N, dout_stride,
    D: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs 0 .. M - 1 have a chunk each, the others a block of SPLIT positions; row i of `sums` is program i's.

    Zeroes dprob wherever no chunk starts, and all outputs past the last sequence.
    """
    pid = tl.program_id(0)
    c = tl.arange(0, BLOCK_D)
    col = (c < D)[None, :]
    lanes = tl.arange(0, BLOCK)
    pack_end = tl.load(cu_seqlens + N)
    num_chunks = tl.load(cu_chunks + N)
    m = pid * 1
    mine = False
    if pid < M:
        begin = tl.load(chunk_start + m)
        end = begin
        if m < num_chunks:
            end = chunk_end(chunk_start, m, num_chunks, pack_end)
        head_end, tail = outer_rows(begin, end, SPLIT)
        count = head_end - begin + end - tail  # 0 for a chunk made of whole blocks: its sum is 0 so far
        mine = m < num_chunks
    else:
        begin = (pid - M) * SPLIT
        head_end = begin + SPLIT
        tail = head_end
        count = tail - begin
        if head_end <= pack_end:
            m = tl.load(chunk_index + begin)
            mine = m == tl.load(chunk_index + head_end - 1)

    if mine:
        row = tl.load(y + m.to(tl.int64) * D + c, mask=c < D, other=0.0)
        start = tl.load(chunk_start + m)
        acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for i in range(0, count, BLOCK):
            at = begin + i + lanes
            t = tl.where(at < head_end, at, at - head_end + tail)
            on = i + lanes < count
            d = tl.load(dout + t.to(tl.int64)[:, None] * dout_stride + c[None, :], mask=on[:, None] & col, other=0.0)
            if HAS_DRESIDUAL:
                tl.store(dresidual + t.to(tl.int64)[:, None] * D + c[None, :], d, mask=on[:, None] & col)
            d = d.to(tl.float32)
            acc += d
            tl.store(dselected + t, tl.sum(d * row[None, :], 1), mask=on)
            tl.store(dprob + t, tl.zeros((BLOCK,), tl.float32), mask=on & (t != start))
        tl.store(sums + pid.to(tl.int64) * D + c, tl.sum(acc, 0), mask=c < D)

    if pid >= M:
        for i in range(tl.maximum(begin, pack_end), tl.minimum(begin + SPLIT, T), BLOCK):
            t = i + lanes
            on = t < tl.minimum(begin + SPLIT, T)
            tl.store(dselected + t, tl.zeros((BLOCK,), tl.float32), mask=on)
            tl.store(dprob + t, tl.zeros((BLOCK,), tl.float32), mask=on)
            if HAS_DRESIDUAL:
                zero = tl.zeros((BLOCK, BLOCK_D), tl.float32)
                tl.store(dresidual + t.to(tl.int64)[:, None] * D + c[None, :], zero, mask=on[:, None] & col)


@triton.jit
def _with_partial_sums(
    sums, s, begin, end, M, c, D: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """s, the sum of a chunk's outer rows, and what the blocks inside it have left, in their order"""
    b0 = tl.cdiv(begin, SPLIT)
    b1 = end // SPLIT
    if b0 < b1:
        total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for i in range(b0, b1, BLOCK):
            b = i + tl.arange(0, BLOCK)
            at = (M + b).to(tl.int64)[:, None] * D + c[None, :]
            total += tl.load(sums + at, mask=(b < b1)[:, None] & (c < D)[None, :], other=0.0)
        s += tl.sum(total, 0)
    return s


@jit
def _dechunk_bwd_chunks_kernel(
    y, sums, prob, chunk_start, cu_chunks, cu_seqlens, dz, dprob, M, N, steps,
    D: tl.constexpr, SPLIT: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """OWN chunks a program, last to first. next_p is P of chunk m + 1, g its gradient."""
    c = tl.arange(0, BLOCK_D)
    col = c < D
    pack_end = tl.load(cu_seqlens + N)
    num_chunks = tl.load(cu_chunks + N)
    m0 = tl.program_id(0) * OWN
    m1 = tl.minimum(m0 + OWN, num_chunks)
    if m0 < m1:
        after = m1 + tl.arange(0, HALO)  # of these chunks, those in which the last of this program's is felt
        decay = tl.cumsum(_log_keep(prob, chunk_start, after, after < num_chunks), 0)
        m_end = m1 + tl.sum(((after < num_chunks) & (decay > -HALO)).to(tl.int32))
        sequence = sequence_of(m_end - 1, cu_chunks, N, steps)
        first = tl.load(cu_chunks + sequence)  # first chunk of the sequence of chunk m
        g = tl.zeros((BLOCK_D,), tl.float32)
        next_p = (m_end * 0).to(tl.float32) + 1.0
        end = chunk_end(chunk_start, m_end - 1, num_chunks, pack_end)
        s = tl.load(sums + (m_end - 1).to(tl.int64) * D + c, mask=col, other=0.0)
        here = tl.load(y + (m_end - 1).to(tl.int64) * D + c, mask=col, other=0.0)
        for i in range(m_end - m0):
            m = m_end - 1 - i
            at = m.to(tl.int64) * D
            more = m > m0
            begin = tl.load(chunk_start + m)
            probability = tl.load(prob + begin)
            next_s = tl.load(sums + at - D + c, mask=col & more, other=0.0)
            before = tl.load(y + at - D + c, mask=col & (m > first), other=0.0)
            p = _clamped(probability)
            s = _with_partial_sums(sums, s, begin, end, M, c, D, SPLIT, BLOCK, BLOCK_D)
            g = s + tl.where(next_p < 1.0, (1.0 - next_p) * g, 0.0)
            if m < m1:
                tl.store(dz + at + c, g * p, mask=col)
                dp = tl.sum(tl.where(col, g * (here - before), 0.0)) / p
                tl.store(dprob + begin, tl.where((probability >= P_MIN) & (probability <= P_MAX), dp, 0.0))
            next_p = p
            here = before
            if m == first:  # nothing comes back from another sequence
                next_p = next_p * 0.0 + 1.0
                if more:
                    sequence = sequence_of(m - 1, cu_chunks, N, steps)
                    first = tl.load(cu_chunks + sequence)
                    here = tl.load(y + at - D + c, mask=col, other=0.0)
            s = next_s
            end = begin
    for m in range(tl.maximum(m0, num_chunks), tl.minimum(m0 + OWN, M)):
        tl.store(dz + (m0 - m0 + m).to(tl.int64) * D + c, tl.zeros((BLOCK_D,), tl.float32), mask=col)


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


def _plan(most_rows: int, warp_columns: int, **constexprs: Any) -> Plan:
    """Tiles of whole rows, as many as make 4096 elements."""

    def plan(D, dtype, gpu):
        columns = block_columns(D, 1 << 20)
        block = max(1, min(most_rows, 4096 // columns))
        warps = max(1, min(16, columns // warp_columns))
        return {"D": D, **constexprs, "SPLIT": SPLIT, "BLOCK": block, "BLOCK_D": columns}, {"num_warps": warps}

    return plan


FWD = Kernel(
    _dechunk_fwd_kernel,
    {
        "z": "*T", "prob": "*fp32", "chunk_start": "*i32", "chunk_index": "*i32", "cu_chunks": "*i32",
        "cu_seqlens": "*i32", "residual": "*R", "out": "*T", "y": "*fp32", "T": "i32", "M": "i32", "N": "i32",
        "steps": "i32", "z_stride": "i32", "residual_stride": "i32",
    },
    _plan(4, 256, HAS_RESIDUAL=True, HAS_Y=True, OWN=8),
)  # fmt: skip
BWD_ROWS = Kernel(
    _dechunk_bwd_rows_kernel,
    {
        "dout": "*T", "y": "*fp32", "chunk_start": "*i32", "chunk_index": "*i32", "cu_chunks": "*i32",
        "cu_seqlens": "*i32", "sums": "*fp32", "dprob": "*fp32", "dselected": "*fp32", "dresidual": "*R", "T": "i32",
        "M": "i32", "N": "i32", "dout_stride": "i32",
    },
    _plan(4, 256, HAS_DRESIDUAL=True),
)  # fmt: skip
BWD_CHUNKS = Kernel(
    _dechunk_bwd_chunks_kernel,
    {
        "y": "*fp32", "sums": "*fp32", "prob": "*fp32", "chunk_start": "*i32", "cu_chunks": "*i32",
        "cu_seqlens": "*i32", "dz": "*T", "dprob": "*fp32", "M": "i32", "N": "i32", "steps": "i32",
    },
    _plan(2, 256, OWN=16),
)  # fmt: skip
STEP = Kernel(
    _dechunk_step_kernel,
    {
        "z": "*T", "prob": "*fp32", "mask": "*u8", "state": "*fp32", "residual": "*R", "out": "*T",
        "new_state": "*fp32", "z_stride": "i32", "residual_stride": "i32",
    },
    lambda D, dtype, gpu: ({"D": D, "HAS_RESIDUAL": True, "BLOCK_D": block_columns(D, 1024)}, {"num_warps": 4}),
)  # fmt: skip
KERNELS = {
    "dechunk_fwd": FWD,
    "dechunk_bwd_rows": BWD_ROWS,
    "dechunk_bwd_chunks": BWD_CHUNKS,
    "dechunk_step": STEP,
}


def dechunk(z, prob, selected, chunk_start, chunk_index, cu_chunks, cu_seqlens, residual, keep):
    (M, D), T, N = z.shape, prob.shape[0], cu_seqlens.shape[0] - 1
    z, residual = rows(z), rows(residual)
    prob, chunk_start, chunk_index, cu_chunks, cu_seqlens = dense(prob, chunk_start, chunk_index, cu_chunks, cu_seqlens)
    out, y = empty(z, T, D, dtype=z.dtype), empty(z, *((M, D) if keep else (0,)))
    FWD.launch(
        (cdiv(M, FWD.blocks(z, D)["OWN"]) + cdiv(T, SPLIT),), z, D, z, prob, chunk_start, chunk_index,
        cu_chunks, cu_seqlens, residual, out, y if keep else None, T, M, N, search_steps(N), stride(z),
        stride(residual), HAS_RESIDUAL=residual is not None, HAS_Y=keep,
    )  # fmt: skip
    return out, y


def dechunk_bwd(dout, y, prob, chunk_start, chunk_index, cu_chunks, cu_seqlens, residual_dtype):
    (T, D), M, N = dout.shape, y.shape[0], cu_seqlens.shape[0] - 1
    dout = rows(dout)
    prob, chunk_start, chunk_index, cu_chunks, cu_seqlens = dense(prob, chunk_start, chunk_index, cu_chunks, cu_seqlens)
    dz, dprob, dselected = empty(dout, M, D, dtype=dout.dtype), empty(dout, T), empty(dout, T)
    dresidual = empty(dout, 0) if residual_dtype is None else empty(dout, T, D, dtype=residual_dtype)
    if T == 0 or M == 0:
        return dz.zero_(), dprob.zero_(), dselected.zero_(), dresidual.zero_()
    programs = M + cdiv(T, SPLIT)
    sums = empty(dout, programs, D)
    BWD_ROWS.launch(
        (programs,), dout, D, dout, y, chunk_start, chunk_index, cu_chunks, cu_seqlens, sums, dprob, dselected,
        None if residual_dtype is None else dresidual, T, M, N, stride(dout), HAS_DRESIDUAL=residual_dtype is not None,
    )  # fmt: skip
    BWD_CHUNKS.launch(
        (cdiv(M, BWD_CHUNKS.blocks(dout, D)["OWN"]),), dout, D, y, sums, prob, chunk_start, cu_chunks,
        cu_seqlens, dz, dprob, M, N, search_steps(N),
    )  # fmt: skip
    return dz, dprob, dselected, dresidual


def dechunk_step(z, boundary_prob, boundary_mask, state, residual):
    B, D = z.shape
    z, residual = rows(z), rows(residual)
    boundary_prob, boundary_mask, state = dense(boundary_prob, boundary_mask, state)
    out, new_state = empty(z, B, D, dtype=z.dtype), empty(z, B, D)
    planned = STEP.blocks(z, D)
    STEP.launch(
        (B, cdiv(D, planned["BLOCK_D"])), z, D, z, boundary_prob, boundary_mask, state, residual, out,
        new_state, stride(z), stride(residual), HAS_RESIDUAL=residual is not None,
    )  # fmt: skip
    return out, new_state
