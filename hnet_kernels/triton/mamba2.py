"""Mamba-2 between its two projections on a GPU: the launches. Kernels: `ssd.py` (the scan), `ssd_edges.py` (before and
after it). Forward 6 launches; backward 8, and 6 of PyTorch's that add up what programs left for the parameters."""

from __future__ import annotations

import torch
import triton

from .common import dense, empty, rows, search_steps, stride
from .ssd import HEADS, PASS, chunk, kernels
from .ssd_edges import CONV_BWD, CONV_FWD, CONV_ROWS, NORM_BWD, NORM_FWD, NORM_ROWS, STEPS


def mamba2(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, skip, norm_weight, cu_seqlens, eps):
    (T, _), d_inner, H, N = zxbcdt.shape, norm_weight.shape[0], A_log.shape[0], cu_seqlens.shape[0] - 1
    zxbcdt = rows(zxbcdt)
    conv_weight, conv_bias, dt_bias, A_log, skip, norm_weight, cu_seqlens = dense(
        conv_weight, conv_bias, dt_bias, A_log, skip, norm_weight, cu_seqlens
    )
    channels, K = conv_weight.shape
    z, xbc_in, raw = zxbcdt.split([d_inner, channels, H], 1)
    dt, log_decay, first = empty(zxbcdt, H, T), empty(zxbcdt, H, T), empty(zxbcdt, T, dtype=torch.int32)
    xbc = empty(zxbcdt, T, channels, dtype=zxbcdt.dtype)
    y, out = (empty(zxbcdt, T, d_inner, dtype=zxbcdt.dtype) for _ in range(2))
    if T == 0:
        return out, xbc, y, dt, log_decay, first
    tiles = triton.cdiv(T, chunk(zxbcdt.dtype))
    STEPS.launch(
        (tiles, triton.cdiv(H, STEPS.blocks(zxbcdt, H)["BLOCK_H"])), zxbcdt, H, raw, dt_bias, A_log, cu_seqlens, dt,
        log_decay, first, T, N, H, search_steps(N), stride(raw),
    )  # fmt: skip
    block = CONV_FWD.blocks(zxbcdt, channels)
    CONV_FWD.launch(
        (triton.cdiv(T, block["BLOCK_T"]), triton.cdiv(channels, block["BLOCK_C"])), zxbcdt, channels, xbc_in,
        conv_weight, conv_bias, first, xbc, T, channels, stride(xbc_in), channels, K=K,
    )  # fmt: skip
    x, B, C = _parts(xbc, d_inner)
    states = _entering(x, B, dt, log_decay, first, H, reverse=False)
    kernels(d_inner // H, B.shape[1])["fwd"].launch(
        (tiles * H,), x, d_inner, x, B, C, dt, log_decay, first, states, skip, y, T, H, stride(x), d_inner
    )
    NORM_FWD.launch(
        (triton.cdiv(T, NORM_FWD.blocks(y, d_inner)["BLOCK_T"]),), y, d_inner, y, z, norm_weight, first, out, T, eps,
        stride(z),
    )  # fmt: skip
    return out, xbc, y, dt, log_decay, first


