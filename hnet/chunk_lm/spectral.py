"""One filter for all channels, in three forms that give the same numbers: transform, Toeplitz matrix, low rank.

Signals are time-major, (T, C): a filter is then one matrix product over all columns C = batch x channels. The filter is
given by its response H at the lowest `len(H)` of the n/2 + 1 bins of a transform of length n >= T; the rest are zero:

    y = irfft(rfft(u, n) * H, n)[:T]        that is, y[t] = sum_s h[(t - s) mod n] u[s],  h = irfft(H, n)
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

ROLL_OFF = 32  # bins


def fft_length(seq_len: int, kernel_len: int) -> int:
    """The power of two that holds a linear convolution of seq_len values with kernel_len taps."""
    return 1 << (seq_len + kernel_len - 2).bit_length()


def cutoff_mask(bins: int, cutoff: int) -> Tensor:
    """(bins,) fp32: 1 below the cutoff, then ROLL_OFF bins of raised cosine, then 0. All ones when cutoff = bins.

    Bin cutoff + i has (1 + cos(pi (i + 1) / (ROLL_OFF + 1))) / 2 for i = 0 .. ROLL_OFF - 1: the roll-off lies above the
    cutoff, so that every bin below it is kept whole.
    """
    i = torch.arange(bins, dtype=torch.float64) - cutoff
    edge = 0.5 + 0.5 * torch.cos(math.pi * (i + 1) / (ROLL_OFF + 1))
    return torch.where(i < 0, 1.0, torch.where(i < ROLL_OFF, edge, 0.0)).float()


def passed_bins(bins: int, cutoff: int) -> int:
    """How many of the lowest bins the mask does not zero."""
    return min(bins, cutoff + ROLL_OFF)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is cached while generating must serve in training too
def _mask(bins: int, cutoff: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return cutoff_mask(bins, cutoff)[: passed_bins(bins, cutoff)].to(device, dtype)


def response(kernel: Tensor, gate: Tensor, cutoff: int, n: int) -> Tensor:
    """H = rfft(kernel, n) * sigmoid(gate) * mask, the bins that are not zero.

    Args:
        kernel: (kernel_len,) taps. gate: (n/2 + 1,) logits. cutoff: bins kept whole, 1 .. n/2 + 1.

    Returns:
        (passed_bins,) complex
    """
    exact = torch.promote_types(kernel.dtype, torch.float32)
    m = _mask(len(gate), cutoff, exact, kernel.device)
    return torch.fft.rfft(kernel.to(exact), n)[: len(m)] * (torch.sigmoid(gate[: len(m)]) * m)


def impulse_response(H: Tensor, n: int) -> Tensor:
    """(n,) real: h = irfft(H, n), circular, so that h[-j] is h[n - j]."""
    return torch.fft.irfft(H, n)


def causal_taps(kernel: Tensor, gate: Tensor, cutoff: int, n: int) -> Tensor:
    """(kernel_len,) real: taps 0 .. kernel_len - 1 of the filter, all gains applied; the rest, past and future, cut.

    Gains over frequency are zero-phase: used as they are they spread a tap over both directions of time. Cutting after
    them keeps the filter causal whatever they are.
    """
    return impulse_response(response(kernel, gate, cutoff, n), n)[: len(kernel)]


def filter_last(u: Tensor, H: Tensor, n: int) -> Tensor:
    """(C,): the last of the T outputs of `spectral_filter`, as one dot product. u: (T, C)."""
    T = u.shape[0]
    return impulse_response(H, n)[:T].flip(0).to(u.dtype) @ u


def spectral_filter(u: Tensor, H: Tensor, n: int, form: str | None = None) -> Tensor:
    """y = irfft(rfft(u, n, dim=0) * H, n, dim=0)[:T]

    Args:
        u: (T, C) real, T <= n. Under autocast the products are taken in the autocast dtype.
        H: (passed bins,) complex of fp32, or of fp64 if u is fp64; zero above.
        n: length of the transform.
        form: "fft", "toeplitz" or "lowrank". Default: the fastest as measured, see `choose_form`.

    Returns:
        (T, C), in u's dtype or, from matrix products under autocast, the autocast dtype.
    """
    T = u.shape[0]
    low = torch.is_autocast_enabled(u.device.type) or u.dtype in (torch.bfloat16, torch.float16)
    form = form or choose_form(T, n, len(H), low)
    if form == "fft":
        return _FFTFilter.apply(u, H, n)
    if form == "toeplitz":
        return _circulant(impulse_response(H, n), T).to(u.dtype) @ u
    if form != "lowrank":
        raise ValueError(f"form must be fft, toeplitz or lowrank, got {form!r}")
    V, CS = band_basis(T, n, len(H), H.real.dtype, u.device)
    z = _core(H, CS, n).to(u.dtype) @ (V.to(u.dtype).mT @ u)
    return V.to(u.dtype) @ z


def choose_form(T: int, n: int, bins: int, low_precision: bool) -> str:
    """The fastest form for forward and backward together, by multiply-adds a column.

    Factors measured on a CPU with AVX512-BF16 (one core, 2048 columns, T 256 .. 1024): a small product is 15 % slower,
    and one n log n of the transforms takes the time of 34 multiply-adds in fp32, 140 in bf16.
    """
    rank = min(T, 2 * bins * T / n + 18)
    cost = {
        "toeplitz": 3.0 * T * T,
        "lowrank": 1.15 * (4.0 * T * rank + 3.0 * rank * rank),
        "fft": (140.0 if low_precision else 34.0) * n * math.log2(n),
    }
    return min(cost, key=cost.__getitem__)


# --- transform --------------------------------------------------------------------------------------------------------


class _FFTFilter(torch.autograd.Function):
    """Transforms along contiguous memory, and nothing computed for the bins that are zero."""

    @staticmethod
    def forward(ctx, u: Tensor, H: Tensor, n: int) -> Tensor:
        U = torch.fft.rfft(_transpose(u.to(H.real.dtype)), n)[:, : len(H)]
        ctx.save_for_backward(U, H)
        ctx.n, ctx.dtype = n, u.dtype
        return _transpose(torch.fft.irfft(U * H, n)[:, : u.shape[0]]).to(u.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        U, H = ctx.saved_tensors
        T, n, F = dy.shape[0], ctx.n, len(H)
        Y = torch.fft.rfft(_transpose(dy.to(H.real.dtype)), n)[:, :F]
        du = dH = None
        if ctx.needs_input_grad[0]:
            du = _transpose(torch.fft.irfft(Y * H.conj(), n)[:, :T]).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dH = (Y * U.conj()).sum(0) * _weights(F, n, H.real.dtype, H.device)
        return du, dH, None


def _transpose(x: Tensor) -> Tensor:
    """A contiguous copy of the transposed matrix: PyTorch blocks it for cache only if the source has no gaps."""
    return x.contiguous().mT.contiguous()


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _weights(bins: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(bins,): what a bin of a half spectrum counts in irfft: 2 / n, and 1 / n at the two ends."""
    w = torch.full((bins,), 2.0 / n, dtype=dtype, device=device)
    w[0] = 1.0 / n
    if bins == n // 2 + 1:
        w[-1] = 1.0 / n
    return w


