"""Routing on a GPU.

1. `_route_fwd_kernel` reads q and k once: probability, boundary code, the numbers the backward needs, and the number of
   boundaries and sum of probabilities of each block of ROUTE_BLOCK positions.
2. With a budget below T, two kernels find the probability below which boundaries are dropped: every SELECT_BLOCK
   positions leave a histogram of the upper 12 bits of p above one half, then one of the lower 11 bits among those that
   have the upper ones of the threshold. They only look if there are too many boundaries.
3. `_compact_kernel` turns codes into mask, selected probability and chunk layout; other programs of it sum the
   probabilities of a sequence. A block finds its offset by adding up the counts of the blocks before it, so no block
   waits for another.

Nothing is read back by the host unless chunk_start must have exactly as many rows as there are chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hnet_kernels.validation import MAX_LOGIT_BIAS

from .common import Kernel, block_columns, dense, empty, jit, rows, search_steps, sequence_of, stride

ROUTE_BLOCK = 8  # positions of a block of the forward
COMPACT_BLOCK = 2048
SELECT_BLOCK = 8192  # positions of a histogram, a multiple of COMPACT_BLOCK
ORDINARY, FIRST = tl.constexpr(1), tl.constexpr(2)  # codes: 0 is no boundary
MAX_BIAS = tl.constexpr(MAX_LOGIT_BIAS)
HALF = tl.constexpr(0x3F000000)  # bits of 0.5: boundaries have 1 .. 2^23 above it


@triton.jit
def _scale(bias):
    return tl.exp(tl.minimum(tl.maximum(tl.load(bias), -MAX_BIAS), MAX_BIAS))


@triton.jit
def _probability(q_sum, k_sum, dot, bias, HAS_BIAS: tl.constexpr):
    """p, cos and the inverse norms, from three row sums. Rounded as in IEEE 754; Triton's sqrt and / are not."""
    inv_q = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(q_sum), 1e-12))
    inv_k = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(k_sum), 1e-12))
    cos = dot * inv_q * inv_k
    p = (1.0 - cos) * 0.5
    p = tl.where(p < 0.0, 0.0, tl.where(p > 1.0, 1.0, p))  # keeps NaN
    if HAS_BIAS:
        scale = _scale(bias)
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
def _sum(values, n, BLOCK: tl.constexpr):
    """values[0] + ... + values[n - 1]"""
    acc = tl.zeros((BLOCK,), tl.int32)
    for i in range(0, n, BLOCK):
        at = i + tl.arange(0, BLOCK)
        acc += tl.load(values + at, mask=at < n, other=0)
    return tl.sum(acc)


@triton.jit
def _sum_rows(histograms, n, BINS: tl.constexpr):
    acc = tl.zeros((BINS,), tl.int32)
    for i in range(n):
        acc += tl.load(histograms + i * BINS + tl.arange(0, BINS))
    return acc


@triton.jit
def _clear(histogram, BINS: tl.constexpr):
    """A program counts in a row of its own with integer atomics, which give the same in any order; `tl.histogram` would
    keep the bins in registers."""
    tl.store(histogram + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))
    tl.debug_barrier()


@triton.jit
def _rank_from_the_top(histogram, wanted, BINS: tl.constexpr):
    """The largest bin b with at least `wanted` entries in bins >= b, and how many lie above b."""
    from_here = tl.cumsum(histogram, 0, reverse=True)
    bins = tl.arange(0, BINS)
    b = tl.max(tl.where(from_here >= wanted, bins, 0))
    above = tl.sum(tl.where(bins > b, histogram, 0))
    return b, above


@triton.jit
def _codes_and_keys(prob, code, at, on):
    """Codes of positions `at`, and for boundaries the 23 bits of p above one half, less one"""
    c = tl.load(code + at, mask=on, other=0)
    return c, tl.load(prob + at, mask=on, other=1.0).to(tl.int32, bitcast=True) - HALF - 1


