"""Pooling on a GPU. boundary and last copy rows; mean and max walk the rows of a chunk. The backward writes every row
of dx once, zeros included.

Blocks of SPLIT positions that lie inside one chunk have programs of their own, as in `dechunk`: a further launch joins
what they leave, and does nothing where there are none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    SPLIT,
    Kernel,
    block_columns,
    cdiv,
    chunk_end,
    dense,
    empty,
    jit,
    outer_rows,
    rows,
    stride,
)

BOUNDARY, MEAN, MAX, LAST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
CODES = {"boundary": 0, "mean": 1, "max": 2, "last": 3}


@jit
def _pool_copy_kernel(
    x, chunk_start, cu_chunks, cu_seqlens, z, M, N, x_stride,
    D: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num_chunks = tl.load(cu_chunks + N)
    real = m < num_chunks
    if MODE == LAST:
        t = chunk_end(chunk_start, m, num_chunks, tl.load(cu_seqlens + N)) - 1
    else:
        t = tl.load(chunk_start + m, mask=real, other=0)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col = (c < D)[None, :]
    v = tl.load(x + t.to(tl.int64)[:, None] * x_stride + c[None, :], mask=real[:, None] & col, other=0.0)
    tl.store(z + m.to(tl.int64)[:, None] * D + c[None, :], v, mask=(m < M)[:, None] & col)


@triton.jit
def _taken(acc, v, MODE: tl.constexpr):
    """A further row v into the sum, or into the maximum: the first of equals stays, NaN wins"""
    if MODE == MAX:
        return tl.where((v > acc) | ((v != v) & (acc == acc)), v, acc)
    return acc + v


@triton.jit
def _walked(acc, x, begin, end, c, on, x_stride, MODE: tl.constexpr):
    """Rows begin .. end - 1 taken into acc"""
    for t in range(begin.to(tl.int64), end.to(tl.int64)):
        acc = _taken(acc, tl.load(x + t * x_stride + c, mask=on, other=0.0).to(tl.float32), MODE)
    return acc


@triton.jit
def _nothing(MODE: tl.constexpr, BLOCK_D: tl.constexpr):
    return tl.full((BLOCK_D,), float("-inf") if MODE == MAX else 0.0, tl.float32)


@triton.jit
def _inside(chunk_index, t0, pack_end, SPLIT: tl.constexpr):
    """Whether the block of SPLIT positions from t0 lies inside one chunk, and in which"""
    whole = t0 + SPLIT <= pack_end
    m = tl.load(chunk_index + t0, mask=whole, other=0)
    return whole & (m == tl.load(chunk_index + t0 + SPLIT - 1, mask=whole, other=-1)), m


@triton.jit
def _first_inside(chunk_start, chunk_index, b, pack_end, SPLIT: tl.constexpr):
    """Whether block b is the first of those inside its chunk, which chunk that is and where it begins"""
    inside, m = _inside(chunk_index, b * SPLIT, pack_end, SPLIT)
    begin = tl.load(chunk_start + m, mask=inside, other=0)
    return inside & (tl.cdiv(begin, SPLIT) == b), m, begin


@jit
def _pool_reduce_kernel(
    x, chunk_start, chunk_index, cu_chunks, cu_seqlens, z, parts, M, N, x_stride,
    D: tl.constexpr, MODE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs 0 .. M - 1 have a chunk each, and leave those with whole blocks of SPLIT positions inside to the others,
    which have such a block each and put its sum or maximum into their row of `parts`."""
    pid = tl.program_id(0)
    num_chunks = tl.load(cu_chunks + N)
    pack_end = tl.load(cu_seqlens + N)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    on = c < D
    if pid < M:
        begin = tl.load(chunk_start + pid)
        end = begin
        if pid < num_chunks:
            end = chunk_end(chunk_start, pid, num_chunks, pack_end)
        if tl.cdiv(begin, SPLIT) >= end // SPLIT:
            acc = _walked(_nothing(MODE, BLOCK_D), x, begin, end, c, on, x_stride, MODE)
            if MODE == MEAN:
                acc = acc / tl.maximum(end - begin, 1).to(tl.float32)
            tl.store(z + pid.to(tl.int64) * D + c, tl.where(end > begin, acc, 0.0), mask=on)
    else:
        b = pid - M
        inside, _ = _inside(chunk_index, b * SPLIT, pack_end, SPLIT)
        if inside:
            acc = _walked(_nothing(MODE, BLOCK_D), x, b * SPLIT, (b + 1) * SPLIT, c, on, x_stride, MODE)
            tl.store(parts + b.to(tl.int64) * D + c, acc, mask=on)