# --- Toeplitz matrix --------------------------------------------------------------------------------------------------


class _Toeplitz(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v: Tensor, rows: int) -> Tensor:
        return v.unfold(0, len(v) - rows + 1, 1).flip(0)

    @staticmethod
    def backward(ctx, dM: Tensor):
        rows, width = dM.shape
        total = rows + width - 1
        exact = torch.promote_types(dM.dtype, torch.float32)
        skew = torch.nn.functional.pad(dM.flip(0).to(exact), (0, rows))  # one longer than `total`: diagonals line up
        return skew.flatten()[: rows * total].view(rows, total).sum(0), None


def toeplitz(v: Tensor, rows: int) -> Tensor:
    """(rows, width): v[rows - 1 - i + j] at (i, j), of v: (rows + width - 1,)."""
    return _Toeplitz.apply(v, rows)


def _circulant(h: Tensor, T: int) -> Tensor:
    """(T, T): h[(t - s) mod n] at (t, s)."""
    return toeplitz(torch.cat([h[:T].flip(0), h[len(h) - T + 1 :].flip(0)]), T)


# --- low rank ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def band_basis(T: int, n: int, bins: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A basis of all that `bins` low bins can say in a window of T values, to rounding.

    The filter maps span{cos, sin of bins 0 .. bins - 1 on 0 .. T - 1} into itself, and inside a window of T < n values
    that span has little more than 2 bins T / n dimensions (Slepian), about half as many as functions when n = 2 T.

    Returns:
        V: (T, rank) orthonormal. CS: (2 bins, rank), cosines then sines in that basis.
    """
    angle = (2 * math.pi / n) * (torch.arange(bins)[:, None] * torch.arange(T)[None] % n).double()
    waves = torch.cat([angle.cos(), angle.sin()])
    _, s, Vh = torch.linalg.svd(waves, full_matrices=False)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-7
    V = Vh[s > tolerance * s[0]].mT
    return V.to(device, dtype).contiguous(), (waves @ V).to(device, dtype)


def _core(H: Tensor, CS: Tensor, n: int) -> Tensor:
    """(rank, rank): the filter in the basis. h[t - s] = sum_f w_f (Re H_f cos(a_t - a_s) - Im H_f sin(a_t - a_s))."""
    w = _weights(len(H), n, CS.dtype, CS.device)
    re, im = (H.real * w)[:, None], (H.imag * w)[:, None]
    cos, sin = CS.chunk(2)
    return CS.mT @ torch.cat([re * cos + im * sin, re * sin - im * cos])
