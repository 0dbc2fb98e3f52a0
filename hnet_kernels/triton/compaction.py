"""From boundary codes to chunks on a GPU, the second part of `route`.

1. With a budget below T, two kernels find the probability below which boundaries are dropped: every SELECT_BLOCK
   positions leave a histogram of the upper 12 bits of p above one half, then one of the lower 11 bits among those that
   have the upper ones of the threshold. They only look if there are too many boundaries.
2. `_compact_kernel` turns codes into mask, selected probability and chunk layout; other programs of it sum the
   probabilities of a sequence and their entropies. A block finds its offset by adding up the counts of the blocks
   before it, so no block waits for another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import Kernel, cdiv, empty, jit, search_steps

ROUTE_BLOCK = 8  # positions whose boundaries, probabilities and entropies `_route_fwd_kernel` has added up
COMPACT_BLOCK = 2048
SELECT_BLOCK = 8192  # positions of a histogram, a multiple of COMPACT_BLOCK
ORDINARY, FIRST = tl.constexpr(1), tl.constexpr(2)  # codes: 0 is no boundary
HALF = tl.constexpr(0x3F000000)  # bits of 0.5: boundaries have 1 .. 2^23 above it


@triton.jit
def entropy(p):
    """-p ln p - (1 - p) ln(1 - p). The smaller of p and 1 - p is exact; ln(1 - m) = -2 atanh(m / (2 - m)), its series,
    as tl.log is not made for numbers near 1."""
    m = tl.where(p < 0.5, p, 1.0 - p)  # keeps NaN
    s = tl.div_rn(m, 2.0 - m)
    z = s * s
    series = z * (1 / 15) + 1 / 13
    series = z * series + 1 / 11
    series = z * series + 1 / 9
    series = z * series + 1 / 7
    series = z * series + 1 / 5
    series = z * series + 1 / 3
    return (1.0 - m) * (2.0 * s) * (1.0 + z * series) - m * tl.log(tl.maximum(m, 1e-37))


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
    mask_out, selected_out, chunk_index, chunk_start, cu_chunks, prob_sum, entropy_sum, num_dropped,
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
        p = tl.zeros((BLOCK,), tl.float32)
        h = tl.zeros((BLOCK,), tl.float32)
        for i in range(first_block, last_block, BLOCK):
            whole = i + lanes < last_block
            p += tl.load(block_sum + i + lanes, mask=whole, other=0.0)
            h += tl.load(block_sum + num_blocks + i + lanes, mask=whole, other=0.0)
        few = tl.arange(0, ROUTE_BLOCK)
        head = tl.load(prob + edge + few, mask=edge + few < tl.minimum(first_block * ROUTE_BLOCK, end), other=0.0)
        tail = last_block * ROUTE_BLOCK + few
        tail = tl.load(prob + tail, mask=tail < end, other=0.0)
        tl.store(prob_sum + n, tl.sum(p) + tl.sum(head + tail))
        tl.store(entropy_sum + n, tl.sum(h) + tl.sum(entropy(head) + entropy(tail)))


# --- launches -----------------------------------------------------------------------------------------------------

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
        "chunk_index": "*i32", "chunk_start": "*i32", "cu_chunks": "*i32", "prob_sum": "*fp32", "entropy_sum": "*fp32",
        "num_dropped": "*i32", "T": "i32", "N": "i32", "steps": "i32", "num_blocks": "i32", "budget": "i32",
    },
    lambda D, dtype, gpu: (
        {
            "HAS_BUDGET": True, "HAS_SELECTION": True, "ROUTE_BLOCK": ROUTE_BLOCK, "LOWER": DIGITS["LOWER"],
            "SELECT": SELECT_BLOCK, "BLOCK": COMPACT_BLOCK,
        },
        {"num_warps": 8 if gpu in ("sm_120", "gfx942") else 16},
    ),
)  # fmt: skip
KERNELS = {"route_upper_digits": UPPER_DIGITS, "route_lower_digits": LOWER_DIGITS, "route_compact": COMPACT}


def compact(prob, code, cu_seqlens, block_count, block_sum, max_chunks):
    """mask, selected, chunk_index, chunk_start, cu_chunks, prob_sum, entropy_sum, num_dropped, as `route` has them."""
    T, N, blocks = prob.shape[0], cu_seqlens.shape[0] - 1, block_count.shape[0]
    i32 = torch.int32
    mask, selected, num_dropped = empty(prob, T, dtype=torch.bool), empty(prob, T), empty(prob, dtype=i32)
    chunk_index, cu_chunks = empty(prob, T, dtype=i32), empty(prob, N + 1, dtype=i32)
    prob_sum, entropy_sum = empty(prob, N), empty(prob, N)
    chunk_start = empty(prob, T if max_chunks is None else max_chunks, dtype=i32)
    lower = sure = selection = None
    if max_chunks is not None and max_chunks < T:
        parts = cdiv(T, SELECT_BLOCK)
        upper, lower = empty(prob, parts, DIGITS["UPPER"], dtype=i32), empty(prob, parts, DIGITS["LOWER"], dtype=i32)
        firsts, sure, selection = (empty(prob, size, dtype=i32) for size in (parts, parts, 2))
        sizes = T, blocks, max_chunks
        UPPER_DIGITS.launch((parts,), prob, 1, prob, code, block_count, upper, firsts, *sizes)
        LOWER_DIGITS.launch(
            (parts,), prob, 1, prob, code, block_count, upper, firsts, lower, sure, selection, num_dropped, *sizes
        )  # fmt: skip
    grid = max(cdiv(max(T, max_chunks or 0), COMPACT_BLOCK), 1) + N
    COMPACT.launch(
        (grid,), prob, 1, prob, code, cu_seqlens, block_count, block_sum, lower, sure, selection, mask, selected,
        chunk_index, chunk_start, cu_chunks, prob_sum, entropy_sum, num_dropped,
        T, N, search_steps(N), blocks, max_chunks or 0,
        HAS_BUDGET=max_chunks is not None, HAS_SELECTION=selection is not None,
    )  # fmt: skip
    if max_chunks is None:
        chunk_start = chunk_start[: int(cu_chunks[-1])]  # the one wait for the device
    return mask, selected, chunk_index, chunk_start, cu_chunks, prob_sum, entropy_sum, num_dropped
