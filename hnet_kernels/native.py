"""The native extension: allocates outputs, hands raw pointers to `hnet_kernels._C`.

Each function is the `cpu` backend of the op of the same name and works on tensors that the op has already validated.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POOL = {"boundary": 0, "mean": 1, "max": 2, "last": 3}


def _c():
    from hnet_kernels import _C

    return _C


def keep_memory(threshold: int = 1 << 30) -> bool:
    """Keep freed blocks of up to `threshold` bytes in this process instead of returning them to the kernel.

    With glibc's defaults every tensor above a few MB is made of fresh pages, and faulting them in costs more than any
    kernel here: a new 64 MB tensor takes 40-90 ms where copying it takes 3. One call at the start of a CPU training or
    serving process avoids it (the `hnet` commands make it). The process then keeps its peak memory until it ends.

    Returns False, and changes nothing, where the extension is not built or the C library is not glibc.
    """
    return dispatch.native_error() is None and bool(_c().keep_memory(threshold))


class Rows(NamedTuple):
    """A (rows, D) argument: handed over as pointer and row stride, copied only if its rows are not contiguous."""

    x: Tensor | None


_SOMEWHERE = torch.empty(16, device="cpu")


def _address(x: Tensor) -> int:
    """An empty tensor has none, but null means None, and in C++ not even nothing may be copied from it."""
    return x.data_ptr() or _SOMEWHERE.data_ptr()


def pointers(args) -> tuple[list, list[Tensor | None]]:
    """Arguments as `_C` takes them: tensors become dense pointers, dtypes their code, None a null pointer.

    The second list is what the pointers point to, copies included: it must outlive the call.
    """
    flat: list = []
    alive: list[Tensor | None] = []
    for a in args:
        if isinstance(a, Rows):
            x = a.x
            if x is not None and x.shape[1] > 1 and x.stride(1) != 1:
                x = x.contiguous()
            flat += (0, 0) if x is None else (_address(x), x.stride(0))
            alive.append(x)
        elif isinstance(a, Tensor):
            x = a.contiguous()
            flat.append(_address(x))
            alive.append(x)
        else:
            flat.append(0 if a is None else _DTYPE.get(a, a) if isinstance(a, torch.dtype) else a)
    return flat, alive


def _call(function: str, *args):
    flat, _alive = pointers(args)
    return getattr(_c(), function)(*flat, torch.get_num_threads())


def _empty(*shape, dtype=torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cpu")  # whatever the user's default dtype and device


def _scale(logit_bias: Tensor | None) -> float:
    return 1.0 if logit_bias is None else math.exp(logit_bias.item())


def _sizes(cu_seqlens: Tensor, x: Tensor) -> tuple[int, int, int]:
    """N, T, D"""
    return cu_seqlens.shape[0] - 1, x.shape[0], x.shape[1]


def route(q, k, cu_seqlens, logit_bias, candidates, max_chunks, padded):
    N, T, D = _sizes(cu_seqlens, q)
    prob, selected, norms = _empty(T), _empty(T), _empty(3, T)
    mask = _empty(T, dtype=torch.bool)
    chunk_index, cu_chunks = _empty(T, dtype=torch.int32), _empty(N + 1, dtype=torch.int32)
    prob_sum, entropy_sum, num_dropped = _empty(N), _empty(N), _empty((), dtype=torch.int32)
    count = _call(
        "route_fwd", q.dtype, Rows(q), Rows(k), cu_seqlens, N, T, D, _scale(logit_bias), candidates, padded,
        -1 if max_chunks is None else max_chunks,
        prob, mask, selected, *norms, chunk_index, cu_chunks, prob_sum, entropy_sum, num_dropped,
    )  # fmt: skip
    M = count if max_chunks is None else max_chunks
    chunk_start = _empty(M, dtype=torch.int32)
    _call("fill_chunk_start", mask, T, cu_seqlens[-1].item(), chunk_start, M)
    return prob, mask, selected, chunk_index, chunk_start, cu_chunks, prob_sum, entropy_sum, num_dropped, norms


def route_bwd(q, k, cu_seqlens, logit_bias, mask, norms, dprob, dselected, dprob_sum, dentropy_sum, bias_grad):
    N, T, D = _sizes(cu_seqlens, q)
    dq, dk = _empty(T, D, dtype=q.dtype), _empty(T, D, dtype=q.dtype)
    dbias = _empty(T) if bias_grad else None
    _call(
        "route_bwd", q.dtype, Rows(q), Rows(k), cu_seqlens, N, T, D, _scale(logit_bias), mask, *norms,
        dprob, dselected, dprob_sum, dentropy_sum, dq, dk, dbias,
    )  # fmt: skip
    return dq, dk, _empty(0) if dbias is None else dbias.double().sum().float()


def pool(x, chunk_start, chunk_index, cu_chunks, cu_seqlens, mode):
    N, T, D = _sizes(cu_seqlens, x)
    M = chunk_start.shape[0]
    z = _empty(M, D, dtype=x.dtype)
    _call("pool_fwd", x.dtype, _POOL[mode], Rows(x), chunk_start, cu_chunks, cu_seqlens, N, T, M, D, z)
    return z


def pool_bwd(dz, x, chunk_start, chunk_index, cu_chunks, cu_seqlens, T, mode):
    M, D = dz.shape
    N = cu_seqlens.shape[0] - 1
    dx = _empty(T, D, dtype=dz.dtype)
    _call("pool_bwd", dz.dtype, _POOL[mode], Rows(x), Rows(dz), chunk_start, cu_chunks, cu_seqlens, N, T, M, D, dx)
    return dx


def dechunk(z, prob, selected, chunk_start, chunk_index, cu_chunks, cu_seqlens, residual, keep):
    (M, D), T, N = z.shape, prob.shape[0], cu_seqlens.shape[0] - 1
    out = _empty(T, D, dtype=z.dtype)
    residual_dtype = z.dtype if residual is None else residual.dtype
    _call(
        "dechunk_fwd", z.dtype, residual_dtype, Rows(z), Rows(residual), prob, cu_seqlens, cu_chunks, chunk_start,
        N, T, M, D, out,
    )  # fmt: skip
    return out, _empty(0)


def dechunk_bwd(dout, z, prob, chunk_start, chunk_index, cu_chunks, cu_seqlens, residual_dtype):
    N, T, D = _sizes(cu_seqlens, dout)
    M = z.shape[0]
    dz, dprob, dselected = _empty(M, D, dtype=z.dtype), _empty(T), _empty(T)
    _call(
        "dechunk_bwd", z.dtype, Rows(dout), Rows(z), prob, cu_seqlens, cu_chunks, chunk_start, N, T, M, D,
        dz, dprob, dselected,
    )  # fmt: skip
    dresidual = _empty(0) if residual_dtype is None else dout.to(residual_dtype, copy=True)
    dresidual[cu_seqlens[-1].item() :] = 0
    return dz, dprob, dselected, dresidual


def ema(z, p, cu_seqlens, initial_state):
    N, T, D = _sizes(cu_seqlens, z)
    y, final = _empty(T, D, dtype=z.dtype), _empty(N, D)
    _call("ema_fwd", z.dtype, Rows(z), p, cu_seqlens, N, T, D, initial_state, y, final)
    return y, final


def ema_bwd(dy, dfinal, z, p, cu_seqlens, initial_state):
    N, T, D = _sizes(cu_seqlens, z)
    dz, dp = _empty(T, D, dtype=z.dtype), _empty(T)
    dinitial = None if initial_state is None else _empty(N, D)
    _call("ema_bwd", z.dtype, Rows(dy), dfinal, Rows(z), p, cu_seqlens, N, T, D, initial_state, dz, dp, dinitial)
    return dz, dp, _empty(0) if dinitial is None else dinitial


def route_step(q_prev, k, is_first, logit_bias, candidates):
    B, D = k.shape
    prob, selected, mask = _empty(B), _empty(B), _empty(B, dtype=torch.bool)
    _call(
        "route_step", k.dtype, Rows(q_prev), Rows(k), B, D, _scale(logit_bias), is_first, candidates,
        prob, selected, mask,
    )  # fmt: skip
    return prob, mask, selected


def dechunk_step(z, boundary_prob, boundary_mask, state, residual):
    B, D = z.shape
    out, new_state = _empty(B, D, dtype=z.dtype), _empty(B, D)
    residual_dtype = z.dtype if residual is None else residual.dtype
    _call(
        "dechunk_step", z.dtype, residual_dtype, Rows(z), Rows(residual), boundary_prob, boundary_mask, state, B, D,
        out, new_state,
    )  # fmt: skip
    return out, new_state


def add_rms_norm(x, residual, weight, eps):
    T, D = x.shape
    h, total, inv_rms = _empty(T, D, dtype=x.dtype), _empty(T, D), _empty(T)
    _call("rms_norm_fwd", x.dtype, Rows(x), Rows(residual), weight.float(), T, D, eps, h, total, inv_rms)
    return h, total, inv_rms


def add_rms_norm_bwd(dh, dsum, total, inv_rms, weight):
    T, D = dh.shape
    dx, dweight = _empty(T, D, dtype=dh.dtype), _empty(D)
    dresidual = _empty(0) if dh.dtype == torch.float32 else _empty(T, D)
    _call(
        "rms_norm_bwd", dh.dtype, Rows(dh), Rows(dsum), Rows(total), inv_rms, weight.float(), T, D,
        dx, None if dh.dtype == torch.float32 else dresidual, dweight,
    )  # fmt: skip
    return dx, dresidual, dweight.to(weight.dtype)


def gated_conv(x, weight, bias, cu_seqlens):
    T, (D, K) = x.shape[0], weight.shape
    out = _empty(T, D, dtype=x.dtype)
    taps = weight.float().T.contiguous()
    _call(
        "gated_conv_fwd", x.dtype, Rows(x), taps, bias.float(), cu_seqlens, cu_seqlens.shape[0] - 1, T, D, K, out,
    )  # fmt: skip
    return out


def gated_conv_bwd(dout, x, weight, bias, cu_seqlens):
    (T, D), K = dout.shape, weight.shape[1]
    dx, dtaps = _empty(T, 2 * D, dtype=x.dtype), _empty(K + 1, D)
    taps = weight.float().T.contiguous()
    _call(
        "gated_conv_bwd", x.dtype, Rows(dout), Rows(x), taps, bias.float(), cu_seqlens, cu_seqlens.shape[0] - 1,
        T, D, K, dx, dtaps,
    )  # fmt: skip
    return (
        dx,
        dtaps[:K].T.to(weight.dtype, copy=True, memory_format=torch.contiguous_format),
        dtaps[K].to(bias.dtype, copy=True),
    )


def attention(qkv, cos, sin, cu_seqlens, window):
    T, _, heads, width = qkv.shape
    out, lse = _empty(T, heads, width, dtype=qkv.dtype), _empty(T, heads)
    _call("attention_fwd", qkv.dtype, *_attention(qkv, cos, sin, cu_seqlens, window), out, lse)
    return out, lse


def attention_bwd(dout, qkv, cos, sin, cu_seqlens, lse, window):
    dqkv = _empty(*qkv.shape, dtype=qkv.dtype)
    arguments = _attention(qkv, cos, sin, cu_seqlens, window)
    _call("attention_bwd", qkv.dtype, Rows(dout.flatten(1)), *arguments, lse, dqkv)
    return dqkv


def _attention(qkv, cos, sin, cu_seqlens, window):
    T, _, heads, width = qkv.shape
    half, N = 0 if cos is None else cos.shape[1], cu_seqlens.shape[0] - 1
    return Rows(qkv.flatten(1)), cos, sin, half, cu_seqlens, N, T, heads, width, window, width**-0.5


def swiglu(x):
    T, D = x.shape[0], x.shape[1] // 2
    out = _empty(T, D, dtype=x.dtype)
    _call("swiglu_fwd", x.dtype, Rows(x), T, D, out)
    return out


def swiglu_bwd(dout, x):
    dx = _empty(*x.shape, dtype=x.dtype)
    _call("swiglu_bwd", x.dtype, Rows(dout), Rows(x), dout.shape[0], dout.shape[1], dx)
    return dx


def cross_entropy(logits, targets):
    T, V = logits.shape
    loss, entropy, norm = _empty(T), _empty(T), _empty(T, 2)
    _call("cross_entropy_fwd", logits.dtype, Rows(logits), targets, T, V, loss, entropy, norm)
    return loss, entropy, norm


def cross_entropy_bwd(dloss, logits, targets, norm):
    dlogits = _empty(*logits.shape, dtype=logits.dtype)
    _call("cross_entropy_bwd", logits.dtype, dloss, Rows(logits), targets, *logits.shape, norm, dlogits)
    return dlogits


def group_rows(index, scale, num_rows):
    n = index.numel()
    order, rows, begin = (_empty(size, dtype=torch.int64) for size in (n, n, n + 1))
    found = _call("group_rows", index, scale, n, num_rows, order, rows, begin)
    return rows[:found], order, begin[: found + 1]


def sum_rows(table, index, scale):
    (T, count), D = index.shape, table.shape[1]
    out = _empty(T, D)
    _call("rows_sum", table, table.shape[0], index, scale, T, count, D, out)
    return out


def row_gradient(dout, groups, count, scale):
    T, D = dout.shape
    U = len(groups.rows)
    out = _empty(U, D)
    _call("rows_gradient", dout, scale, groups.order, groups.begin, U, T, count, D, out)
    return out


def rows_adamw(weight, exp_avg, exp_avg_sq, steps, rows, gradient, done, recent, beta1, beta2, eps, tail):
    _call(
        "rows_adamw", weight, exp_avg, exp_avg_sq, steps, weight.shape[0], rows, gradient, len(rows), weight.shape[1],
        done, beta1, beta2, eps, recent, len(recent), tail,
    )  # fmt: skip


def sample(logits, allowed, situation, seen, banned, adjust, noise, penalty, temperature, top_k, top_p, min_p):
    """Bytes (n,) for logits (n, V) fp32, -1 where they are no numbers; the other arguments as in csrc/cpu/kernels.h."""
    n, V = logits.shape
    chosen = _empty(n, dtype=torch.int64)
    _call(
        "sample", logits, n, V, allowed, allowed.shape[0], situation, seen, banned, penalty, adjust, temperature, top_k,
        top_p, min_p, noise, chosen,
    )  # fmt: skip
    return chosen