@jit
def _pool_join_kernel(
    x, chunk_start, chunk_index, cu_chunks, cu_seqlens, z, parts, N, x_stride,
    D: tl.constexpr, MODE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program a block; that of the first block inside a chunk joins the chunk's parts in order, and the rows before
    and after them."""
    b = tl.program_id(0)
    num_chunks = tl.load(cu_chunks + N)
    pack_end = tl.load(cu_seqlens + N)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    on = c < D
    joins, m, begin = _first_inside(chunk_start, chunk_index, b, pack_end, SPLIT)
    if joins:
        end = chunk_end(chunk_start, m, num_chunks, pack_end)
        head_end, tail = outer_rows(begin, end, SPLIT)
        acc = _walked(_nothing(MODE, BLOCK_D), x, begin, head_end, c, on, x_stride, MODE)
        for i in range(b, end // SPLIT):
            acc = _taken(acc, tl.load(parts + (b * 0 + i).to(tl.int64) * D + c, mask=on, other=0.0), MODE)
        acc = _walked(acc, x, tail, end, c, on, x_stride, MODE)
        if MODE == MEAN:
            acc = acc / (end - begin).to(tl.float32)
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
        hit = on & (t + 1 == chunk_end(chunk_start, m, num_chunks, end))
    if MODE == MEAN:
        scale = 1.0 / tl.maximum(chunk_end(chunk_start, m, num_chunks, end) - begin, 1).to(tl.float32)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col = (c < D)[None, :]
    g = tl.load(dz + m.to(tl.int64)[:, None] * dz_stride + c[None, :], mask=hit[:, None] & col, other=0.0)
    if MODE == MEAN:
        g = g.to(tl.float32) * scale[:, None]
    tl.store(dx + t.to(tl.int64)[:, None] * D + c[None, :], g, mask=(t < T)[:, None] & col)


@triton.jit
def _larger(v, best, arg):
    """Where v is the new maximum: NaN wins, and a row of nothing but -inf has its first position as well"""
    return (v > best) | ((v != v) & (best == best)) | (arg < 0)


@triton.jit
def _first_maximum(best, arg, x, begin, end, c, on, x_stride):
    """The maximum of best and of rows begin .. end - 1, and where it came from"""
    for t in range(begin.to(tl.int64), end.to(tl.int64)):
        v = tl.load(x + t * x_stride + c, mask=on, other=0.0).to(tl.float32)
        better = _larger(v, best, arg)
        best = tl.where(better, v, best)
        arg = tl.where(better, t, arg)
    return best, arg


@triton.jit
def _given(dx, arg, g, begin, end, c, on, D: tl.constexpr):
    """g to the rows it is for, 0 to the others of begin .. end - 1"""
    for t in range(begin.to(tl.int64), end.to(tl.int64)):
        tl.store(dx + t * D + c, tl.where(arg == t, g, 0.0), mask=on)


@jit
def _pool_max_find_kernel(
    dz, x, chunk_start, chunk_index, cu_chunks, cu_seqlens, dx, parts, places, T, M, N, dz_stride, x_stride,
    D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As in the forward; a chunk without whole blocks inside is dealt with here, of the others each block leaves its
    maximum in `parts` and the position in `places`. Zeroes the rows past the last sequence."""
    pid = tl.program_id(0)
    num_chunks = tl.load(cu_chunks + N)
    pack_end = tl.load(cu_seqlens + N)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    on = c < D
    best = tl.full((BLOCK_D,), float("-inf"), tl.float32)
    arg = tl.full((BLOCK_D,), -1, tl.int64)
    if pid < M:
        if pid < num_chunks:
            begin = tl.load(chunk_start + pid)
            end = chunk_end(chunk_start, pid, num_chunks, pack_end)
            if tl.cdiv(begin, SPLIT) >= end // SPLIT:
                best, arg = _first_maximum(best, arg, x, begin, end, c, on, x_stride)
                g = tl.load(dz + pid.to(tl.int64) * dz_stride + c, mask=on, other=0.0)
                _given(dx, arg, g, begin, end, c, on, D)
    else:
        b = pid - M
        t0 = b * SPLIT
        inside, _ = _inside(chunk_index, t0, pack_end, SPLIT)
        if inside:
            best, arg = _first_maximum(best, arg, x, t0, t0 + SPLIT, c, on, x_stride)
            tl.store(parts + b.to(tl.int64) * D + c, best, mask=on)
            tl.store(places + b.to(tl.int64) * D + c, arg, mask=on)
        _given(dx, arg * 0 - 1, best, tl.maximum(t0, pack_end), tl.minimum(t0 + SPLIT, T), c, on, D)


@jit
def _pool_max_join_kernel(
    dz, x, chunk_start, chunk_index, cu_chunks, cu_seqlens, dx, parts, places, N, dz_stride, x_stride,
    D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The program of the first block inside a chunk puts the place of the chunk's maximum into that block's row."""
    b = tl.program_id(0)
    num_chunks = tl.load(cu_chunks + N)
    pack_end = tl.load(cu_seqlens + N)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    on = c < D
    joins, m, begin = _first_inside(chunk_start, chunk_index, b, pack_end, SPLIT)
    if joins:
        end = chunk_end(chunk_start, m, num_chunks, pack_end)
        head_end, tail = outer_rows(begin, end, SPLIT)
        best = tl.full((BLOCK_D,), float("-inf"), tl.float32)
        arg = tl.full((BLOCK_D,), -1, tl.int64)
        best, arg = _first_maximum(best, arg, x, begin, head_end, c, on, x_stride)
        for i in range(b, end // SPLIT):
            row = (b * 0 + i).to(tl.int64) * D + c
            v = tl.load(parts + row, mask=on, other=0.0)
            better = _larger(v, best, arg)
            best = tl.where(better, v, best)
            arg = tl.where(better, tl.load(places + row, mask=on, other=0).to(tl.int64), arg)
        best, arg = _first_maximum(best, arg, x, tail, end, c, on, x_stride)
        tl.store(places + b.to(tl.int64) * D + c, arg, mask=on)
        g = tl.load(dz + m.to(tl.int64) * dz_stride + c, mask=on, other=0.0)
        _given(dx, arg, g, begin, head_end, c, on, D)
        _given(dx, arg, g, tail, end, c, on, D)


@jit
def _pool_max_spread_kernel(
    dz, chunk_start, chunk_index, cu_seqlens, dx, places, N, dz_stride,
    D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows of a block inside a chunk"""
    b = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    on = c < D
    inside, m = _inside(chunk_index, b * SPLIT, tl.load(cu_seqlens + N), SPLIT)
    if inside:
        first_block = tl.cdiv(tl.load(chunk_start + m), SPLIT)
        arg = tl.load(places + first_block.to(tl.int64) * D + c, mask=on, other=0)
        g = tl.load(dz + m.to(tl.int64) * dz_stride + c, mask=on, other=0.0)
        _given(dx, arg, g, b * SPLIT, (b + 1) * SPLIT, c, on, D)


def _copy_plan(mode):
    return lambda D, dtype, gpu: (
        {"D": D, "MODE": mode, "BLOCK": 4, "BLOCK_D": block_columns(D, 1024)},
        {"num_warps": 4},
    )


def _walk_plan(**constexprs):
    constexprs = {**constexprs, "SPLIT": SPLIT}
    return lambda D, dtype, gpu: ({"D": D, **constexprs, "BLOCK_D": block_columns(D, 512)}, {"num_warps": 2})


LAYOUT = {"chunk_start": "*i32", "chunk_index": "*i32", "cu_chunks": "*i32", "cu_seqlens": "*i32"}
COPY_ARGS = {
    "x": "*T", "chunk_start": "*i32", "cu_chunks": "*i32", "cu_seqlens": "*i32", "z": "*T", "M": "i32", "N": "i32",
    "x_stride": "i32",
}  # fmt: skip
BWD_ARGS = {"dz": "*T", **LAYOUT, "dx": "*T", "T": "i32", "N": "i32", "dz_stride": "i32"}
REDUCE_ARGS = {"x": "*T", **LAYOUT, "z": "*T", "parts": "*fp32", "M": "i32", "N": "i32", "x_stride": "i32"}
JOIN_ARGS = {name: kind for name, kind in REDUCE_ARGS.items() if name != "M"}
MAX_FIND_ARGS = {
    "dz": "*T", "x": "*T", **LAYOUT, "dx": "*T", "parts": "*fp32", "places": "*i32", "T": "i32", "M": "i32", "N": "i32",
    "dz_stride": "i32", "x_stride": "i32",
}  # fmt: skip
MAX_JOIN_ARGS = {name: kind for name, kind in MAX_FIND_ARGS.items() if name not in ("T", "M")}
MAX_SPREAD_ARGS = {
    "dz": "*T", "chunk_start": "*i32", "chunk_index": "*i32", "cu_seqlens": "*i32", "dx": "*T", "places": "*i32",
    "N": "i32", "dz_stride": "i32",
}  # fmt: skip

COPY = {mode: Kernel(_pool_copy_kernel, COPY_ARGS, _copy_plan(CODES[mode])) for mode in ("boundary", "last")}
REDUCE = {mode: Kernel(_pool_reduce_kernel, REDUCE_ARGS, _walk_plan(MODE=CODES[mode])) for mode in ("mean", "max")}
JOIN = {mode: Kernel(_pool_join_kernel, JOIN_ARGS, _walk_plan(MODE=CODES[mode])) for mode in ("mean", "max")}
BWD = {mode: Kernel(_pool_bwd_kernel, BWD_ARGS, _copy_plan(CODES[mode])) for mode in ("boundary", "last", "mean")}
MAX_FIND = Kernel(_pool_max_find_kernel, MAX_FIND_ARGS, _walk_plan())
MAX_JOIN = Kernel(_pool_max_join_kernel, MAX_JOIN_ARGS, _walk_plan())
MAX_SPREAD = Kernel(_pool_max_spread_kernel, MAX_SPREAD_ARGS, _walk_plan())
KERNELS = {
    **{f"pool_{mode}_fwd": k for mode, k in (COPY | REDUCE).items()},
    **{f"pool_{mode}_join": k for mode, k in JOIN.items()},
    **{f"pool_{mode}_bwd": k for mode, k in BWD.items()},
    "pool_max_bwd_find": MAX_FIND,
    "pool_max_bwd_join": MAX_JOIN,
    "pool_max_bwd_spread": MAX_SPREAD,
}


def _blocks(kernel: Kernel, x: Tensor) -> tuple[int, int]:
    """Rows of a program, and how many programs side by side cover the columns"""
    planned = kernel.blocks(x, x.shape[1])
    return planned.get("BLOCK", 1), cdiv(x.shape[1], planned["BLOCK_D"])


def pool(x, chunk_start, chunk_index, cu_chunks, cu_seqlens, mode):
    (T, D), M, N = x.shape, chunk_start.shape[0], cu_seqlens.shape[0] - 1
    x = rows(x)
    chunk_start, chunk_index, cu_chunks, cu_seqlens = dense(chunk_start, chunk_index, cu_chunks, cu_seqlens)
    z = empty(x, M, D, dtype=x.dtype)
    if T == 0:
        return z.zero_()
    if mode in COPY:
        block, columns = _blocks(COPY[mode], x)
        COPY[mode].launch(
            (cdiv(M, block), columns), x, D, x, chunk_start, cu_chunks, cu_seqlens, z, M, N, stride(x)
        )  # fmt: skip
        return z
    _, columns = _blocks(REDUCE[mode], x)
    split = T // SPLIT  # blocks that may lie inside a chunk
    layout, parts = (chunk_start, chunk_index, cu_chunks, cu_seqlens), empty(x, split, D)
    REDUCE[mode].launch((M + split, columns), x, D, x, *layout, z, parts, M, N, stride(x))
    JOIN[mode].launch((split, columns), x, D, x, *layout, z, parts, N, stride(x))
    return z


def pool_bwd(dz, x, chunk_start, chunk_index, cu_chunks, cu_seqlens, T, mode):
    (M, D), N = dz.shape, cu_seqlens.shape[0] - 1
    dz, x = rows(dz), rows(x)
    chunk_start, chunk_index, cu_chunks, cu_seqlens = dense(chunk_start, chunk_index, cu_chunks, cu_seqlens)
    dx = empty(dz, T, D, dtype=dz.dtype)
    if T == 0:
        return dx
    layout = chunk_start, chunk_index, cu_chunks, cu_seqlens
    if mode != "max":
        block, columns = _blocks(BWD[mode], dz)
        BWD[mode].launch((cdiv(T, block), columns), dz, D, dz, *layout, dx, T, N, stride(dz))
        return dx
    _, columns = _blocks(MAX_FIND, dz)
    split = T // SPLIT
    parts, places = empty(dz, split, D), empty(dz, split, D, dtype=torch.int32)
    strides = stride(dz), stride(x)
    MAX_FIND.launch((M + cdiv(T, SPLIT), columns), dz, D, dz, x, *layout, dx, parts, places, T, M, N, *strides)
    MAX_JOIN.launch((split, columns), dz, D, dz, x, *layout, dx, parts, places, N, *strides)
    MAX_SPREAD.launch(
        (split, columns), dz, D, dz, chunk_start, chunk_index, cu_seqlens, dx, places, N, stride(dz)
    )  # fmt: skip
    return dx
