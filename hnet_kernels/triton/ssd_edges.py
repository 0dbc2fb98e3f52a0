"""What stands around the scan of Mamba-2 on a GPU (`ssd.py`), each in one pass:

    steps        dt = softplus(raw + bias); log_decay, its sum times A from the start of chunk and sequence on; first
    conv_silu    silu(bias + sum_j weight[:, K-1-j] x_{t-j}), j < K, never past the start of a sequence
    gated_norm   v / sqrt(mean(v^2) + eps) * weight with v = y silu(z)

`first` (T,) is the first position of each position's sequence, PADDING past the last: two positions are in the same
sequence where it is equal, and a row is one of a sequence where first_t <= t. Rows that are not are never read; they
are zero on output and get zero gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import Kernel, block_columns, jit, sequence_of
from .ssd import chunk

PADDING = tl.constexpr(2**30)


@triton.jit
def _softplus(x):
    """log(1 + e^x). With e = e^-|x| and r = e / (2 + e), log(1 + e) = 2 (r + r^3/3 + r^5/5 + ...), which keeps its
    digits where dt is small and a GPU's own logarithm has only absolute precision."""
    e = tl.exp(-tl.abs(x))
    r = e / (2.0 + e)
    q = r * r
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return tl.maximum(x, 0.0) + 2.0 * r * series