@jit
def _upper_digits_kernel(
    prob, code, block_count, upper, firsts, T, num_blocks, budget,
    UPPER: tl.constexpr, LOWER: tl.constexpr, SELECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of SELECT positions: a histogram of the upper digit of p, and how many begin a sequence. Only if too many."""
    pid = tl.program_id(0)
    if _sum(block_count, num_blocks, BLOCK) > budget:
        _clear(upper + pid * UPPER, UPPER)
        count = tl.zeros((BLOCK,), tl.int32)
        for i in range(0, SELECT, BLOCK):
            at = pid * SELECT + i + tl.arange(0, BLOCK)
            c, key = _codes_and_keys(prob, code, at, at < T)
            tl.atomic_add(upper + pid * UPPER + key // LOWER, 1, mask=c == ORDINARY, sem="relaxed")
            count += (c == FIRST).to(tl.int32)
        tl.store(firsts + pid, tl.sum(count))


@jit
def _lower_digits_kernel(
    prob, code, block_count, upper, firsts, lower, sure, selection, num_dropped, T, num_blocks, budget,
    UPPER: tl.constexpr, LOWER: tl.constexpr, SELECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the upper digit at which the budget runs out: a histogram of the lower one, in SELECT positions; and how many
    boundaries there are above that upper digit.

    selection <- that digit (UPPER if only first positions fit, -1 if all do) and how many boundaries to keep of it.
    """
    pid = tl.program_id(0)
    total = _sum(block_count, num_blocks, BLOCK)
    digit = total * 0 - 1
    wanted = total * 0
    if total > budget:
        blocks = tl.num_programs(0)
        keep = budget - _sum(firsts, blocks, BLOCK)
        b, above = _rank_from_the_top(_sum_rows(upper, blocks, UPPER), keep, UPPER)
        digit = tl.where(keep > 0, b, UPPER)
        wanted = tl.where(keep > 0, keep - above, 0)
        _clear(lower + pid * LOWER, LOWER)
        count = tl.zeros((BLOCK,), tl.int32)
        for i in range(0, SELECT, BLOCK):
            at = pid * SELECT + i + tl.arange(0, BLOCK)
            c, key = _codes_and_keys(prob, code, at, at < T)
            mine = (c == ORDINARY) & (key // LOWER == digit)
            tl.atomic_add(lower + pid * LOWER + key % LOWER, 1, mask=mine, sem="relaxed")
            count += ((c == FIRST) | ((c == ORDINARY) & (key // LOWER > digit))).to(tl.int32)
        tl.store(sure + pid, tl.sum(count))
    if pid == 0:
        tl.store(selection, digit)
        tl.store(selection + 1, wanted)
        tl.store(num_dropped, tl.maximum(total - budget, 0))


@triton.jit
def _kept_and_tied(prob, code, at, on, threshold):
    """Of positions `at`: kept for sure, and kept only while there is room among equals."""
    c, key = _codes_and_keys(prob, code, at, on)
    sure = (c == FIRST) | ((c == ORDINARY) & (key > threshold))
    tied = (c == ORDINARY) & (key == threshold)
    return sure.to(tl.int32), tied.to(tl.int32)


@triton.jit
def _edges_before(cu_seqlens, t, N, steps):
    """How many of the N + 1 edges lie before position t"""
    lo = t * 0
    hi = lo + N + 1
    for _ in range(steps + 1):
        mid = (lo + hi) // 2
        below = tl.load(cu_seqlens + mid, mask=lo < hi, other=0) < t
        lo = tl.where((lo < hi) & below, mid + 1, lo)
        hi = tl.where((lo < hi) & (below == 0), mid, hi)
    return lo


@jit
def _compact_kernel(
    prob, code, cu_seqlens, block_count, block_sum, lower, sure, selection,
    mask_out, selected_out, chunk_index, chunk_start, cu_chunks, prob_sum, num_dropped,
    T, N, steps, num_blocks, budget,
    HAS_BUDGET: tl.constexpr, HAS_SELECTION: tl.constexpr, ROUTE_BLOCK: tl.constexpr, LOWER: tl.constexpr,
    SELECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first programs have BLOCK positions each, with the edges of sequences in them; the others a sequence each."""
    pid = tl.program_id(0)
    compact_blocks = tl.maximum(tl.cdiv(tl.maximum(T, budget), BLOCK), 1)
    lanes = tl.arange(0, BLOCK)
    if pid < compact_blocks:
        begin = tl.minimum(pid * BLOCK, T)
        t = pid * BLOCK + lanes
        on = t < T
        base = _sum(block_count, begin // ROUTE_BLOCK, BLOCK)
        kept = (tl.load(code + t, mask=on, other=0) > 0).to(tl.int32)
        if HAS_SELECTION:
            digit = tl.load(selection)
            if digit >= 0:  # the block counts are of no use once boundaries are dropped
                wanted = tl.load(selection + 1)
                earlier_blocks = begin // SELECT
                earlier = _sum_rows(lower, earlier_blocks, LOWER)
                rest = _sum_rows(lower + earlier_blocks * LOWER, tl.cdiv(T, SELECT) - earlier_blocks, LOWER)
                b, above = _rank_from_the_top(earlier + rest, wanted, LOWER)
                threshold = digit * LOWER + b
                ties = wanted - above
                bins = tl.arange(0, LOWER)
                base = _sum(sure, earlier_blocks, BLOCK) + tl.sum(tl.where(bins > b, earlier, 0))
                tied_before = tl.sum(tl.where(bins == b, earlier, 0))
                for i in range(earlier_blocks * SELECT, begin, BLOCK):
                    k, e = _kept_and_tied(prob, code, i + lanes, i + lanes < begin, threshold)
                    base += tl.sum(k)
                    tied_before += tl.sum(e)
                base += tl.minimum(tied_before, ties)
                kept, tied = _kept_and_tied(prob, code, t, on, threshold)
                kept += tied * ((tied_before + tl.cumsum(tied, 0)) <= ties).to(tl.int32)
        inclusive = tl.cumsum(kept, 0)
        index = base + inclusive - 1
        p = tl.load(prob + t, mask=on, other=0.0)
        tl.store(mask_out + t, kept.to(tl.int8), mask=on)
        tl.store(selected_out + t, tl.where(kept != 0, p, 1.0 - p), mask=on)
        tl.store(chunk_index + t, index, mask=on)
        tl.store(chunk_start + index, t, mask=on & (kept != 0))
        if HAS_BUDGET:  # rows no chunk fills
            total = tl.minimum(_sum(block_count, num_blocks, BLOCK), budget)
            tl.store(chunk_start + t, tl.load(cu_seqlens + N), mask=(t < budget) & (t >= total))
        if not HAS_SELECTION:  # noqa: SIM102 (decided while compiling; the next line is not)
            if pid == 0:
                tl.store(num_dropped, 0)
        # the edges in begin .. begin + BLOCK - 1; the last program of positions also has those at T
        last = (pid + 1) * BLOCK >= T
        end = tl.where(last, T, begin + BLOCK - 1)
        n0 = _edges_before(cu_seqlens, begin, N, steps)
        n1 = _edges_before(cu_seqlens, end + 1, N, steps)
        if begin < tl.maximum(T, 1):
            for i in range(n0, n1, BLOCK):
                n = i + lanes
                at = tl.load(cu_seqlens + n, mask=n < n1, other=0) - begin
                before_edge = tl.where(at > 0, tl.gather(inclusive, tl.minimum(tl.maximum(at - 1, 0), BLOCK - 1), 0), 0)
                tl.store(cu_chunks + n, base + before_edge, mask=n < n1)
    else:
        n = pid - compact_blocks
        edge = tl.load(cu_seqlens + n)
        end = tl.load(cu_seqlens + n + 1)
        # whole blocks by their sums, the ragged ends position by position
        first_block = tl.cdiv(edge, ROUTE_BLOCK)
        last_block = tl.maximum(end // ROUTE_BLOCK, first_block)
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
        scale = _scale(bias)
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
        {"D": D, "BLOCK": ROUTE_BLOCK, "BLOCK_D": block_columns(D, 128 if dtype == torch.float32 else 256), **flags},
        {"num_warps": 4},
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
DIGITS = {"UPPER": 4096, "LOWER": 2048}


def _digits_plan(D, dtype, gpu):
    return {**DIGITS, "SELECT": SELECT_BLOCK, "BLOCK": COMPACT_BLOCK}, {"num_warps": 8 if gpu == "gfx942" else 16}


UPPER_DIGITS = Kernel(
    _upper_digits_kernel,
    {
        "prob": "*fp32", "code": "*i8", "block_count": "*i32", "upper": "*i32", "firsts": "*i32", "T": "i32",
        "num_blocks": "i32", "budget": "i32",
    },
    _digits_plan,
)  # fmt: skip
LOWER_DIGITS = Kernel(
    _lower_digits_kernel,
    {
        "prob": "*fp32", "code": "*i8", "block_count": "*i32", "upper": "*i32", "firsts": "*i32", "lower": "*i32",
        "sure": "*i32", "selection": "*i32", "num_dropped": "*i32", "T": "i32", "num_blocks": "i32", "budget": "i32",
    },
    _digits_plan,
)  # fmt: skip
COMPACT = Kernel(
    _compact_kernel,
    {
        "prob": "*fp32", "code": "*i8", "cu_seqlens": "*i32", "block_count": "*i32", "block_sum": "*fp32",
        "lower": "*i32", "sure": "*i32", "selection": "*i32", "mask_out": "*u8", "selected_out": "*fp32",
        "chunk_index": "*i32", "chunk_start": "*i32", "cu_chunks": "*i32", "prob_sum": "*fp32", "num_dropped": "*i32",
        "T": "i32", "N": "i32", "steps": "i32", "num_blocks": "i32", "budget": "i32",
    },
    lambda D, dtype, gpu: (
        {
            "HAS_BUDGET": True, "HAS_SELECTION": True, "ROUTE_BLOCK": ROUTE_BLOCK, "LOWER": DIGITS["LOWER"],
            "SELECT": SELECT_BLOCK, "BLOCK": COMPACT_BLOCK,
        },
        {"num_warps": 8 if gpu in ("sm_120", "gfx942") else 16},
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
    "route_upper_digits": UPPER_DIGITS,
    "route_lower_digits": LOWER_DIGITS,
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
    lower = sure = selection = None
    if max_chunks is not None and max_chunks < T:
        parts = triton.cdiv(T, SELECT_BLOCK)
        upper, lower = empty(q, parts, DIGITS["UPPER"], dtype=i32), empty(q, parts, DIGITS["LOWER"], dtype=i32)
        firsts, sure, selection = empty(q, parts, dtype=i32), empty(q, parts, dtype=i32), empty(q, 2, dtype=i32)
        sizes = T, blocks, max_chunks
        UPPER_DIGITS.launch((parts,), q, D, prob, code, block_count, upper, firsts, *sizes)
        LOWER_DIGITS.launch(
            (parts,), q, D, prob, code, block_count, upper, firsts, lower, sure, selection, num_dropped, *sizes
        )  # fmt: skip
    grid = max(triton.cdiv(max(T, max_chunks or 0), COMPACT_BLOCK), 1) + N
    COMPACT.launch(
        (grid,), q, D, prob, code, cu_seqlens, block_count, block_sum, lower, sure, selection, mask, selected,
        chunk_index, chunk_start, cu_chunks, prob_sum, num_dropped, T, N, search_steps(N), blocks, max_chunks or 0,
        HAS_BUDGET=max_chunks is not None, HAS_SELECTION=selection is not None,
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
