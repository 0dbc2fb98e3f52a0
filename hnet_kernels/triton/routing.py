"""Routing on a GPU.

1. `_route_fwd_kernel` reads q and k once: probability, boundary code, the numbers the backward needs, and the number of
   boundaries and sum of probabilities of each block of ROUTE_BLOCK positions.
2. With a budget, `_select_kernel` finds the probability below which boundaries are dropped (it only looks if there are
   too many).
3. `_compact_kernel` turns codes into mask, selected probability, chunk layout and the sum of probabilities of every
   sequence. A block finds its offset by adding up the block counts before it, so no block waits for another.

Nothing is read back by the host unless chunk_start must have exactly as many rows as there are chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import Kernel, block_columns, dense, empty, jit, rows, search_steps, sequence_of, stride

ROUTE_BLOCK = 8  # positions of a block of the forward
COMPACT_BLOCK = 2048
ORDINARY, FIRST = tl.constexpr(1), tl.constexpr(2)  # codes: 0 is no boundary
HALF = tl.constexpr(0x3F000000)  # bits of 0.5: boundaries have 1 .. 2^23 above it


@triton.jit
def _probability(q_sum, k_sum, dot, bias, HAS_BIAS: tl.constexpr):
    """p, cos and the inverse norms, from three row sums. Rounded as in IEEE 754; Triton's sqrt and / are not."""
    inv_q = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(q_sum), 1e-12))
    inv_k = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(k_sum), 1e-12))
    cos = dot * inv_q * inv_k
    p = (1.0 - cos) * 0.5
    p = tl.where(p < 0.0, 0.0, tl.where(p > 1.0, 1.0, p))  # keeps NaN
    if HAS_BIAS:
        scale = tl.exp(tl.load(bias))
        p = tl.div_rn(p * scale, 1.0 - p + p * scale)
    return p, cos, inv_q, inv_k


