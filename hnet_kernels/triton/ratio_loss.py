"""The ratio loss on a GPU: one program reads the sums that `route` left for every sequence, and writes the loss and its
derivative by each of them, so that the backward is one multiplication.

    L = n/(n-1) ((n-1) F G + (1-F)(1-G))      dL/dG = n/(n-1) (n F - 1)      straight through: + n/(n-1) (n G - 1)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import Kernel, dense, empty, jit


@triton.jit
def _loss_and_slope(F, G, n, STRAIGHT_THROUGH: tl.constexpr):
    slope = n * F - 1.0
    if STRAIGHT_THROUGH:
        slope += n * G - 1.0
    return n / (n - 1.0) * ((n - 1.0) * F * G + (1.0 - F) * (1.0 - G)), n / (n - 1.0) * slope


@triton.jit
def _sequences(cu_seqlens, cu_chunks, prob_sum, at, N):
    """Length, boundaries and sum of probabilities of sequences `at`, zero past the last"""
    on = at < N
    length = tl.load(cu_seqlens + at + 1, mask=on, other=0) - tl.load(cu_seqlens + at, mask=on, other=0)
    count = tl.load(cu_chunks + at + 1, mask=on, other=0) - tl.load(cu_chunks + at, mask=on, other=0)
    return length, count.to(tl.float32), tl.load(prob_sum + at, mask=on, other=0.0)


@jit
def _ratio_loss_kernel(
    cu_seqlens, cu_chunks, prob_sum, loss, dprob_sum, target_ratio, N,
    BY_SEQUENCE: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    a = tl.zeros((BLOCK,), tl.float32)  # by sequence: losses and sequences that have positions; else F and G
    b = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, N, BLOCK):
        length, count, p = _sequences(cu_seqlens, cu_chunks, prob_sum, i + lanes, N)
        if BY_SEQUENCE:
            positions = tl.maximum(length, 1).to(tl.float32)
            each, _ = _loss_and_slope(count / positions, p / positions, target_ratio, STRAIGHT_THROUGH)
            a += tl.where(length > 0, each, 0.0)
            b += (length > 0).to(tl.float32)
        else:
            a += count
            b += p
    positions = tl.maximum(tl.load(cu_seqlens + N) - tl.load(cu_seqlens), 1).to(tl.float32)
    total, slope = _loss_and_slope(tl.sum(a) / positions, tl.sum(b) / positions, target_ratio, STRAIGHT_THROUGH)
    sequences = tl.maximum(tl.sum(b), 1.0)
    if BY_SEQUENCE:
        total = tl.sum(a) / sequences
    tl.store(loss, total)
    for i in range(0, N, BLOCK):
        d = lanes.to(tl.float32) * 0.0 + slope / positions
        if BY_SEQUENCE:
            length, count, p = _sequences(cu_seqlens, cu_chunks, prob_sum, i + lanes, N)
            own = tl.maximum(length, 1).to(tl.float32)
            _, slopes = _loss_and_slope(count / own, p / own, target_ratio, STRAIGHT_THROUGH)
            d = tl.where(length > 0, slopes / own / sequences, 0.0)
        tl.store(dprob_sum + i + lanes, d, mask=i + lanes < N)


def _kernel(by_sequence: bool) -> Kernel:
    args = {
        "cu_seqlens": "*i32", "cu_chunks": "*i32", "prob_sum": "*fp32", "loss": "*fp32", "dprob_sum": "*fp32",
        "target_ratio": "fp32", "N": "i32",
    }  # fmt: skip
    constexprs = {"BY_SEQUENCE": by_sequence, "STRAIGHT_THROUGH": False, "BLOCK": 256}
    return Kernel(_ratio_loss_kernel, args, lambda D, dtype, gpu: (constexprs, {"num_warps": 2}))


LOSS = {by_sequence: _kernel(by_sequence) for by_sequence in (False, True)}
KERNELS = {"ratio_loss_batch": LOSS[False], "ratio_loss_sequence": LOSS[True]}


def ratio_loss(prob_sum, cu_seqlens, cu_chunks, target_ratio, by_sequence, straight_through):
    N = cu_seqlens.shape[0] - 1
    loss, dprob_sum = empty(prob_sum), empty(prob_sum, N)
    LOSS[by_sequence].launch(
        (1,), prob_sum, 1, *dense(cu_seqlens, cu_chunks, prob_sum), loss, dprob_sum, target_ratio, N,
        STRAIGHT_THROUGH=straight_through,
    )  # fmt: skip
    return loss, dprob_sum
