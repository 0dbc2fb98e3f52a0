"""The scan of Mamba-2 on a GPU, forward and backward: state space duality (arXiv 2405.21060, section 6).

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T      y_t = h_t C_t + skip x_t      h = 0 before every sequence

Chunks of 64 positions (32 in fp32) on a grid over the whole pack, whatever the sequences: shapes follow from T alone.
Inside a chunk y = (C B^T * decay) (dt x); the state (P, S) of a head is handed on from chunk to chunk in fp32. Heads
share B and C, which nobody expands. Where one sequence ends and another begins the decay is 0, by comparing the first
positions of their sequences (`first`, written by `ssd_edges`), never by the exponential of a large number; and
`log_decay`, the sum of dt A up to each position, begins anew at a chunk and at a sequence, so that no rounding of one
sequence depends on another either. What is not finite stays in its sequence as long as no chunk holds both.

Forward: states of the chunks, their recurrence, outputs. Backward, which makes the states again instead of keeping
them: the same two the other way for the gradients of the states (g), then for each position j with the row
u_j = sum_i (C_i B_j decay_ij) dy_i + decay_j g B_j

    dx_j = dt_j u_j + skip dy_j      ddt_j = <x_j, u_j> + A da_j      da_k = sum of what decays at k, over i >= k > j

and dB, dC from the sums over heads of <dy_i, x_j> decay_ij dt_j, of which a program has HEADS and leaves partial sums.

Why not fla-core's simple_gla, which computes the same with q = C, k = B, v = dt x, g = dt A: it wants q and k for every
head (16 KB a position at d_model 1024 instead of 0.5), builds the indices of a ragged pack on the host, and fuses
neither dt nor the skip; of what it saves, these five kernels, the edges would have remained.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .common import Kernel, block_columns, decay_matrix, dot_dtype, dot_precision, jit


def chunk(dtype: torch.dtype) -> int:
    """Positions of a chunk; more in fp32 would not fit into registers."""
    return 32 if dtype == torch.float32 else 64


@triton.jit
def decay(log, on):
    """exp(log) where `on`, else 0"""
    return tl.where(on, tl.exp(tl.where(on, log, 0.0)), 0.0)


@triton.jit
def _fading(log, felt):
    """exp(log) where `felt` is 1, 0 where it is 0. Where it is 1, log is above 0 by rounding only. A number, as AMD's
    compiler would have to spill so many truth values."""
    return tl.exp(tl.minimum(log, 0.0)) * felt


@triton.jit
def _rows(base, t, T, stride, c, width):
    """Rows t of a matrix, columns c; 0 outside"""
    on = (t < T)[:, None] & (c < width)[None, :]
    return tl.load(base + t.to(tl.int64)[:, None] * stride + c[None, :], mask=on, other=0.0)


@triton.jit
def _state(base, i, on, p, s, P: tl.constexpr, S: tl.constexpr):
    """Rows p and columns s of the i-th matrix (P, S), 0 unless `on`"""
    at = base + (i.to(tl.int64) * P + p)[:, None] * S + s[None, :]
    return tl.load(at, mask=(s < S)[None, :] & on, other=0.0)


@triton.jit
def _dot(a, b, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)


@triton.jit
def _total(v):
    """The sum of a vector, as a vector of one: Triton 3.7.1 fails on sm_100 where a vector that comes from a product is
    reduced to a number"""
    return tl.sum(v[:, None], 0)


@triton.jit
def _times(t, T, h, dt, log_decay):
    """dt and log_decay (H, T) of head h at positions t"""
    at = h * T.to(tl.int64) + t
    return tl.load(dt + at, mask=t < T, other=0.0), tl.load(log_decay + at, mask=t < T, other=0.0)


@triton.jit
def _positions(c, T, h, dt, log_decay, first, CHUNK: tl.constexpr):
    """Positions of chunk c; dt and log_decay of head h there; the sequences they are in, -1 past T"""
    t = c * CHUNK + tl.arange(0, CHUNK)
    step, log = _times(t, T, h, dt, log_decay)
    return t, step, log, tl.load(first + t, mask=t < T, other=-1)


@triton.jit
def _entering(first, log, own, c, CHUNK: tl.constexpr):
    """By how much the state before chunk c is felt at each of its positions, and the sequence it comes from"""
    before = tl.load(first + c * CHUNK - 1, mask=c > 0, other=-2)
    return decay(log, own == before), before


@triton.jit
def _leaving(first, log_decay, log, own, h, c, T, tiles, CHUNK: tl.constexpr):
    """How much of each position of chunk c is left in the state after it; log_decay and sequence at its end"""
    end = c * CHUNK + CHUNK - 1
    on = c + 1 < tiles
    after = tl.load(first + end, mask=on, other=-3)
    log_end = tl.load(log_decay + h * T.to(tl.int64) + end, mask=on, other=0.0)
    return decay(log_end - log, own == after), log_end, after


@jit
def _ssd_states_kernel(
    rows, cols, dt, log_decay, first, states, T, H, tiles, rows_stride, cols_stride,
    REVERSE: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk, but the last, adds to the state after it: rows x, cols B. REVERSE: what a chunk, but the first,
    adds to the gradient of the state before it: rows dy, cols C."""
    pid = tl.program_id(0)
    h = pid % H
    c = pid // H
    if REVERSE:
        c += 1
    t, step, log, own = _positions(c, T, h, dt, log_decay, first, CHUNK)
    if REVERSE:
        weight, _ = _entering(first, log, own, c, CHUNK)
    else:
        weight, _, _ = _leaving(first, log_decay, log, own, h, c, T, tiles, CHUNK)
        weight *= step
    a = _rows(rows + h * P, t, T, rows_stride, tl.arange(0, P), P).to(tl.float32) * weight[:, None]
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    b = _rows(cols, t, T, cols_stride, s, S)
    at = states + (pid.to(tl.int64) * P + tl.arange(0, P))[:, None] * S + s[None, :]
    acc = tl.zeros((P, BLOCK_S), tl.float32)
    tl.store(at, _dot(tl.trans(a), b, acc, DOT, PRECISION), mask=(s < S)[None, :])