@triton.jit
def _row_sums(q, k, q_row, k_row, wanted, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """|q|^2, |k|^2 and q.k of BLOCK pairs of rows"""
    qq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    kk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    qk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        c = d + tl.arange(0, BLOCK_D)
        m = wanted[:, None] & (c < D)[None, :]
        a = tl.load(q + q_row[:, None] + c[None, :], mask=m, other=0.0).to(tl.float32)
        b = tl.load(k + k_row[:, None] + c[None, :], mask=m, other=0.0).to(tl.float32)
        qq += a * a
        kk += b * b
        qk += a * b
    return tl.sum(qq, 1), tl.sum(kk, 1), tl.sum(qk, 1)


@jit
def _route_fwd_kernel(
    q, k, cu_seqlens, candidates, bias, prob, cos_out, inv_q_out, inv_k_out, code_out, block_count, block_sum,
    T, N, steps, q_stride, k_stride,
    D: tl.constexpr, HAS_CANDIDATES: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    t = pid * BLOCK + tl.arange(0, BLOCK)
    on = t < T
    seq = sequence_of(t, cu_seqlens, N, steps)
    inside = on & (seq < N)
    first = inside & (t == tl.load(cu_seqlens + seq))
    pair = inside & (t != tl.load(cu_seqlens + seq))
    row = t.to(tl.int64)
    qq, kk, qk = _row_sums(q, k, (row - 1) * q_stride, row * k_stride, pair, D, BLOCK, BLOCK_D)
    p, cos, inv_q, inv_k = _probability(qq, kk, qk, bias, HAS_BIAS)
    p = tl.where(first, 1.0, tl.where(pair, p, 0.0))
    boundary = pair & (p > 0.5)
    if HAS_CANDIDATES:
        boundary = boundary & (tl.load(candidates + t, mask=on, other=0) != 0)
    code = tl.where(first, FIRST, tl.where(boundary, ORDINARY, 0))
    tl.store(prob + t, p, mask=on)
    tl.store(cos_out + t, tl.where(pair, cos, 0.0), mask=on)
    tl.store(inv_q_out + t, tl.where(pair, inv_q, 0.0), mask=on)
    tl.store(inv_k_out + t, tl.where(pair, inv_k, 0.0), mask=on)
    tl.store(code_out + t, code.to(tl.int8), mask=on)
    tl.store(block_count + pid, tl.sum((code > 0).to(tl.int32)))
    tl.store(block_sum + pid, tl.sum(p))


@triton.jit
def _rank_from_the_top(histogram, wanted, BINS: tl.constexpr):
    """The largest bin b with at least `wanted` entries in bins >= b, and how many lie above b."""
    from_here = tl.cumsum(histogram, 0, reverse=True)
    bins = tl.arange(0, BINS)
    b = tl.max(tl.where(from_here >= wanted, bins, 0))
    above = tl.sum(tl.where(bins > b, histogram, 0))
    return b, above


@jit
def _select_kernel(
    prob, code, cu_seqlens, block_count, selection, num_dropped, T, N, num_blocks, budget, BLOCK: tl.constexpr,
):  # fmt: skip
    """selection <- [threshold, ties to keep, boundaries in all]. Keys are the 24 bits of p above one half.

    Keeps the keys above the threshold and the first of those equal to it. Three histograms, of 8 bits each, find it;
    with no more boundaries than the budget the threshold is 0, which keeps all.
    """
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK,), tl.int32)
    for i in range(0, num_blocks, BLOCK):
        counts += tl.load(block_count + i + lanes, mask=i + lanes < num_blocks, other=0)
    total = tl.sum(counts)
    threshold = total * 0
    ties = total * 0
    if total > budget:
        firsts = tl.zeros((BLOCK,), tl.int32)
        for i in range(0, N, BLOCK):
            n = i + lanes
            begin = tl.load(cu_seqlens + n, mask=n < N, other=0)
            firsts += (tl.load(cu_seqlens + n + 1, mask=n < N, other=0) > begin).to(tl.int32)
        keep = budget - tl.sum(firsts)
        wanted = keep
        for digit in tl.static_range(3):
            histogram = tl.zeros((256,), tl.int32)
            for i in range(0, T, BLOCK):
                at = i + lanes
                c = tl.load(code + at, mask=at < T, other=0)
                key = tl.load(prob + at, mask=at < T, other=0.0).to(tl.int32, bitcast=True) - HALF
                mine = (c == ORDINARY) & ((key >> (24 - 8 * digit)) == threshold)
                histogram += tl.histogram((key >> (16 - 8 * digit)) & 255, 256, mask=mine)
            b, above = _rank_from_the_top(histogram, wanted, 256)
            wanted -= above
            threshold = threshold * 256 + b
        ties = wanted
        if keep <= 0:  # the budget holds first positions only
            threshold = threshold * 0 + 0x7FFFFFFF
            ties = ties * 0
    tl.store(selection, threshold)
    tl.store(selection + 1, ties)
    tl.store(selection + 2, total)
    tl.store(num_dropped, tl.maximum(total - budget, 0))


@triton.jit
def _kept_and_tied(prob, code, at, wanted, threshold):
    """Of positions `at`: kept for sure, and kept only while there is room among equals."""
    c = tl.load(code + at, mask=wanted, other=0)
    key = tl.load(prob + at, mask=wanted, other=0.0).to(tl.int32, bitcast=True) - HALF
    sure = (c == FIRST) | ((c == ORDINARY) & (key > threshold))
    tied = (c == ORDINARY) & (key == threshold)
    return sure.to(tl.int32), tied.to(tl.int32)


