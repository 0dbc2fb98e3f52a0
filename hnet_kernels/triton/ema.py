"""General EMA on a GPU, for any weights: y_t = a_t y_{t-1} + x_t with a_t = 1 - p_t (0 at a sequence's start) and
x_t = p_t z_t (there with a_t times the initial state added).

Three launches each way: what a tile of BLOCK_T positions adds to a state that enters it; the state entering every tile;
the tile again, now with that state. Inside a tile the recurrence is a product with the lower-triangular matrix
W[i, j] = a_{j+1} ... a_i, made by a cumulative product, so weights of exactly 0 and 1 are exact. The backward runs
g_t = dy_t + a_{t+1} g_{t+1} through the same kernels, with W transposed.

A weight of exactly 0 takes nothing over, not even what is not finite: that stays in its sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    Kernel,
    block_columns,
    cdiv,
    decay_matrix,
    dense,
    dot_precision,
    empty,
    jit,
    rows,
    search_steps,
    sequence_of,
    stride,
)

BLOCK_T = 32  # positions of a tile
INF = tl.constexpr(float("inf"))


@triton.jit
def _product(w, x, PRECISION: tl.constexpr):
    """w @ x, where a weight of 0 takes nothing over. A row that takes over one that is not finite is NaN in the columns
    where any row is not."""
    finite = tl.abs(x) < INF
    lost = tl.where(finite, 0.0, 1.0)
    touched = tl.max(tl.where(w != 0.0, tl.max(lost, 1)[None, :], 0.0), 1)
    in_columns = tl.max(lost, 0)
    out = tl.dot(w, tl.where(finite, x, 0.0), input_precision=PRECISION)
    return tl.where((touched[:, None] > 0.0) & (in_columns[None, :] > 0.0), float("nan"), out)


@triton.jit
def _times(w, x):
    """w x, 0 where w is"""
    return tl.where(w != 0.0, w * x, 0.0)


@triton.jit
def _weights(p, cu_seqlens, t, T, N, steps):
    """p and a at positions t, their sequence, and which of them start and end one. A p that is not finite shows in its
    row; its a must be, to multiply others."""
    on = t < T
    seq = sequence_of(t, cu_seqlens, N, steps)
    first = on & (t == tl.load(cu_seqlens + seq, mask=on, other=-1))
    last = on & (t + 1 == tl.load(cu_seqlens + seq + 1, mask=on, other=-1))
    pt = tl.load(p + t, mask=on, other=0.0)
    a = tl.where(tl.abs(pt) < INF, 1.0 - pt, 1.0)
    return pt, tl.where(first, 0.0, a), seq, first, last


@triton.jit
def _input(z, p, initial, t, c, seq, first, on, z_stride, D: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """x (BLOCK_T, BLOCK_D) fp32"""
    m = on[:, None] & (c < D)[None, :]
    x = p[:, None] * tl.load(z + t.to(tl.int64)[:, None] * z_stride + c[None, :], mask=m, other=0.0).to(tl.float32)
    if HAS_INITIAL:
        at = initial + seq.to(tl.int64)[:, None] * D + c[None, :]
        x += (1.0 - p)[:, None] * tl.load(at, mask=m & first[:, None], other=0.0)
    return x


@triton.jit
def _output_gradient(dy, dfinal, t, c, seq, last, on, dy_stride, D: tl.constexpr, HAS_DFINAL: tl.constexpr):
    m = on[:, None] & (c < D)[None, :]
    d = tl.load(dy + t.to(tl.int64)[:, None] * dy_stride + c[None, :], mask=m, other=0.0).to(tl.float32)
    if HAS_DFINAL:
        d += tl.load(dfinal + seq.to(tl.int64)[:, None] * D + c[None, :], mask=m & last[:, None], other=0.0)
    return d


@jit
def _ema_tile_kernel(
    rows, p, cu_seqlens, edge, decay, added, T, N, steps, row_stride,
    D: tl.constexpr, HAS_EDGE: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """decay <- a_begin ... a_end of a tile; added <- what the tile adds to the state that crosses it."""
    pid = tl.program_id(0)
    t = pid * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    on = t < T
    pt, a, seq, first, last = _weights(p, cu_seqlens, t, T, N, steps)
    a = tl.where(on, a, 1.0)
    if REVERSE:  # the state before the tile is a_begin g_begin
        v = _output_gradient(rows, edge, t, c, seq, last, on, row_stride, D, HAS_EDGE)
        w = tl.cumprod(a, 0)
    else:
        v = _input(rows, pt, edge, t, c, seq, first, on, row_stride, D, HAS_EDGE)
        _, a_next, _, _, _ = _weights(p, cu_seqlens, t + 1, T, N, steps)
        a_next = tl.where((t + 1 < T) & (t + 1 < (pid + 1) * BLOCK), a_next, 1.0)
        w = tl.cumprod(a_next, 0, reverse=True)
    total = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, tl.cumprod(a, 0), 0.0))
    tl.store(decay + pid, total)
    tl.store(added + pid.to(tl.int64) * D + c, tl.sum(_times(w[:, None], v), 0), mask=c < D)


@jit
def _ema_carry_kernel(
    decay, added, carry, tiles,
    D: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """carry <- the state entering every tile, BLOCK tiles at a time."""
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    col = (c < D)[None, :]
    state = tl.zeros((BLOCK_D,), tl.float32)
    for i0 in range(0, tiles, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        tile = i
        if REVERSE:
            tile = tiles - 1 - i
        on = i < tiles
        d = tl.load(decay + tile, mask=on, other=1.0)
        v = tl.load(added + tile.to(tl.int64)[:, None] * D + c[None, :], mask=on[:, None] & col, other=0.0)
        after = _product(decay_matrix(d, 0, BLOCK), v, PRECISION) + _times(tl.cumprod(d, 0)[:, None], state[None, :])
        following = tile + 1
        if REVERSE:
            following = tile - 1
        inside = on & (following >= 0) & (following < tiles)
        tl.store(carry + following.to(tl.int64)[:, None] * D + c[None, :], after, mask=inside[:, None] & col)
        if i0 == 0:
            entry = tiles * 0
            if REVERSE:
                entry = tiles - 1
            tl.store(carry + entry.to(tl.int64) * D + c, tl.zeros((BLOCK_D,), tl.float32), mask=c < D)
        state = tl.sum(tl.where((tl.arange(0, BLOCK) == BLOCK - 1)[:, None], after, 0.0), 0)


@jit
def _ema_fwd_kernel(
    z, p, cu_seqlens, initial, carry, y, final, T, N, steps, z_stride,
    D: tl.constexpr, HAS_INITIAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    t = pid * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    on = t < T
    m = on[:, None] & (c < D)[None, :]
    pt, a, seq, first, last = _weights(p, cu_seqlens, t, T, N, steps)
    x = _input(z, pt, initial, t, c, seq, first, on, z_stride, D, HAS_INITIAL)
    enter = tl.load(carry + pid.to(tl.int64) * D + c, mask=c < D, other=0.0)
    out = _product(decay_matrix(a, 0, BLOCK), x, PRECISION) + _times(tl.cumprod(a, 0)[:, None], enter[None, :])
    tl.store(y + t.to(tl.int64)[:, None] * D + c[None, :], out, mask=m)
    tl.store(final + seq.to(tl.int64)[:, None] * D + c[None, :], out, mask=m & last[:, None])


@jit
def _ema_bwd_kernel(
    dy, dfinal, z, p, cu_seqlens, initial, carry, carry_g, dz, dp_part, dinitial, T, N, steps, dy_stride, z_stride,
    D: tl.constexpr, HAS_DFINAL: tl.constexpr, HAS_INITIAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    pid_d = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    t = pid * BLOCK + i
    c = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    on = t < T
    m = on[:, None] & (c < D)[None, :]
    pt, a, seq, first, last = _weights(p, cu_seqlens, t, T, N, steps)
    a = tl.where(on, a, 1.0)
    at = pid.to(tl.int64) * D + c

    _, a_next, _, _, _ = _weights(p, cu_seqlens, t + 1, T, N, steps)
    a_next = tl.where((t + 1 < T) & (i + 1 < BLOCK), a_next, 1.0)
    d = _output_gradient(dy, dfinal, t, c, seq, last, on, dy_stride, D, HAS_DFINAL)
    g = _product(tl.trans(decay_matrix(a, 0, BLOCK)), d, PRECISION)
    g += _times(tl.cumprod(a_next, 0, reverse=True)[:, None], tl.load(carry_g + at, mask=c < D, other=0.0)[None, :])
    rows = t.to(tl.int64)[:, None]
    tl.store(dz + rows * D + c[None, :], pt[:, None] * g, mask=m)

    # y_{t-1} again, from the tile's inputs and the state that entered it
    x = _input(z, pt, initial, t, c, seq, first, on, z_stride, D, HAS_INITIAL)
    _, a_before, _, _, _ = _weights(p, cu_seqlens, tl.maximum(t - 1, 0), T, N, steps)
    a_before = tl.where(i > 0, a_before, 1.0)
    before = _product(decay_matrix(a_before, 1, BLOCK), x, PRECISION)
    before += _times(tl.cumprod(a_before, 0)[:, None], tl.load(carry + at, mask=c < D, other=0.0)[None, :])
    before = tl.where(first[:, None], 0.0, before)
    edge = seq.to(tl.int64)[:, None] * D + c[None, :]
    if HAS_INITIAL:
        before += tl.load(initial + edge, mask=m & first[:, None], other=0.0)
        tl.store(dinitial + edge, (1.0 - pt)[:, None] * g, mask=m & first[:, None])
    zt = tl.load(z + rows * z_stride + c[None, :], mask=m, other=0.0).to(tl.float32)
    tl.store(dp_part + pid_d.to(tl.int64) * T + t, tl.sum(g * (zt - before), 1), mask=on)


# --- launches -----------------------------------------------------------------------------------------------------


def _plan(precise: bool, most: int = 128, **constexprs):
    def plan(D, dtype, gpu):
        width, warps = (32, 4) if gpu == "gfx942" else (most, 8)
        constants = {"D": D, **constexprs, "BLOCK": BLOCK_T, "BLOCK_D": block_columns(D, width)}
        return constants | ({"PRECISION": dot_precision(gpu)} if precise else {}), {"num_warps": warps, "num_stages": 1}

    return plan


def _carry_plan(reverse: bool):
    def plan(D, dtype, gpu):
        constants = {"D": D, "REVERSE": reverse, "PRECISION": dot_precision(gpu), "BLOCK": 32}
        return constants | {"BLOCK_D": block_columns(D, 32)}, {"num_warps": 8, "num_stages": 1}

    return plan


SIZES = {"T": "i32", "N": "i32", "steps": "i32"}
TILE_ARGS = {
    "rows": "*T", "p": "*fp32", "cu_seqlens": "*i32", "edge": "*fp32", "decay": "*fp32", "added": "*fp32", **SIZES,
    "row_stride": "i32",
}  # fmt: skip
CARRY_ARGS = {"decay": "*fp32", "added": "*fp32", "carry": "*fp32", "tiles": "i32"}
TILE = {r: Kernel(_ema_tile_kernel, TILE_ARGS, _plan(False, HAS_EDGE=True, REVERSE=r)) for r in (False, True)}
NO_TRAINING = "the general ema is no part of an H-Net's step; a tile's triangular matrices stand in registers"
CARRY = {r: Kernel(_ema_carry_kernel, CARRY_ARGS, _carry_plan(r), few_warps=NO_TRAINING) for r in (False, True)}
FWD = Kernel(
    _ema_fwd_kernel,
    {
        "z": "*T", "p": "*fp32", "cu_seqlens": "*i32", "initial": "*fp32", "carry": "*fp32", "y": "*T",
        "final": "*fp32", **SIZES, "z_stride": "i32",
    },
    _plan(True, 64, HAS_INITIAL=True),
    few_warps=NO_TRAINING,
)  # fmt: skip
BWD = Kernel(
    _ema_bwd_kernel,
    {
        "dy": "*T", "dfinal": "*fp32", "z": "*T", "p": "*fp32", "cu_seqlens": "*i32", "initial": "*fp32",
        "carry": "*fp32", "carry_g": "*fp32", "dz": "*T", "dp_part": "*fp32", "dinitial": "*fp32", **SIZES,
        "dy_stride": "i32", "z_stride": "i32",
    },
    _plan(True, HAS_DFINAL=True, HAS_INITIAL=True),
    few_warps=NO_TRAINING,
)  # fmt: skip
KERNELS = {
    "ema_tile": TILE[False],
    "ema_tile_reverse": TILE[True],
    "ema_carry": CARRY[False],
    "ema_carry_reverse": CARRY[True],
    "ema_fwd": FWD,
    "ema_bwd": BWD,
}


def _columns(kernel, x):
    return cdiv(x.shape[1], kernel.blocks(x, x.shape[1])["BLOCK_D"])


def _entering(x, p, cu_seqlens, edge, reverse):
    """(tiles, D) fp32: the state entering every tile."""
    (T, D), N = x.shape, cu_seqlens.shape[0] - 1
    tiles = cdiv(T, BLOCK_T)
    decay, added, carry = empty(x, tiles), empty(x, tiles, D), empty(x, tiles, D)
    TILE[reverse].launch(
        (tiles, _columns(TILE[reverse], x)), x, D, x, p, cu_seqlens, edge, decay, added, T, N, search_steps(N),
        stride(x), HAS_EDGE=edge is not None,
    )  # fmt: skip
    CARRY[reverse].launch((_columns(CARRY[reverse], x),), x, D, decay, added, carry, tiles)
    return carry


def ema(z, p, cu_seqlens, initial_state):
    (T, D), N = z.shape, cu_seqlens.shape[0] - 1
    z = rows(z)
    p, cu_seqlens, initial = dense(p, cu_seqlens, initial_state)
    y = empty(z, T, D, dtype=z.dtype)
    final = empty(z, N, D).zero_() if initial is None else initial.clone()  # what empty sequences return
    if T:
        carry = _entering(z, p, cu_seqlens, initial, reverse=False)
        FWD.launch(
            (carry.shape[0], _columns(FWD, z)), z, D, z, p, cu_seqlens, initial, carry, y, final,
            T, N, search_steps(N), stride(z), HAS_INITIAL=initial is not None,
        )  # fmt: skip
    return y, final


def ema_bwd(dy, dfinal, z, p, cu_seqlens, initial_state):
    (T, D), N = z.shape, cu_seqlens.shape[0] - 1
    dy, z = rows(dy), rows(z)
    p, cu_seqlens, initial, dfinal = dense(p, cu_seqlens, initial_state, dfinal)
    columns = _columns(BWD, z)
    dz, dp_part = empty(z, T, D, dtype=z.dtype), empty(z, columns, T)
    dinitial = empty(z, 0)
    if initial is not None:
        dinitial = torch.zeros_like(initial) if dfinal is None else dfinal.clone()  # what empty sequences return
    if T:
        carry = _entering(z, p, cu_seqlens, initial, reverse=False)
        carry_g = _entering(dy, p, cu_seqlens, dfinal, reverse=True)
        BWD.launch(
            (carry.shape[0], columns), z, D, dy, dfinal, z, p, cu_seqlens, initial, carry, carry_g, dz, dp_part,
            dinitial, T, N, search_steps(N), stride(dy), stride(z),
            HAS_DFINAL=dfinal is not None, HAS_INITIAL=initial is not None,
        )  # fmt: skip
    return dz, dp_part.sum(0), dinitial
