"""Routing on a GPU.

`_route_fwd_kernel` reads q and k once: probability, boundary code, the numbers the backward needs, and the number of
boundaries and the sums of probabilities and of their entropies of each block of ROUTE_BLOCK positions. `compaction`
turns codes into mask, selected probability and chunk layout, within the budget if there is one.

Nothing is read back by the host unless chunk_start must have exactly as many rows as there are chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hnet_kernels.validation import MAX_LOGIT_BIAS

from .common import Kernel, block_columns, cdiv, dense, empty, jit, rows, search_steps, sequence_of, stride
from .compaction import FIRST, ORDINARY, ROUTE_BLOCK, compact, entropy

MAX_BIAS = tl.constexpr(MAX_LOGIT_BIAS)


@triton.jit
def _scale(bias):
    return tl.exp(tl.minimum(tl.maximum(tl.load(bias), -MAX_BIAS), MAX_BIAS))


@triton.jit
def _moved(p, bias, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        scale = _scale(bias)
        p = tl.div_rn(p * scale, 1.0 - p + p * scale)
    return p


@triton.jit
def _log_odds(p):
    """The entropy's derivative, ln((1 - p) / p); 0 where p is 0 or 1"""
    odds = (1.0 - p) / tl.maximum(p, 1e-37)
    return tl.where((p <= 0.0) | (p >= 1.0), 0.0, tl.log(tl.maximum(odds, 1e-37)))


@triton.jit
def _probability(q_sum, k_sum, dot, bias, HAS_BIAS: tl.constexpr):
    """p, cos and the inverse norms, from three row sums. Rounded as in IEEE 754; Triton's sqrt and / are not."""
    inv_q = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(q_sum), 1e-12))
    inv_k = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(k_sum), 1e-12))
    cos = dot * inv_q * inv_k
    p = (1.0 - cos) * 0.5
    p = tl.where(p < 0.0, 0.0, tl.where(p > 1.0, 1.0, p))  # keeps NaN
    return _moved(p, bias, HAS_BIAS), cos, inv_q, inv_k


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
    q, k, cu_seqlens, candidates, bias, prob, norms, code_out, block_count, block_sum,
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
    tl.store(block_sum + tl.num_programs(0) + pid, tl.sum(entropy(p)))
    boundary = pair & (p > 0.5)
    if HAS_CANDIDATES:
        boundary = boundary & (tl.load(candidates + t, mask=on, other=0) != 0)
    code = tl.where(first, FIRST, tl.where(boundary, ORDINARY, 0))
    tl.store(prob + t, p, mask=on)
    tl.store(norms + t, tl.where(pair, cos, 0.0), mask=on)
    tl.store(norms + T + t, tl.where(pair, inv_q, 0.0), mask=on)  # the address moves first: 3 T may pass 2^31
    tl.store(norms + T + T + t, tl.where(pair, inv_k, 0.0), mask=on)
    tl.store(code_out + t, code.to(tl.int8), mask=on)
    tl.store(block_count + pid, tl.sum((code > 0).to(tl.int32)))
    tl.store(block_sum + pid, tl.sum(p))