@triton.jit
def _count_before(
    prob, code, block_count, end, threshold, ties, overflow, ROUTE_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Chunks before position `end`, and how many equals of the threshold lie before it."""
    kept = tl.zeros((BLOCK,), tl.int32)
    tied = tl.zeros((BLOCK,), tl.int32)
    if overflow:  # rare: the block counts are of no use once boundaries are dropped
        for i in range(0, end, BLOCK):
            at = i + tl.arange(0, BLOCK)
            k, e = _kept_and_tied(prob, code, at, at < end, threshold)
            kept += k
            tied += e
    else:
        blocks = end // ROUTE_BLOCK
        for i in range(0, blocks, BLOCK):
            at = i + tl.arange(0, BLOCK)
            kept += tl.load(block_count + at, mask=at < blocks, other=0)
        at = blocks * ROUTE_BLOCK + tl.arange(0, BLOCK)
        kept += (tl.load(code + at, mask=at < end, other=0) > 0).to(tl.int32)
    tied_before = tl.sum(tied)
    return tl.sum(kept) + tl.minimum(tied_before, ties), tied_before


@jit
def _compact_kernel(
    prob, code, cu_seqlens, block_count, block_sum, selection,
    mask_out, selected_out, chunk_index, chunk_start, cu_chunks, prob_sum, num_dropped,
    T, N, num_blocks, budget,
    HAS_BUDGET: tl.constexpr, ROUTE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    compact_blocks = tl.cdiv(tl.maximum(T, budget), BLOCK)
    threshold = T * 0
    ties = T * 0
    overflow = T < 0
    total = T * 0
    if HAS_BUDGET:
        threshold = tl.load(selection)
        ties = tl.load(selection + 1)
        total = tl.load(selection + 2)
        overflow = total > budget
    if pid < compact_blocks:
        begin = tl.minimum(pid * BLOCK, T)
        base, tied_before = _count_before(prob, code, block_count, begin, threshold, ties, overflow, ROUTE_BLOCK, BLOCK)
        t = pid * BLOCK + tl.arange(0, BLOCK)
        on = t < T
        kept, tied = _kept_and_tied(prob, code, t, on, threshold)
        kept += tied * ((tied_before + tl.cumsum(tied, 0)) <= ties).to(tl.int32)
        index = base + tl.cumsum(kept, 0) - 1
        p = tl.load(prob + t, mask=on, other=0.0)
        tl.store(mask_out + t, kept.to(tl.int8), mask=on)
        tl.store(selected_out + t, tl.where(kept != 0, p, 1.0 - p), mask=on)
        tl.store(chunk_index + t, index, mask=on)
        tl.store(chunk_start + index, t, mask=on & (kept != 0))
        if HAS_BUDGET:  # rows no chunk fills
            tl.store(chunk_start + t, tl.load(cu_seqlens + N), mask=(t < budget) & (t >= tl.minimum(total, budget)))
    else:
        n = pid - compact_blocks  # 0 .. N: the edge before sequence n
        edge = tl.load(cu_seqlens + n)
        before, _ = _count_before(prob, code, block_count, edge, threshold, ties, overflow, ROUTE_BLOCK, BLOCK)
        tl.store(cu_chunks + n, before)
        if not HAS_BUDGET:
            tl.store(num_dropped, 0, mask=n == N)
        if n < N:  # whole blocks by their sums, the ragged ends position by position
            end = tl.load(cu_seqlens + n + 1)
            first_block = tl.cdiv(edge, ROUTE_BLOCK)
            last_block = tl.maximum(end // ROUTE_BLOCK, first_block)
            lanes = tl.arange(0, BLOCK)
            acc = tl.zeros((BLOCK,), tl.float32)
            for i in range(first_block, last_block, BLOCK):
                acc += tl.load(block_sum + i + lanes, mask=i + lanes < last_block, other=0.0)
            head = edge + lanes
            acc += tl.load(prob + head, mask=head < tl.minimum(first_block * ROUTE_BLOCK, end), other=0.0)
            tail = last_block * ROUTE_BLOCK + lanes
            acc += tl.load(prob + tail, mask=tail < end, other=0.0)
            tl.store(prob_sum + n, tl.sum(acc))


@jit
def _route_bwd_kernel(
    q, k, cu_seqlens, bias, mask, cos_in, inv_q_in, inv_k_in, dprob, dselected, dprob_sum, dq, dk, dbias,
    T, N, steps, q_stride, k_stride,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DPROB: tl.constexpr, HAS_DSELECTED: tl.constexpr,
    HAS_DSUM: tl.constexpr, HAS_DBIAS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pair t writes dq_{t-1} and dk_t; t runs to T, whose pair closes dq."""
    pid = tl.program_id(0)
    t = pid * BLOCK + tl.arange(0, BLOCK)
    on = t < T
    seq = sequence_of(t, cu_seqlens, N, steps)
    pair = on & (seq < N) & (t != tl.load(cu_seqlens + seq))
    g = tl.zeros((BLOCK,), tl.float32)
    if HAS_DPROB:
        g += tl.load(dprob + t, mask=pair, other=0.0)
    if HAS_DSELECTED:
        d = tl.load(dselected + t, mask=pair, other=0.0)
        g += tl.where(tl.load(mask + t, mask=pair, other=0) != 0, d, -d)
    if HAS_DSUM:
        g += tl.load(dprob_sum + seq, mask=pair, other=0.0)
    cos = tl.load(cos_in + t, mask=pair, other=0.0)
    inv_q = tl.load(inv_q_in + t, mask=pair, other=0.0)
    inv_k = tl.load(inv_k_in + t, mask=pair, other=0.0)
    raw = (1.0 - cos) * 0.5
    if HAS_BIAS:
        scale = tl.exp(tl.load(bias))
        p = tl.where(raw < 0.0, 0.0, tl.where(raw > 1.0, 1.0, raw))
        slope = scale / ((1.0 - p + p * scale) * (1.0 - p + p * scale))
        if HAS_DBIAS:
            tl.store(dbias + pid, tl.sum(tl.where(pair, g * p * (1.0 - p) * slope, 0.0)))
        g = g * slope
    g = tl.where((raw < 0.0) | (raw > 1.0), 0.0, -0.5 * g)  # d loss / d cos
    cross = g * inv_q * inv_k
    own_q = tl.where(inv_q < 1e12, -g * cos * inv_q * inv_q, 0.0)  # a norm at the floor is a constant
    own_k = tl.where(inv_k < 1e12, -g * cos * inv_k * inv_k, 0.0)
    row = t.to(tl.int64)
    for d in range(0, D, BLOCK_D):
        c = d + tl.arange(0, BLOCK_D)
        col = (c < D)[None, :]
        m = pair[:, None] & col
        a = tl.load(q + (row - 1)[:, None] * q_stride + c[None, :], mask=m, other=0.0).to(tl.float32)
        b = tl.load(k + row[:, None] * k_stride + c[None, :], mask=m, other=0.0).to(tl.float32)
        da = cross[:, None] * b + own_q[:, None] * a
        db = cross[:, None] * a + own_k[:, None] * b
        tl.store(dq + (row - 1)[:, None] * D + c[None, :], da, mask=((t > 0) & (t <= T))[:, None] & col)
        tl.store(dk + row[:, None] * D + c[None, :], db, mask=on[:, None] & col)


@jit
def _route_step_kernel(
    q, k, is_first, candidates, bias, prob, mask, selected, B, q_stride, k_stride,
    D: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_CANDIDATES: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The tile and warps are those of the forward, so the sums are added in its order: the same bits."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    on = b < B
    row = b.to(tl.int64)
    qq, kk, qk = _row_sums(q, k, row * q_stride, row * k_stride, on, D, BLOCK, BLOCK_D)
    p, _, _, _ = _probability(qq, kk, qk, bias, HAS_BIAS)
    boundary = p > 0.5
    if HAS_CANDIDATES:
        boundary = boundary & (tl.load(candidates + b, mask=on, other=0) != 0)
    if HAS_FIRST:
        first = tl.load(is_first + b, mask=on, other=0) != 0
        p = tl.where(first, 1.0, p)
        boundary = boundary | first
    tl.store(prob + b, p, mask=on)
    tl.store(mask + b, boundary.to(tl.int8), mask=on)
    tl.store(selected + b, tl.where(boundary, p, 1.0 - p), mask=on)


# --- launches -----------------------------------------------------------------------------------------------------


def _row_plan(**flags):
    return lambda D, dtype, gpu: (
        {"D": D, "BLOCK": ROUTE_BLOCK, "BLOCK_D": block_columns(D, 256), **flags}, {"num_warps": 4}
    )  # fmt: skip


ROUTE_FWD = Kernel(
    _route_fwd_kernel,
    {
        "q": "*T", "k": "*T", "cu_seqlens": "*i32", "candidates": "*u8", "bias": "*fp32", "prob": "*fp32",
        "cos_out": "*fp32", "inv_q_out": "*fp32", "inv_k_out": "*fp32", "code_out": "*i8", "block_count": "*i32",
        "block_sum": "*fp32", "T": "i32", "N": "i32", "steps": "i32", "q_stride": "i32", "k_stride": "i32",
    },
    _row_plan(HAS_CANDIDATES=False, HAS_BIAS=False),
)  # fmt: skip
SELECT = Kernel(
    _select_kernel,
    {
        "prob": "*fp32", "code": "*i8", "cu_seqlens": "*i32", "block_count": "*i32", "selection": "*i32",
        "num_dropped": "*i32", "T": "i32", "N": "i32", "num_blocks": "i32", "budget": "i32",
    },
    lambda D, dtype, gpu: ({"BLOCK": 4096}, {"num_warps": 8 if gpu == "gfx942" else 16}),
)  # fmt: skip
COMPACT = Kernel(
    _compact_kernel,
    {
        "prob": "*fp32", "code": "*i8", "cu_seqlens": "*i32", "block_count": "*i32", "block_sum": "*fp32",
        "selection": "*i32", "mask_out": "*u8", "selected_out": "*fp32", "chunk_index": "*i32", "chunk_start": "*i32",
        "cu_chunks": "*i32", "prob_sum": "*fp32", "num_dropped": "*i32", "T": "i32", "N": "i32", "num_blocks": "i32",
        "budget": "i32",
    },
    lambda D, dtype, gpu: (
        {"HAS_BUDGET": True, "ROUTE_BLOCK": ROUTE_BLOCK, "BLOCK": COMPACT_BLOCK}, {"num_warps": 8}
    ),
)  # fmt: skip
ROUTE_BWD = Kernel(
    _route_bwd_kernel,
    {
        "q": "*T", "k": "*T", "cu_seqlens": "*i32", "bias": "*fp32", "mask": "*u8", "cos_in": "*fp32",
        "inv_q_in": "*fp32", "inv_k_in": "*fp32", "dprob": "*fp32", "dselected": "*fp32", "dprob_sum": "*fp32",
        "dq": "*T", "dk": "*T", "dbias": "*fp32", "T": "i32", "N": "i32", "steps": "i32", "q_stride": "i32",
        "k_stride": "i32",
    },
    _row_plan(HAS_BIAS=False, HAS_DBIAS=False, HAS_DPROB=True, HAS_DSELECTED=True, HAS_DSUM=True),
)  # fmt: skip
ROUTE_STEP = Kernel(
    _route_step_kernel,
    {
        "q": "*T", "k": "*T", "is_first": "*u8", "candidates": "*u8", "bias": "*fp32", "prob": "*fp32", "mask": "*u8",
        "selected": "*fp32", "B": "i32", "q_stride": "i32", "k_stride": "i32",
    },
    _row_plan(HAS_FIRST=True, HAS_CANDIDATES=False, HAS_BIAS=False),
)  # fmt: skip
KERNELS = {
    "route_fwd": ROUTE_FWD,
    "route_select": SELECT,
    "route_compact": COMPACT,
    "route_bwd": ROUTE_BWD,
    "route_step": ROUTE_STEP,
}


def route(q, k, cu_seqlens, logit_bias, candidates, max_chunks, padded):
    (T, D), N = q.shape, cu_seqlens.shape[0] - 1
    i32 = torch.int32
    q, k = rows(q), rows(k)
    cu_seqlens, candidates = dense(cu_seqlens, candidates)
    prob, selected, cos, inv_q, inv_k = (empty(q, T) for _ in range(5))
    num_dropped = torch.empty((), dtype=i32, device=q.device)
    mask, code = empty(q, T, dtype=torch.bool), empty(q, T, dtype=torch.int8)
    blocks = triton.cdiv(T, ROUTE_BLOCK)
    block_count, block_sum = empty(q, blocks, dtype=i32), empty(q, blocks)
    chunk_index, cu_chunks, prob_sum = empty(q, T, dtype=i32), empty(q, N + 1, dtype=i32), empty(q, N)
    chunk_start = empty(q, T if max_chunks is None else max_chunks, dtype=i32)
    ROUTE_FWD.launch(
        (blocks,), q, D, q, k, cu_seqlens, candidates, logit_bias, prob, cos, inv_q, inv_k, code, block_count,
        block_sum, T, N, search_steps(N), stride(q), stride(k),
        HAS_CANDIDATES=candidates is not None, HAS_BIAS=logit_bias is not None,
    )  # fmt: skip
    selection = None
    if max_chunks is not None:
        selection = empty(q, 3, dtype=i32)
        SELECT.launch(
            (1,), q, D, prob, code, cu_seqlens, block_count, selection, num_dropped, T, N, blocks, max_chunks
        )  # fmt: skip
    grid = triton.cdiv(max(T, max_chunks or 0), COMPACT_BLOCK) + N + 1
    COMPACT.launch(
        (grid,), q, D, prob, code, cu_seqlens, block_count, block_sum, selection, mask, selected, chunk_index,
        chunk_start, cu_chunks, prob_sum, num_dropped, T, N, blocks, max_chunks or 0,
        HAS_BUDGET=max_chunks is not None,
    )  # fmt: skip
    if max_chunks is None:
        chunk_start = chunk_start[: int(cu_chunks[-1])]  # the one wait for the device
    return prob, mask, selected, chunk_index, chunk_start, cu_chunks, prob_sum, num_dropped, cos, inv_q, inv_k


def route_bwd(q, k, cu_seqlens, logit_bias, mask, cos, inv_q, inv_k, dprob, dselected, dprob_sum, bias_grad):
    (T, D), N = q.shape, cu_seqlens.shape[0] - 1
    q, k = rows(q), rows(k)
    cu_seqlens, mask, cos, inv_q, inv_k = dense(cu_seqlens, mask, cos, inv_q, inv_k)
    dq, dk = empty(q, T, D, dtype=q.dtype), empty(q, T, D, dtype=q.dtype)
    blocks = triton.cdiv(T + 1, ROUTE_BLOCK) if T else 0
    dbias = empty(q, blocks) if bias_grad else None
    grads = dense(dprob, dselected, dprob_sum)
    ROUTE_BWD.launch(
        (blocks,), q, D, q, k, cu_seqlens, logit_bias, mask, cos, inv_q, inv_k, *grads, dq, dk, dbias,
        T, N, search_steps(N), stride(q), stride(k), HAS_BIAS=logit_bias is not None, HAS_DBIAS=bias_grad,
        HAS_DPROB=dprob is not None, HAS_DSELECTED=dselected is not None, HAS_DSUM=dprob_sum is not None,
    )  # fmt: skip
    return dq, dk, empty(q, 0) if dbias is None else dbias.sum()


def route_step(q_prev, k, is_first, logit_bias, candidates):
    B, D = k.shape
    q_prev, k = rows(q_prev), rows(k)
    prob, selected, mask = empty(k, B), empty(k, B), empty(k, B, dtype=torch.bool)
    flags = dense(is_first, candidates)
    ROUTE_STEP.launch(
        (triton.cdiv(B, ROUTE_BLOCK),), k, D, q_prev, k, *flags, logit_bias, prob, mask, selected, B,
        stride(q_prev), stride(k),
        HAS_FIRST=is_first is not None, HAS_CANDIDATES=candidates is not None, HAS_BIAS=logit_bias is not None,
    )  # fmt: skip
    return prob, mask, selected