@jit
def _ssd_steps_kernel(
    raw, dt_bias, A_log, cu_seqlens, dt, log_decay, first, T, N, H, steps, raw_stride,
    CHUNK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dt and log_decay (H, T) of a chunk and BLOCK_H heads."""
    i = tl.arange(0, CHUNK)
    t = tl.program_id(0) * CHUNK + i
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    head = h < H
    on = t < tl.minimum(tl.load(cu_seqlens + N), T)
    own = tl.where(on, tl.load(cu_seqlens + sequence_of(t, cu_seqlens, N, steps)), PADDING)
    if tl.program_id(1) == 0:
        tl.store(first + t, own, mask=t < T)
    mask = on[:, None] & head[None, :]
    z = tl.load(raw + t.to(tl.int64)[:, None] * raw_stride + h[None, :], mask=mask, other=0.0).to(tl.float32)
    step = tl.where(mask, _softplus(z + tl.load(dt_bias + h, mask=head, other=0.0)[None, :]), 0.0)
    a = -tl.exp(tl.load(A_log + h, mask=head, other=0.0))[None, :] * step
    so_far = (i[:, None] >= i[None, :]) & (own[:, None] == own[None, :])
    log = tl.dot(so_far.to(tl.float32), a, input_precision="ieee")
    at = h.to(tl.int64)[None, :] * T + t[:, None]
    out = (t < T)[:, None] & head[None, :]
    tl.store(dt + at, step, mask=out)
    tl.store(log_decay + at, log, mask=out)


@triton.jit
def _taps(x, weight, bias, t, first, c, col, x_stride, K: tl.constexpr):
    """The convolution at positions t, before the SiLU"""
    v = tl.load(bias + c, mask=col, other=0.0)[None, :] + tl.zeros((t.shape[0], c.shape[0]), tl.float32)
    for j in tl.static_range(K):
        on = (first <= t - j)[:, None] & col[None, :]
        row = tl.load(x + (t - j).to(tl.int64)[:, None] * x_stride + c[None, :], mask=on, other=0.0)
        v += tl.load(weight + c * K + (K - 1 - j), mask=col, other=0.0)[None, :] * row.to(tl.float32)
    return v


@jit
def _conv_silu_fwd_kernel(
    x, weight, bias, first, out, T, channels, x_stride, out_stride,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col = c < channels
    own = tl.load(first + t, mask=t < T, other=PADDING)
    v = _taps(x, weight, bias, t, own, c, col, x_stride, K)
    v = tl.where((own <= t)[:, None], v * tl.sigmoid(v), 0.0)
    tl.store(out + t.to(tl.int64)[:, None] * out_stride + c[None, :], v, mask=(t < T)[:, None] & col[None, :])


@jit
def _conv_silu_bwd_kernel(
    x, weight, bias, first, dout, dbc, dx, dweight, dbias, T, d_inner, channels, groups, x_stride, dout_stride,
    dx_stride,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of ROWS positions, and what they add for weight and bias. The gradient comes in as `dout` for the first
    d_inner channels, for the rest as `groups` parts in `dbc`."""
    pid = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col = c < channels
    tap = tl.arange(0, BLOCK_K)
    of_taps = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    of_bias = tl.zeros((BLOCK_C,), tl.float32)
    for b in range(0, ROWS, BLOCK_T):
        t = pid * ROWS + b + tl.arange(0, BLOCK_T)
        acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for j in range(K):
            r = t + j
            own = tl.load(first + r, mask=r < T, other=PADDING)
            own = tl.where(own <= t, own, PADDING)  # only where r feels t
            on = (own <= t)[:, None] & col[None, :]
            at = r.to(tl.int64)[:, None]
            d = tl.load(dout + at * dout_stride + c[None, :], mask=on & (c < d_inner)[None, :], other=0.0)
            d = d.to(tl.float32)
            if (tl.program_id(1) + 1) * BLOCK_C > d_inner:
                rest = channels - d_inner
                for g in range(groups):
                    part = dbc + (g * T.to(tl.int64) + at) * rest + (c - d_inner)[None, :]
                    d += tl.load(part, mask=on & (c >= d_inner)[None, :], other=0.0)
            v = _taps(x, weight, bias, r, own, c, col, x_stride, K)
            gate = tl.sigmoid(v)
            d *= gate * (1.0 + v * (1.0 - gate))
            acc += tl.load(weight + c * K + (K - 1 - j), mask=col, other=0.0)[None, :] * d
            if j == 0:
                for m in tl.static_range(K):
                    before = (own <= t - m)[:, None] & col[None, :]
                    row = tl.load(x + (t - m).to(tl.int64)[:, None] * x_stride + c[None, :], mask=before, other=0.0)
                    of_taps += tl.where((tap == K - 1 - m)[:, None], tl.sum(d * row.to(tl.float32), 0)[None, :], 0.0)
                of_bias += tl.sum(d, 0)
        tl.store(dx + t.to(tl.int64)[:, None] * dx_stride + c[None, :], acc, mask=(t < T)[:, None] & col[None, :])
    at = pid.to(tl.int64) * channels + c
    tl.store(dweight + at[None, :] * K + tap[:, None], of_taps, mask=(tap < K)[:, None] & col[None, :])
    tl.store(dbias + at, of_bias, mask=col)


@triton.jit
def _row_blocks(y, z, first, t, T, c, z_stride, D: tl.constexpr):
    """y and z at rows t, 0 outside of sequences; which rows and numbers are inside"""
    on = tl.load(first + t, mask=t < T, other=PADDING) <= t
    mask = on[:, None] & (c < D)[None, :]
    at = t.to(tl.int64)[:, None]
    y_rows = tl.load(y + at * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
    z_rows = tl.load(z + at * z_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    return y_rows, z_rows, mask


@jit
def _gated_norm_fwd_kernel(
    y, z, weight, first, out, T, eps, z_stride,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_D)
    y_rows, z_rows, _ = _row_blocks(y, z, first, t, T, c, z_stride, D)
    v = y_rows * z_rows * tl.sigmoid(z_rows)
    v *= tl.rsqrt(tl.sum(v * v, 1) / D + eps)[:, None]
    v *= tl.load(weight + c, mask=c < D, other=0.0)[None, :]
    tl.store(out + t.to(tl.int64)[:, None] * D + c[None, :], v, mask=(t < T)[:, None] & (c < D)[None, :])


@jit
def _gated_norm_bwd_kernel(
    dout, y, z, weight, first, dy, dz, sums, T, eps, dout_stride, z_stride, dz_stride,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dy and dz of ROWS positions, and what they add for the weight."""
    pid = tl.program_id(0)
    c = tl.arange(0, BLOCK_D)
    col = (c < D)[None, :]
    scale = tl.load(weight + c, mask=c < D, other=0.0)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for b in range(0, ROWS, BLOCK_T):
        t = pid * ROWS + b + tl.arange(0, BLOCK_T)
        at = t.to(tl.int64)[:, None]
        y_rows, z_rows, on = _row_blocks(y, z, first, t, T, c, z_stride, D)
        d = tl.load(dout + at * dout_stride + c[None, :], mask=on, other=0.0).to(tl.float32)
        gate = tl.sigmoid(z_rows)
        v = y_rows * z_rows * gate
        inverse = tl.rsqrt(tl.sum(v * v, 1) / D + eps)[:, None]
        v *= inverse
        total += d * v
        d *= scale
        d = inverse * (d - v * (tl.sum(d * v, 1) / D)[:, None])
        out = (t < T)[:, None] & col
        tl.store(dy + at * D + c[None, :], d * z_rows * gate, mask=out)
        tl.store(dz + at * dz_stride + c[None, :], d * y_rows * gate * (1.0 + z_rows * (1.0 - gate)), mask=out)
    tl.store(sums + pid.to(tl.int64) * D + c, tl.sum(total, 0), mask=c < D)


# --- launches -----------------------------------------------------------------------------------------------------

NORM_ROWS, CONV_ROWS = 32, 256  # positions of a program that leaves sums for the weights


def _fixed(warps: int, **constexprs: int):
    return lambda D, dtype, gpu: (dict(constexprs), {"num_warps": warps, "num_stages": 1})


def _norm_plan(**constexprs: int):
    def plan(D, dtype, gpu):
        width = block_columns(D, 1 << 16)
        shape = {"D": D, **constexprs, "BLOCK_T": min(max(1, 1024 // width), NORM_ROWS), "BLOCK_D": width}
        return shape, {"num_warps": 4 if width <= 1024 else 8, "num_stages": 1}

    return plan


STEPS = Kernel(
    _ssd_steps_kernel,
    {
        "raw": "*T", "dt_bias": "*fp32", "A_log": "*fp32", "cu_seqlens": "*i32", "dt": "*fp32", "log_decay": "*fp32",
        "first": "*i32", "T": "i32", "N": "i32", "H": "i32", "steps": "i32", "raw_stride": "i32",
    },
    lambda D, dtype, gpu: ({"CHUNK": chunk(dtype), "BLOCK_H": 16}, {"num_warps": 8, "num_stages": 1}),
)  # fmt: skip
CONV_FWD = Kernel(
    _conv_silu_fwd_kernel,
    {
        "x": "*T", "weight": "*fp32", "bias": "*fp32", "first": "*i32", "out": "*T", "T": "i32", "channels": "i32",
        "x_stride": "i32", "out_stride": "i32",
    },
    _fixed(4, K=4, BLOCK_T=16, BLOCK_C=64),
)  # fmt: skip
CONV_BWD = Kernel(
    _conv_silu_bwd_kernel,
    {
        "x": "*T", "weight": "*fp32", "bias": "*fp32", "first": "*i32", "dout": "*T", "dbc": "*fp32", "dx": "*T",
        "dweight": "*fp32", "dbias": "*fp32", "T": "i32", "d_inner": "i32", "channels": "i32", "groups": "i32",
        "x_stride": "i32", "dout_stride": "i32", "dx_stride": "i32",
    },
    _fixed(8, K=4, ROWS=CONV_ROWS, BLOCK_K=4, BLOCK_T=16, BLOCK_C=64),
)  # fmt: skip
NORM_FWD = Kernel(
    _gated_norm_fwd_kernel,
    {
        "y": "*T", "z": "*T", "weight": "*fp32", "first": "*i32", "out": "*T", "T": "i32", "eps": "fp32",
        "z_stride": "i32",
    },
    _norm_plan(),
)  # fmt: skip
NORM_BWD = Kernel(
    _gated_norm_bwd_kernel,
    {
        "dout": "*T", "y": "*T", "z": "*T", "weight": "*fp32", "first": "*i32", "dy": "*T", "dz": "*T",
        "sums": "*fp32", "T": "i32", "eps": "fp32", "dout_stride": "i32", "z_stride": "i32", "dz_stride": "i32",
    },
    _norm_plan(ROWS=NORM_ROWS),
)  # fmt: skip
KERNELS = {
    "ssd_steps": STEPS,
    "conv_silu_fwd": CONV_FWD,
    "conv_silu_bwd": CONV_BWD,
    "gated_norm_fwd": NORM_FWD,
    "gated_norm_bwd": NORM_BWD,
}