def mamba2_bwd(
    dout, zxbcdt, conv_weight, conv_bias, dt_bias, A_log, skip, norm_weight, xbc, y, dt, log_decay, first, eps
):  # fmt: skip
    (T, width), d_inner, H = zxbcdt.shape, norm_weight.shape[0], A_log.shape[0]
    dout, zxbcdt = rows(dout), rows(zxbcdt)
    conv_weight, conv_bias, dt_bias, A_log, skip, norm_weight = dense(
        conv_weight, conv_bias, dt_bias, A_log, skip, norm_weight
    )
    channels, K = conv_weight.shape
    dzxbcdt = empty(zxbcdt, T, width, dtype=zxbcdt.dtype)
    if T == 0:
        return dzxbcdt, *(torch.zeros_like(p) for p in (conv_weight, conv_bias, dt_bias, A_log, skip, norm_weight))
    z, xbc_in, raw = zxbcdt.split([d_inner, channels, H], 1)
    dz, dxbc_in, draw = dzxbcdt.split([d_inner, channels, H], 1)
    tiles, groups = triton.cdiv(T, chunk(zxbcdt.dtype)), triton.cdiv(H, HEADS)

    dy = empty(zxbcdt, T, d_inner, dtype=zxbcdt.dtype)
    norm_sums = empty(zxbcdt, triton.cdiv(T, NORM_ROWS), d_inner)
    NORM_BWD.launch(
        (norm_sums.shape[0],), dout, d_inner, dout, y, z, norm_weight, first, dy, dz, norm_sums, T, eps, stride(dout),
        stride(z), stride(dz),
    )  # fmt: skip

    x, B, C = _parts(xbc, d_inner)
    scan = kernels(d_inner // H, B.shape[1])
    states = _entering(x, B, dt, log_decay, first, H, reverse=False)
    gstates = _entering(dy, C, dt, log_decay, first, H, reverse=True)
    dx, head_sums = torch.empty_like(dy), empty(zxbcdt, 3, tiles, H)
    scan["bwd_x"].launch(
        (tiles * H,), x, d_inner, dy, x, B, C, dt, log_decay, first, states, gstates, raw, dt_bias, A_log, skip, dx,
        draw, head_sums, T, H, tiles, stride(x), d_inner, stride(raw), stride(draw),
    )  # fmt: skip
    dbc = empty(zxbcdt, groups, T, channels - d_inner)
    parts = triton.cdiv(B.shape[1], scan["bwd_bc"].blocks(x, d_inner)["BLOCK_S"])
    scan["bwd_bc"].launch(
        (tiles * groups, parts), x, d_inner, dy, x, B, C, dt, log_decay, first, states, gstates, dbc, T, H, tiles,
        stride(x), d_inner,
    )  # fmt: skip

    programs = triton.cdiv(T, CONV_ROWS)
    dconv_weight, dconv_bias = empty(zxbcdt, programs, channels, K), empty(zxbcdt, programs, channels)
    CONV_BWD.launch(
        (programs, triton.cdiv(channels, CONV_BWD.blocks(x, channels)["BLOCK_C"])), x, channels, xbc_in, conv_weight,
        conv_bias, first, dx, dbc, dxbc_in, dconv_weight, dconv_bias, T, d_inner, channels, groups, stride(xbc_in),
        d_inner, stride(dxbc_in), K=K, BLOCK_K=triton.next_power_of_2(K),
    )  # fmt: skip
    dA_log, ddt_bias, dskip = (part.sum(0) for part in head_sums)
    return dzxbcdt, dconv_weight.sum(0), dconv_bias.sum(0), ddt_bias, dA_log, dskip, norm_sums.sum(0)


def _parts(xbc, d_inner):
    S = (xbc.shape[1] - d_inner) // 2
    return xbc.split([d_inner, S, S], 1)


def _entering(x, B, dt, log_decay, first, H, reverse):
    """(chunks - 1, H, P, S): the state before every chunk but the first, from x and B; reverse, of dy and C: the
    gradient of the state after every chunk but the last."""
    (T, d_inner), S = x.shape, B.shape[1]
    P, tiles = d_inner // H, triton.cdiv(T, chunk(x.dtype))
    added = empty(x, tiles - 1, H, P, S)
    kernel = kernels(P, S)["states_reverse" if reverse else "states"]
    kernel.launch(
        ((tiles - 1) * H, triton.cdiv(S, kernel.blocks(x, d_inner)["BLOCK_S"])), x, d_inner, x, B, dt, log_decay, first,
        added, T, H, tiles, stride(x), stride(B),
    )  # fmt: skip
    out = empty(x, tiles - 1, H, P, S, dtype=x.dtype)
    columns = triton.cdiv(P * S, PASS[reverse].blocks(x, d_inner)["BLOCK_C"])
    PASS[reverse].launch(
        (H if tiles > 1 else 0, columns), x, d_inner, added, log_decay, first, out, T, H, tiles, SIZE=P * S
    )
    return out
