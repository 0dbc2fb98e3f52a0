"""Mamba-2 (arXiv 2405.21060) between its two projections, over packed sequences.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T      y_t = h_t C_t + D x_t      h = 0 before every sequence

Public function `mamba2`; below it the autograd formula and the schema of the op. Plain PyTorch in `reference.py`, which
is all there is for a CPU; kernels in `triton/ssd.py` (the scan) and `triton/ssd_edges.py` (what stands around it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .library import define, kernels
from .validation import check_cu_seqlens, check_cu_seqlens_values, check_device, check_matrix, check_tensor

HEADDIMS = (16, 32, 64)  # of the Triton kernels, and
MOST_STATES, MOST_TAPS = 128, 8


def mamba2(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    cu_seqlens: Tensor,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Causal convolution, SiLU, the scan of Mamba-2, skip and gated RMSNorm (arXiv 2405.21060, sections 6 and 7).

    With z | xBC | dt = zxbcdt; x | B | C = silu(conv(xBC)); dt = softplus(dt + dt_bias); A = -exp(A_log): in every head
    y_t = h_t C_t + D x_t with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, and out = rms_norm(y * silu(z))
    * norm_weight.

    Args:
        zxbcdt: (T, 2 d_inner + 2 d_state + H) fp32|bf16|fp16 (fp64 with the reference), what in_proj returns.
        conv_weight, conv_bias: (d_inner + 2 d_state, K) and (d_inner + 2 d_state,), the last tap for the position
            itself.
        dt_bias, A_log, D: (H,), of each head; a head has d_inner / H channels, B and C are common to all.
        norm_weight: (d_inner,). All parameters in any floating-point dtype; used in fp32.
        cu_seqlens: (N+1,) int32, from 0 to T, or to less: rows past its end are padding, zero on output.
        eps: added to the mean square.
        backend: as in `route`. There is no CPU kernel: "auto" is plain PyTorch there.

    Returns:
        (T, d_inner), dtype of zxbcdt: what out_proj takes. The state is fp32; products have operands of zxbcdt's dtype.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; a bad cu_seqlens (values are checked on CPU only).
        RuntimeError: the backend named cannot run here, or not such heads, states or taps.

    Equivalent to (one head, one sequence):
        x, B, C = silu(conv(xBC)).split([d_inner, d_state, d_state], -1)
        for t in range(T): h = exp(dt[t] * A) * h + dt[t] * outer(x[t], B[t]); y[t] = h @ C[t] + D * x[t]
        out = rms_norm(y * silu(z), norm_weight, eps)
    """
    check_matrix("zxbcdt", zxbcdt)
    parameters = {
        "conv_weight": conv_weight, "conv_bias": conv_bias, "dt_bias": dt_bias, "A_log": A_log, "D": D,
        "norm_weight": norm_weight,
    }  # fmt: skip
    for name, p in parameters.items():
        _check_parameter(name, p, 2 if name == "conv_weight" else 1, zxbcdt)
    H, d_inner, (channels, K), width = A_log.shape[0], norm_weight.shape[0], conv_weight.shape, zxbcdt.shape[1]
    S = (channels - d_inner) // 2
    if H == 0 or d_inner == 0 or d_inner % H:
        raise ValueError(f"norm_weight must have as many channels for each of the {H} heads of A_log, got {d_inner}")
    if S < 1 or channels != d_inner + 2 * S or K < 1:
        raise ValueError(
            f"conv_weight must be (d_inner + 2 d_state, K) with d_inner = {d_inner} of norm_weight, got {channels, K}"
        )
    if width != d_inner + channels + H:
        raise ValueError(
            f"zxbcdt must have d_inner + (d_inner + 2 d_state) + H = {d_inner + channels + H} columns, got {width}"
        )
    for name, p, length in (("conv_bias", conv_bias, channels), ("dt_bias", dt_bias, H), ("D", D, H)):
        if p.shape[0] != length:
            raise ValueError(f"{name} must have shape ({length},), got {tuple(p.shape)}")
    if not isinstance(eps, float | int) or isinstance(eps, bool) or not 0 < eps < 1:
        raise ValueError(f"eps must be a number between 0 and 1, got {eps!r}")
    check_cu_seqlens(cu_seqlens, "zxbcdt", zxbcdt)
    chosen = dispatch.resolve(backend, "mamba2", zxbcdt)
    reason = _too_much(d_inner // H, S, K) if chosen == "triton" else None
    if reason is not None and (backend or dispatch.in_force()) == "triton":
        raise RuntimeError(f"backend 'triton' cannot run mamba2 here: {reason}")
    check_cu_seqlens_values(cu_seqlens, zxbcdt.shape[0], padded=True)
    dtype = torch.float64 if zxbcdt.dtype == torch.float64 else torch.float32
    weights = [p.to(dtype) for p in parameters.values()]
    if chosen == "reference" or reason is not None:
        with torch.autocast(zxbcdt.device.type, enabled=False):
            w, b, dt_b, a, skip, norm = weights
            return reference.mamba2(zxbcdt, w, b, dt_b, a, skip, norm, cu_seqlens, eps)
    return _mamba2(zxbcdt, *weights, cu_seqlens, eps, chosen)[0]


def _check_parameter(name: str, p: Tensor, dim: int, zxbcdt: Tensor) -> None:
    check_tensor(name, p)
    if not p.dtype.is_floating_point or p.dtype.itemsize < 2:
        raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, got {p.dtype}")
    if p.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimension{'s' * (dim > 1)}, got shape {tuple(p.shape)}")
    check_device(name, p, "zxbcdt", zxbcdt)


def _too_much(P: int, S: int, K: int) -> str | None:
    if P in HEADDIMS and S <= MOST_STATES and K <= MOST_TAPS:
        return None
    return (
        f"its kernels take heads of {', '.join(map(str, HEADDIMS))} channels, at most {MOST_STATES} states and "
        f"{MOST_TAPS} taps, got {P}, {S} and {K}"
    )


# --- autograd -----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    *tensors, _, ctx.eps, ctx.chosen = inputs
    _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 10
    grads = _mamba2_bwd(dout, *ctx.saved_tensors, ctx.eps, ctx.chosen)
    return *grads, None, None, None


# --- schema and shapes --------------------------------------------------------------------------------------------


def _fake(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, skip, norm_weight, *_):
    T, H, f32 = zxbcdt.shape[0], A_log.shape[0], torch.float32
    like = zxbcdt.new_empty
    return (
        like(T, norm_weight.shape[0]), like(T, conv_weight.shape[0]), like(T, norm_weight.shape[0]),
        like(H, T, dtype=f32), like(H, T, dtype=f32), like(T, dtype=torch.int32),
    )  # fmt: skip


_mamba2 = define(
    "mamba2(Tensor zxbcdt, Tensor conv_weight, Tensor conv_bias, Tensor dt_bias, Tensor A_log, Tensor skip, "
    "Tensor norm_weight, Tensor cu_seqlens, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda *args: kernels(args[-1], "mamba2").mamba2(*args[:-1]),
    _fake,
    _setup_context,
    _backward,
)
_mamba2_bwd = define(
    "mamba2_bwd(Tensor dout, Tensor zxbcdt, Tensor conv_weight, Tensor conv_bias, Tensor dt_bias, Tensor A_log, "
    "Tensor skip, Tensor norm_weight, Tensor xbc, Tensor y, Tensor dt, Tensor log_decay, Tensor first, float eps, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda *args: kernels(args[-1], "mamba2").mamba2_bwd(*args[:-1]),
    lambda dout, *args: tuple(p.new_empty(p.shape) for p in args[:7]),
)
