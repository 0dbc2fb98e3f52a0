"""Pooling on a GPU. boundary and last copy rows; mean and max walk the rows of a chunk. The backward writes every row
of dx once, zeros included."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import Kernel, block_columns, dense, empty, jit, rows, stride

BOUNDARY, MEAN, MAX, LAST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
CODES = {"boundary": 0, "mean": 1, "max": 2, "last": 3}


@triton.jit
def _chunk_end(chunk_start, m, num_chunks, end):
    """One past the last position of chunks m"""
    return tl.load(chunk_start + m + 1, mask=m + 1 < num_chunks, other=0) + tl.where(m + 1 < num_chunks, 0, end)


@jit
def _pool_copy_kernel(
    x, chunk_start, cu_chunks, cu_seqlens, z, M, N, x_stride,
    D: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num_chunks = tl.load(cu_chunks + N)
    real = m < num_chunks
    if MODE == LAST:
        t = _chunk_end(chunk_start, m, num_chunks, tl.load(cu_seqlens + N)) - 1
    else:
        t = tl.load(chunk_start + m, mask=real, other=0)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col = (c < D)[None, :]
    v = tl.load(x + t.to(tl.int64)[:, None] * x_stride + c[None, :], mask=real[:, None] & col, other=0.0)
    tl.store(z + m.to(tl.int64)[:, None] * D + c[None, :], v, mask=(m < M)[:, None] & col)


@jit
def _pool_reduce_kernel(
    x, chunk_start, cu_chunks, cu_seqlens, z, N, x_stride,
    D: tl.constexpr, MODE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0)
    num_chunks = tl.load(cu_chunks + N)
    begin = tl.load(chunk_start + m)
    end = tl.where(m < num_chunks, _chunk_end(chunk_start, m, num_chunks, tl.load(cu_seqlens + N)), begin)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    on = c < D
    acc = tl.zeros((BLOCK_D,), tl.float32)
    if MODE == MAX:  # noqa: SIM102 (decided while compiling; the next line is not)
        if end > begin:
            acc = tl.load(x + begin.to(tl.int64) * x_stride + c, mask=on, other=0.0).to(tl.float32)
    for t in range(begin.to(tl.int64), end.to(tl.int64)):
        v = tl.load(x + t * x_stride + c, mask=on, other=0.0).to(tl.float32)
        if MODE == MAX:
            acc = tl.where((v > acc) | ((v != v) & (acc == acc)), v, acc)  # the first maximum; NaN wins
        else:
            acc += v
    if MODE == MEAN:
        acc = acc / tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(z + m.to(tl.int64) * D + c, acc, mask=on)


@jit
def _pool_bwd_kernel(
    dz, chunk_start, chunk_index, cu_chunks, cu_seqlens, dx, T, N, dz_stride,
    D: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(cu_seqlens + N)
    num_chunks = tl.load(cu_chunks + N)
    on = t < tl.minimum(end, T)
    m = tl.load(chunk_index + t, mask=on, other=0)
    begin = tl.load(chunk_start + m, mask=on, other=0)
    hit = on
    scale = tl.full((BLOCK,), 1.0, tl.float32)
    if MODE == BOUNDARY:
        hit = on & (t == begin)
    if MODE == LAST:
        hit = on & (t + 1 == _chunk_end(chunk_start, m, num_chunks, end))
    if MODE == MEAN:
        scale = 1.0 / tl.maximum(_chunk_end(chunk_start, m, num_chunks, end) - begin, 1).to(tl.float32)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col = (c < D)[None, :]
    g = tl.load(dz + m.to(tl.int64)[:, None] * dz_stride + c[None, :], mask=hit[:, None] & col, other=0.0)
    if MODE == MEAN:
        g = g.to(tl.float32) * scale[:, None]
    tl.store(dx + t.to(tl.int64)[:, None] * D + c[None, :], g, mask=(t < T)[:, None] & col)


@jit
def _pool_max_bwd_kernel(
    dz, x, chunk_start, cu_chunks, cu_seqlens, dx, T, N, M, dz_stride, x_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a chunk finds each column's maximum, then gives it the gradient; the last one zeroes padding rows."""
    m = tl.program_id(0)
    num_chunks = tl.load(cu_chunks + N)
    last = tl.load(cu_seqlens + N)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    on = c < D
    if m < num_chunks:
        begin = tl.load(chunk_start + m)
        end = _chunk_end(chunk_start, m, num_chunks, last)
        best = tl.load(x + begin.to(tl.int64) * x_stride + c, mask=on, other=0.0).to(tl.float32)
        arg = tl.zeros((BLOCK_D,), tl.int64) + begin
        for t in range(begin.to(tl.int64) + 1, end.to(tl.int64)):
            v = tl.load(x + t * x_stride + c, mask=on, other=0.0).to(tl.float32)
            better = (v > best) | ((v != v) & (best == best))
            best = tl.where(better, v, best)
            arg = tl.where(better, t, arg)
        g = tl.load(dz + m.to(tl.int64) * dz_stride + c, mask=on, other=0.0)
        for t in range(begin.to(tl.int64), end.to(tl.int64)):
            tl.store(dx + t * D + c, tl.where(arg == t, g, 0.0), mask=on)
    if m == M:
        for t in range(last.to(tl.int64), T):
            tl.store(dx + t * D + c, tl.zeros((BLOCK_D,), tl.float32), mask=on)