@jit
def _ssd_pass_kernel(
    states, log_decay, first, out, T, H, tiles,
    REVERSE: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out_k = states_k + carry_k out_{k-1}, k < tiles - 1: the state after chunk k. REVERSE: out_k = states_k +
    carry_{k+1} out_{k+1}: its gradient. BLOCK chunks at a time, carry being the decay of a whole chunk."""
    h = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    lanes = tl.arange(0, BLOCK)
    state = tl.zeros((BLOCK_C,), tl.float32)
    for i0 in range(0, tiles - 1, BLOCK):
        i = i0 + lanes
        on = i < tiles - 1
        k = i
        chunk = i
        if REVERSE:
            k = tiles - 2 - i
            chunk = k + 1
        end = chunk * CHUNK + CHUNK - 1
        inside = on & (chunk > 0) & (end < T)
        own = tl.load(first + end, mask=inside, other=-1)
        unbroken = inside & (own == tl.load(first + end - CHUNK, mask=inside, other=-2))
        carry = decay(tl.load(log_decay + h.to(tl.int64) * T + end, mask=unbroken, other=0.0), unbroken)
        at = (k.to(tl.int64) * H + h)[:, None] * SIZE + c[None, :]
        mask = on[:, None] & (c < SIZE)[None, :]
        added = tl.load(states + at, mask=mask, other=0.0)
        after = tl.dot(decay_matrix(carry, 0, BLOCK), added, input_precision=PRECISION)
        after += tl.cumprod(carry, 0)[:, None] * state[None, :]
        tl.store(out + at, after, mask=mask)
        state = tl.sum(tl.where((lanes == BLOCK - 1)[:, None], after, 0.0), 0)


@jit
def _ssd_fwd_kernel(
    x, B, C, dt, log_decay, first, states, skip, y, T, H, x_stride, y_stride,
    P: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a chunk and a head. x_stride is that of B and C too."""
    pid = tl.program_id(0)
    h = pid % H
    c = pid // H
    i = tl.arange(0, CHUNK)
    p = tl.arange(0, P)
    t, step, log, own = _positions(c, T, h, dt, log_decay, first, CHUNK)
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    out = tl.zeros((CHUNK, P), tl.float32)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        c_rows = _rows(C, t, T, x_stride, s, S)
        scores = _dot(c_rows, tl.trans(_rows(B, t, T, x_stride, s, S)), scores, DOT, PRECISION)
        state = _state(states, pid - H, c > 0, p, s, P, S)
        out = _dot(c_rows, tl.trans(state), out, DOT, PRECISION)
    entering, _ = _entering(first, log, own, c, CHUNK)
    out *= entering[:, None]
    together = (i[:, None] >= i[None, :]) & (own[:, None] == own[None, :])
    scores *= _fading(log[:, None] - log[None, :], together.to(tl.float32)) * step[None, :]
    x_rows = _rows(x + h * P, t, T, x_stride, p, P)
    out = _dot(scores, x_rows, out, DOT, PRECISION)
    out += tl.load(skip + h) * x_rows.to(tl.float32)
    tl.store(y + t.to(tl.int64)[:, None] * y_stride + h * P + p[None, :], out, mask=(t < T)[:, None])


@jit
def _ssd_bwd_x_kernel(
    dy, x, B, C, dt, log_decay, first, states, gstates, raw, dt_bias, A_log, skip, dx, draw, sums, T, H, tiles,
    x_stride, y_stride, raw_stride, draw_stride,
    P: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk and a head: dx, the gradient of dt before its softplus (draw), and what is added for A_log, dt_bias
    and skip (sums). Pairs of positions are [j, i]: j is felt in i."""
    pid = tl.program_id(0)
    h = pid % H
    c = pid // H
    j = tl.arange(0, CHUNK)
    p = tl.arange(0, P)
    t, step, log, own = _positions(c, T, h, dt, log_decay, first, CHUNK)
    entering, before = _entering(first, log, own, c, CHUNK)
    leaving, log_end, after = _leaving(first, log_decay, log, own, h, c, T, tiles, CHUNK)
    felt = ((own[:, None] == own[None, :]) & (j[:, None] <= j[None, :])).to(tl.float32)

    # one sum at a time, the tiles of B and C anew for each: all at once they would not fit into registers
    from_before = tl.zeros((CHUNK, P), tl.float32)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        state = _state(states, pid - H, c > 0, p, s, P, S)
        from_before = _dot(_rows(C, t, T, x_stride, s, S), tl.trans(state), from_before, DOT, PRECISION)
    dy_rows = _rows(dy + h * P, t, T, y_stride, p, P)
    entered = entering * tl.sum(dy_rows.to(tl.float32) * from_before, 1)
    from_after = tl.zeros((CHUNK, P), tl.float32)
    both = tl.zeros((P,), tl.float32)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        g = _state(gstates, pid, c + 1 < tiles, p, s, P, S)
        from_after = _dot(_rows(B, t, T, x_stride, s, S), tl.trans(g), from_after, DOT, PRECISION)
        both += tl.sum(g.to(tl.float32) * _state(states, pid - H, c > 0, p, s, P, S).to(tl.float32), 1)
    from_after *= leaving[:, None]
    x_rows = _rows(x + h * P, t, T, x_stride, p, P)
    kept = step * tl.sum(x_rows.to(tl.float32) * from_after, 1)
    weight = tl.zeros((CHUNK, CHUNK), tl.float32)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        c_rows = _rows(C, t, T, x_stride, s, S)
        weight = _dot(_rows(B, t, T, x_stride, s, S), tl.trans(c_rows), weight, DOT, PRECISION)
    weight *= _fading(log[None, :] - log[:, None], felt)
    u = _dot(weight, dy_rows, from_after, DOT, PRECISION)
    x_rows = x_rows.to(tl.float32)
    dy_rows = dy_rows.to(tl.float32)
    dx_rows = step[:, None] * u + tl.load(skip + h) * dy_rows
    tl.store(dx + t.to(tl.int64)[:, None] * y_stride + h * P + p[None, :], dx_rows, mask=(t < T)[:, None])
    x_u = tl.sum(x_rows * u, 1)
    x_dy = tl.sum(x_rows * dy_rows, 1)
    pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
    for p0 in range(0, P, BLOCK_P):
        q = p0 + tl.arange(0, BLOCK_P)
        x_part = _rows(x + h * P, t, T, x_stride, q, P)
        pairs = _dot(x_part, tl.trans(_rows(dy + h * P, t, T, y_stride, q, P)), pairs, DOT, PRECISION)
    pairs *= weight * step[:, None]
    # of log_decay at each position; of the same numbers, or their rounding would remain
    dlog = entered + tl.sum(pairs, 0) - tl.sum(pairs, 1)
    through = _total(both) * decay(log_end, after == before)
    da = through + tl.sum(felt * dlog[None, :], 1)
    da += tl.where(own == after, tl.sum(tl.where(j[None, :] < j[:, None], kept[None, :], 0.0), 1), 0.0)

    A = -tl.exp(tl.load(A_log + h))
    on = own <= t
    z = tl.load(raw + t.to(tl.int64) * raw_stride + h, mask=on & (t < T), other=0.0).to(tl.float32)
    dz = tl.where(on, (x_u + A * da) * tl.sigmoid(z + tl.load(dt_bias + h)), 0.0)
    tl.store(draw + t.to(tl.int64) * draw_stride + h, dz, mask=t < T)
    at = sums + pid + tl.arange(0, 1)
    tl.store(at, A * _total(step * da))
    tl.store(at + tiles * H, _total(tl.where(t < T, dz, 0.0)))
    tl.store(at + 2 * tiles * H, _total(x_dy))


@jit
def _ssd_bwd_bc_kernel(
    dy, x, B, C, dt, log_decay, first, states, gstates, dbc, T, H, tiles, x_stride, y_stride,
    HEADS: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dbc (groups, T, 2 S): the gradients of B and C of a chunk, from HEADS heads, BLOCK_S states at a time. Pairs of
    positions are [i, j]."""
    pid = tl.program_id(0)
    groups = tl.cdiv(H, HEADS)
    group = pid % groups
    c = pid // groups
    i = tl.arange(0, CHUNK)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    t = c * CHUNK + i
    own = tl.load(first + t, mask=t < T, other=-1)
    together = ((i[:, None] >= i[None, :]) & (own[:, None] == own[None, :])).to(tl.float32)
    h0 = group * HEADS
    h1 = tl.minimum(h0 + HEADS, H)
    pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
    for h in range(h0, h1):
        step, log = _times(t, T, h, dt, log_decay)
        products = tl.zeros((CHUNK, CHUNK), tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            x_rows = _rows(x + h * P, t, T, x_stride, p, P)
            products = _dot(_rows(dy + h * P, t, T, y_stride, p, P), tl.trans(x_rows), products, DOT, PRECISION)
        pairs += products * _fading(log[:, None] - log[None, :], together) * step[None, :]
    dc = _dot(pairs, _rows(B, t, T, x_stride, s, S), tl.zeros((CHUNK, BLOCK_S), tl.float32), DOT, PRECISION)
    for h in range(h0, h1):
        _, log = _times(t, T, h, dt, log_decay)
        entering, _ = _entering(first, log, own, c, CHUNK)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            dy_rows = _rows(dy + h * P, t, T, y_stride, p, P).to(tl.float32) * entering[:, None]
            dc = _dot(dy_rows, _state(states, (c - 1) * H + h, c > 0, p, s, P, S), dc, DOT, PRECISION)
    db = _dot(tl.trans(pairs), _rows(C, t, T, x_stride, s, S), tl.zeros((CHUNK, BLOCK_S), tl.float32), DOT, PRECISION)
    for h in range(h0, h1):
        step, log = _times(t, T, h, dt, log_decay)
        leaving, _, _ = _leaving(first, log_decay, log, own, h, c, T, tiles, CHUNK)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            x_rows = _rows(x + h * P, t, T, x_stride, p, P).to(tl.float32) * (leaving * step)[:, None]
            db = _dot(x_rows, _state(gstates, c * H + h, c + 1 < tiles, p, s, P, S), db, DOT, PRECISION)
    at = dbc + (group.to(tl.int64) * T + t)[:, None] * (2 * S) + s[None, :]
    mask = (t < T)[:, None] & (s < S)[None, :]
    tl.store(at, db, mask=mask)
    tl.store(at + S, dc, mask=mask)


# --- launches -----------------------------------------------------------------------------------------------------

HEADS = 8  # of a program that sums dB and dC
PRODUCTS = "products of whole tiles, as in a matrix product: their sums fill the registers, and loads are large"
SCALARS = "scalars of three loops, about 40, kept in lanes of vector registers"


def _plan(P: int, S: int, warps: int, **constexprs: Any):
    """BLOCK_S and BLOCK_P: columns of a product's operands at a time."""

    def plan(D, dtype, gpu):
        most, precision = 32, dot_precision(gpu) if dtype == torch.float32 else "ieee"
        shape = {"P": P, "S": S, "BLOCK_S": block_columns(S, most), "CHUNK": chunk(dtype)}
        more = {n: min(P, most) for n in constexprs if n == "BLOCK_P"}
        dots = {"DOT": dot_dtype(dtype), "PRECISION": precision}
        options = {"num_warps": 4 if gpu == "gfx942" else warps, "num_stages": 1}  # of 64 lanes there
        return {**shape, **constexprs, **more, **dots}, options

    return plan


def _pass_plan(reverse: bool):
    def plan(D, dtype, gpu):
        constants = {"REVERSE": reverse, "SIZE": 64 * 128, "CHUNK": chunk(dtype), "BLOCK": 16, "BLOCK_C": 64}
        return constants | {"PRECISION": dot_precision(gpu)}, {"num_warps": 4, "num_stages": 1}

    return plan


PASS_ARGS = {
    "states": "*fp32", "log_decay": "*fp32", "first": "*i32", "out": "*T", "T": "i32", "H": "i32", "tiles": "i32",
}  # fmt: skip
PASS = {r: Kernel(_ssd_pass_kernel, PASS_ARGS, _pass_plan(r)) for r in (False, True)}
TIMES = {"dt": "*fp32", "log_decay": "*fp32", "first": "*i32"}
ROWS = {"x": "*T", "B": "*T", "C": "*T", **TIMES, "states": "*T"}
STATES_ARGS = {
    "rows": "*T", "cols": "*T", **TIMES, "states": "*fp32", "T": "i32", "H": "i32", "tiles": "i32",
    "rows_stride": "i32", "cols_stride": "i32",
}  # fmt: skip
FWD_ARGS = {
    **ROWS, "skip": "*fp32", "y": "*T", "T": "i32", "H": "i32", "x_stride": "i32", "y_stride": "i32",
}  # fmt: skip
BWD_X_ARGS = {
    "dy": "*T", **ROWS, "gstates": "*T", "raw": "*T", "dt_bias": "*fp32", "A_log": "*fp32", "skip": "*fp32", "dx": "*T",
    "draw": "*T", "sums": "*fp32", "T": "i32", "H": "i32", "tiles": "i32", "x_stride": "i32", "y_stride": "i32",
    "raw_stride": "i32", "draw_stride": "i32",
}  # fmt: skip
BWD_BC_ARGS = {
    "dy": "*T", **ROWS, "gstates": "*T", "dbc": "*fp32", "T": "i32", "H": "i32", "tiles": "i32", "x_stride": "i32",
    "y_stride": "i32",
}  # fmt: skip


@functools.cache
def kernels(P: int, S: int) -> dict[str, Kernel]:
    """For heads of P channels and states of S."""
    return {
        "states": Kernel(_ssd_states_kernel, STATES_ARGS, _plan(P, S, 4, REVERSE=False)),
        "states_reverse": Kernel(_ssd_states_kernel, STATES_ARGS, _plan(P, S, 4, REVERSE=True)),
        "fwd": Kernel(_ssd_fwd_kernel, FWD_ARGS, _plan(P, S, 8), few_warps=PRODUCTS),
        "bwd_x": Kernel(_ssd_bwd_x_kernel, BWD_X_ARGS, _plan(P, S, 8, BLOCK_P=P), few_warps=PRODUCTS),
        "bwd_bc": Kernel(_ssd_bwd_bc_kernel, BWD_BC_ARGS, _plan(P, S, 8, BLOCK_P=P, HEADS=HEADS), PRODUCTS, SCALARS),
    }


KERNELS = {
    "ssd_pass": PASS[False],
    "ssd_pass_reverse": PASS[True],
    **{f"ssd_{name}_{S}": kernel for S in (64, 128) for name, kernel in kernels(64, S).items()},
}
