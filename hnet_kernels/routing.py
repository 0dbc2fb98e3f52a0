"""Routing: where chunks begin, from how much neighbouring positions differ.

    p_t = (1 - cos(q_{t-1}, k_t)) / 2      b_t = p_t > 1/2      c_t = p_t if b_t else 1 - p_t

and over each sequence the sums of p and of its entropy, which losses read.

Public functions `route` and `route_step`; below them the autograd formula and the schema of the op. Plain PyTorch in
`reference.py`, kernels in `csrc/cpu/route.cpp` and `triton/routing.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .library import define, kernels
from .types import Routing
from .validation import (
    MAX_LOGIT_BIAS,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_flag,
    check_like,
    check_logit_bias,
    check_matrix,
    check_vector,
    probability_dtype,
)


def _check_bias(logit_bias: float | Tensor | None, x: Tensor) -> Tensor | None:
    if logit_bias is None:
        return None
    check_logit_bias(logit_bias, "q", x)
    dtype = probability_dtype(x)
    if not isinstance(logit_bias, Tensor):
        return torch.full((), logit_bias, dtype=dtype, device=x.device)  # torch.tensor would wait for a GPU
    return logit_bias.to(dtype)


def _bounded(bias: Tensor | None, chosen: str) -> Tensor | None:
    """On a GPU nobody has looked, and e^89 gives NaN. The Triton kernels look themselves: no launch of its own."""
    return bias if bias is None or chosen == "triton" else bias.clamp(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)


def _check_budget(max_chunks: int, least: int) -> None:
    if not isinstance(max_chunks, int) or isinstance(max_chunks, bool) or max_chunks < least:
        raise ValueError(f"max_chunks must be an integer >= {least}, one for each sequence, got {max_chunks!r}")
    if max_chunks >= 2**31:
        raise ValueError(f"max_chunks must be below 2^31, got {max_chunks}")


def _common_dtype(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if q.dtype != k.dtype:
        if not torch.is_autocast_enabled(q.device.type):
            raise TypeError(f"k must have the dtype of q, {q.dtype}, got {k.dtype}")
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k = q.to(dtype), k.to(dtype)
    return q, k


def route(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    *,
    logit_bias: float | Tensor | None = None,
    candidates: Tensor | None = None,
    max_chunks: int | None = None,
    padded: bool = False,
    backend: str | None = None,
) -> Routing:
    """Boundary probabilities, mask and chunk layout of a packed batch (H-Net paper, eq. 4).

    p_t = clamp((1 - cos(q_{t-1}, k_t)) / 2, 0, 1), 1 at the first position of every sequence; b_t = p_t > 1/2.

    Args:
        q: (T, D) fp32|bf16|fp16 (fp64 with the reference), W_q x. Row t is compared with row t+1 of `k`.
        k: (T, D), same dtype, W_k x.
        cu_seqlens: (N+1,) int32, from 0 to T: sequence n is positions [cu_seqlens[n], cu_seqlens[n+1]).
        logit_bias: float or 0-d tensor beta from -80 to 80, p <- p e^beta / (1 - p + p e^beta); positive makes more
            chunks. May need a gradient.
        candidates: (T,) bool, positions where a boundary may fall; first positions always may. Default: all.
        max_chunks: budget K >= N. All shapes become static and nothing is read back from the device: `chunk_start` has
            K rows, the least probable boundaries past K are dropped (first positions never) and counted in
            `num_dropped`. Default: as many rows as there are chunks, which on a GPU waits for the count.
        padded: allow cu_seqlens to end before T; the rows after it are padding, as in the inner stage of a budgeted
            `route`: probability 0, no boundary, never read, zero gradient.
        backend: "reference" | "cpu" | "triton" | "cuda" | "auto"; default: the one in force (`hnet_kernels.backend`).

    Returns:
        Routing. boundary_prob, selected_prob, prob_sum and entropy_sum carry gradients to q, k and logit_bias.
        Probabilities and sums are fp32 (fp64 for fp64 input), computed in that precision whatever the input dtype.

        entropy_sum (N,): for each sequence the sum of H(p_t) = -p_t ln p_t - (1 - p_t) ln(1 - p_t), in nats, of the p
        returned (logit_bias included); first positions and padding add 0. dH/dp = ln((1 - p) / p), but 0 where p is 0
        or 1: there the gradients of q, k and logit_bias go to 0 as p does. Mean over a pack: entropy_sum.sum() / T.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; max_chunks < N; cu_seqlens that does not start at 0,
            decreases or does not end at T, or a logit_bias out of range (tensors are read on a CPU only, where it is
            free).
        RuntimeError: the backend named cannot run here.

    Equivalent to:
        p = (1 - F.cosine_similarity(q[:-1], k[1:])) / 2   # then p = 1 at cu_seqlens[:-1]
    """
    check_matrix("q", q)
    check_like("k", k, "q", q)
    q, k = _common_dtype(q, k)
    check_cu_seqlens(cu_seqlens, "q", q)
    bias = _check_bias(logit_bias, q)
    T, N = q.shape[0], cu_seqlens.shape[0] - 1
    if candidates is not None:
        check_vector("candidates", candidates, T, torch.bool, "q", q)
    if max_chunks is not None:
        _check_budget(max_chunks, max(N, 1))
    check_flag("padded", padded)
    chosen = dispatch.resolve(backend, "route", q)
    bias = _bounded(bias, chosen)
    if chosen == "reference":
        check_cu_seqlens_values(cu_seqlens, T, padded)
        return reference.route(q, k, cu_seqlens, bias, candidates, max_chunks, padded)
    out = _route(q, k, cu_seqlens, bias, candidates, max_chunks, padded, chosen)
    prob, mask, selected, index, start, cu_chunks, prob_sum, entropy_sum, num_dropped = out[:9]
    return Routing(prob, mask, selected, index, start, cu_chunks, cu_seqlens, prob_sum, entropy_sum, num_dropped)


def route_step(
    q_prev: Tensor,
    k: Tensor,
    *,
    is_first: Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One decoding step of `route` for B sequences; equal to the last position of the full form. No gradient.

    Args:
        q_prev: (B, D) fp32|bf16|fp16, W_q x of each sequence's previous position (ignored where is_first).
        k: (B, D), same dtype, W_k x of the new position.
        is_first: (B,) bool, the new position is the first of its sequence. Default: none is.
        logit_bias, candidates, backend: as in `route`; candidates is (B,).

    Returns:
        boundary_prob (B,) fp32, boundary_mask (B,) bool, selected_prob (B,) fp32.

    Raises:
        TypeError, ValueError, RuntimeError: as in `route`.
    """
    check_matrix("q_prev", q_prev)
    check_like("k", k, "q_prev", q_prev)
    q_prev, k = _common_dtype(q_prev, k)
    bias = _check_bias(logit_bias, k)
    for name, flag in (("is_first", is_first), ("candidates", candidates)):
        if flag is not None:
            check_vector(name, flag, k.shape[0], torch.bool, "k", k)
    chosen = dispatch.resolve(backend, "route_step", k)
    bias = _bounded(bias, chosen)
    if chosen == "reference":
        return reference.route_step(q_prev, k, is_first, bias, candidates)
    return _route_step(q_prev, k, is_first, bias, candidates, chosen)