@jit
def _route_bwd_kernel(
    q, k, cu_seqlens, bias, mask, norms, dprob, dselected, dprob_sum, dentropy_sum, dq, dk, dbias,
    T, N, steps, q_stride, k_stride,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DPROB: tl.constexpr, HAS_DSELECTED: tl.constexpr,
    HAS_DSUM: tl.constexpr, HAS_DENTROPY: tl.constexpr, HAS_DBIAS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
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
    cos = tl.load(norms + t, mask=pair, other=0.0)
    inv_q = tl.load(norms + T + t, mask=pair, other=0.0)  # the address moves first: 3 T may pass 2^31
    inv_k = tl.load(norms + T + T + t, mask=pair, other=0.0)
    raw = (1.0 - cos) * 0.5
    p = tl.where(raw < 0.0, 0.0, tl.where(raw > 1.0, 1.0, raw))
    if HAS_DENTROPY:
        g += tl.load(dentropy_sum + seq, mask=pair, other=0.0) * _log_odds(_moved(p, bias, HAS_BIAS))
    if HAS_BIAS:
        scale = _scale(bias)
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


def _row_plan(columns=256, **flags):
    """columns: how many 16-bit ones a tile has at most; of fp32, 128"""

    def plan(D, dtype, gpu):
        most = 128 if dtype == torch.float32 else columns
        return {"D": D, "BLOCK": ROUTE_BLOCK, "BLOCK_D": block_columns(D, most), **flags}, {"num_warps": 4}

    return plan


ROUTE_FWD = Kernel(
    _route_fwd_kernel,
    {
        "q": "*T", "k": "*T", "cu_seqlens": "*i32", "candidates": "*u8", "bias": "*fp32", "prob": "*fp32",
        "norms": "*fp32", "code_out": "*i8", "block_count": "*i32",
        "block_sum": "*fp32", "T": "i32", "N": "i32", "steps": "i32", "q_stride": "i32", "k_stride": "i32",
    },
    _row_plan(HAS_CANDIDATES=False, HAS_BIAS=False),
)  # fmt: skip
ROUTE_BWD = Kernel(
    _route_bwd_kernel,
    {
        "q": "*T", "k": "*T", "cu_seqlens": "*i32", "bias": "*fp32", "mask": "*u8", "norms": "*fp32",
        "dprob": "*fp32", "dselected": "*fp32", "dprob_sum": "*fp32", "dentropy_sum": "*fp32",
        "dq": "*T", "dk": "*T", "dbias": "*fp32", "T": "i32", "N": "i32", "steps": "i32", "q_stride": "i32",
        "k_stride": "i32",
    },
    # 256 columns spill 8 bytes on sm_90 where they are all there are
    _row_plan(
        128, HAS_BIAS=False, HAS_DBIAS=False, HAS_DPROB=True, HAS_DSELECTED=True, HAS_DSUM=True, HAS_DENTROPY=True
    ),
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
    "route_bwd": ROUTE_BWD,
    "route_step": ROUTE_STEP,
}


def route(q, k, cu_seqlens, logit_bias, candidates, max_chunks, padded):
    (T, D), N = q.shape, cu_seqlens.shape[0] - 1
    q, k = rows(q), rows(k)
    cu_seqlens, candidates = dense(cu_seqlens, candidates)
    prob, norms, code = empty(q, T), empty(q, 3, T), empty(q, T, dtype=torch.int8)
    blocks = cdiv(T, ROUTE_BLOCK)
    block_count, block_sum = empty(q, blocks, dtype=torch.int32), empty(q, 2, blocks)
    ROUTE_FWD.launch(
        (blocks,), q, D, q, k, cu_seqlens, candidates, logit_bias, prob, norms, code, block_count, block_sum,
        T, N, search_steps(N), stride(q), stride(k),
        HAS_CANDIDATES=candidates is not None, HAS_BIAS=logit_bias is not None,
    )  # fmt: skip
    return prob, *compact(prob, code, cu_seqlens, block_count, block_sum, max_chunks), norms


def route_bwd(q, k, cu_seqlens, logit_bias, mask, norms, dprob, dselected, dprob_sum, dentropy_sum, bias_grad):
    (T, D), N = q.shape, cu_seqlens.shape[0] - 1
    q, k = rows(q), rows(k)
    cu_seqlens, mask, norms = dense(cu_seqlens, mask, norms)
    dq, dk = empty(q, T, D, dtype=q.dtype), empty(q, T, D, dtype=q.dtype)
    blocks = cdiv(T + 1, ROUTE_BLOCK) if T else 0
    dbias = empty(q, blocks) if bias_grad else None
    grads = dense(dprob, dselected, dprob_sum, dentropy_sum)
    ROUTE_BWD.launch(
        (blocks,), q, D, q, k, cu_seqlens, logit_bias, mask, norms, *grads, dq, dk, dbias,
        T, N, search_steps(N), stride(q), stride(k), HAS_BIAS=logit_bias is not None, HAS_DBIAS=bias_grad,
        HAS_DPROB=dprob is not None, HAS_DSELECTED=dselected is not None, HAS_DSUM=dprob_sum is not None,
        HAS_DENTROPY=dentropy_sum is not None,
    )  # fmt: skip
    return dq, dk, empty(q, 0) if dbias is None else dbias.sum()


def route_step(q_prev, k, is_first, logit_bias, candidates):
    B, D = k.shape
    q_prev, k = rows(q_prev), rows(k)
    prob, selected, mask = empty(k, B), empty(k, B), empty(k, B, dtype=torch.bool)
    flags = dense(is_first, candidates)
    ROUTE_STEP.launch(
        (cdiv(B, ROUTE_BLOCK),), k, D, q_prev, k, *flags, logit_bias, prob, mask, selected, B,
        stride(q_prev), stride(k),
        HAS_FIRST=is_first is not None, HAS_CANDIDATES=candidates is not None, HAS_BIAS=logit_bias is not None,
    )  # fmt: skip
    return prob, mask, selected