def _copy_plan(mode):
    return lambda D, dtype, gpu: (
        {"D": D, "MODE": mode, "BLOCK": 4, "BLOCK_D": block_columns(D, 1024)},
        {"num_warps": 4},
    )


def _walk_plan(**constexprs):
    return lambda D, dtype, gpu: ({"D": D, **constexprs, "BLOCK_D": block_columns(D, 512)}, {"num_warps": 2})


LAYOUT = {"chunk_start": "*i32", "cu_chunks": "*i32", "cu_seqlens": "*i32"}
COPY_ARGS = {"x": "*T", **LAYOUT, "z": "*T", "M": "i32", "N": "i32", "x_stride": "i32"}
REDUCE_ARGS = {"x": "*T", **LAYOUT, "z": "*T", "N": "i32", "x_stride": "i32"}
BWD_ARGS = {
    "dz": "*T", "chunk_start": "*i32", "chunk_index": "*i32", "cu_chunks": "*i32", "cu_seqlens": "*i32", "dx": "*T",
    "T": "i32", "N": "i32", "dz_stride": "i32",
}  # fmt: skip
MAX_BWD_ARGS = {
    "dz": "*T", "x": "*T", **LAYOUT, "dx": "*T", "T": "i32", "N": "i32", "M": "i32", "dz_stride": "i32",
    "x_stride": "i32",
}  # fmt: skip

FWD = {
    "boundary": Kernel(_pool_copy_kernel, COPY_ARGS, _copy_plan(0)),
    "last": Kernel(_pool_copy_kernel, COPY_ARGS, _copy_plan(3)),
    "mean": Kernel(_pool_reduce_kernel, REDUCE_ARGS, _walk_plan(MODE=1)),
    "max": Kernel(_pool_reduce_kernel, REDUCE_ARGS, _walk_plan(MODE=2)),
}
BWD = {mode: Kernel(_pool_bwd_kernel, BWD_ARGS, _copy_plan(CODES[mode])) for mode in ("boundary", "last", "mean")}
MAX_BWD = Kernel(_pool_max_bwd_kernel, MAX_BWD_ARGS, _walk_plan())
KERNELS = {
    **{f"pool_{mode}_fwd": k for mode, k in FWD.items()},
    **{f"pool_{mode}_bwd": k for mode, k in BWD.items()},
    "pool_max_bwd": MAX_BWD,
}


def _blocks(kernel: Kernel, x: Tensor) -> tuple[int, int]:
    """Rows of a program, and how many programs side by side cover the columns"""
    planned = kernel.blocks(x, x.shape[1])
    return planned.get("BLOCK", 1), triton.cdiv(x.shape[1], planned["BLOCK_D"])


def pool(x, chunk_start, chunk_index, cu_chunks, cu_seqlens, mode):
    D, M, N = x.shape[1], chunk_start.shape[0], cu_seqlens.shape[0] - 1
    x = rows(x)
    chunk_start, cu_chunks, cu_seqlens = dense(chunk_start, cu_chunks, cu_seqlens)
    z = empty(x, M, D, dtype=x.dtype)
    if x.shape[0] == 0:
        return z.zero_()
    kernel = FWD[mode]
    block, columns = _blocks(kernel, x)
    sizes = (M, N) if mode in ("boundary", "last") else (N,)
    kernel.launch(
        (triton.cdiv(M, block), columns), x, D, x, chunk_start, cu_chunks, cu_seqlens, z, *sizes, stride(x)
    )  # fmt: skip
    return z


def pool_bwd(dz, x, chunk_start, chunk_index, cu_chunks, cu_seqlens, T, mode):
    (M, D), N = dz.shape, cu_seqlens.shape[0] - 1
    dz, x = rows(dz), rows(x)
    chunk_start, chunk_index, cu_chunks, cu_seqlens = dense(chunk_start, chunk_index, cu_chunks, cu_seqlens)
    dx = empty(dz, T, D, dtype=dz.dtype)
    if T == 0:
        return dx
    if mode == "max":
        _, columns = _blocks(MAX_BWD, dz)
        MAX_BWD.launch(
            (M + 1, columns), dz, D, dz, x, chunk_start, cu_chunks, cu_seqlens, dx, T, N, M, stride(dz), stride(x)
        )  # fmt: skip
        return dx
    kernel = BWD[mode]
    block, columns = _blocks(kernel, dz)
    kernel.launch(
        (triton.cdiv(T, block), columns), dz, D, dz, chunk_start, chunk_index, cu_chunks, cu_seqlens, dx, T, N,
        stride(dz),
    )  # fmt: skip
    return dx