# --- autograd -----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    q, k, cu_seqlens, logit_bias, _, _, _, ctx.chosen = inputs
    mask, norms = output[1], output[9]
    ctx.mark_non_differentiable(norms)
    ctx.save_for_backward(q, k, cu_seqlens, logit_bias, mask, norms)
    ctx.set_materialize_grads(False)


def _backward(ctx, dprob, _mask, dselected, _index, _start, _cu, dprob_sum, dentropy_sum, *_):
    q, k, cu_seqlens, logit_bias, mask, norms = ctx.saved_tensors
    bias_grad = ctx.needs_input_grad[3]
    dq, dk, dbias = _route_bwd(
        q, k, cu_seqlens, logit_bias, mask, norms, dprob, dselected, dprob_sum, dentropy_sum, bias_grad, ctx.chosen
    )
    return dq, dk, None, dbias if bias_grad else None, None, None, None, None


# --- schema and shapes --------------------------------------------------------------------------------------------


def _route_fake(q, k, cu_seqlens, logit_bias, candidates, max_chunks, padded, backend):
    T, N = q.shape[0], cu_seqlens.shape[0] - 1
    M = torch.library.get_ctx().new_dynamic_size() if max_chunks is None else max_chunks

    def f32(*shape):
        return q.new_empty(shape, dtype=torch.float32)

    def i32(*shape):
        return q.new_empty(shape, dtype=torch.int32)

    mask = q.new_empty(T, dtype=torch.bool)
    return f32(T), mask, f32(T), i32(T), i32(M), i32(N + 1), f32(N), f32(N), i32(), f32(3, T)


def _route_bwd_fake(q, *args):
    bias_grad = args[-2]
    dbias = q.new_empty(() if bias_grad else 0, dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape), dbias


def _route_step_fake(q_prev, k, *_):
    p = k.new_empty(k.shape[0], dtype=torch.float32)
    return p, p.new_empty(p.shape, dtype=torch.bool), torch.empty_like(p)


_route = define(  # last, norms (3, T): of each pair its cosine, 1 / |q_{t-1}| and 1 / |k_t|, for the backward
    "route(Tensor q, Tensor k, Tensor cu_seqlens, Tensor? logit_bias, Tensor? candidates, SymInt? max_chunks, "
    f"bool padded, str backend) -> ({', '.join(['Tensor'] * 10)})",
    lambda *args: kernels(args[-1], "routing").route(*args[:-1]),
    _route_fake,
    _setup_context,
    _backward,
)
_route_bwd = define(
    "route_bwd(Tensor q, Tensor k, Tensor cu_seqlens, Tensor? logit_bias, Tensor mask, Tensor norms, "
    "Tensor? dprob, Tensor? dselected, Tensor? dprob_sum, Tensor? dentropy_sum, bool bias_grad, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    lambda *args: kernels(args[-1], "routing").route_bwd(*args[:-1]),
    _route_bwd_fake,
)
_route_step = define(
    "route_step(Tensor q_prev, Tensor k, Tensor? is_first, Tensor? logit_bias, Tensor? candidates, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    lambda *args: kernels(args[-1], "routing").route_step(*args[:-1]),
    _route_step_fake,
)
