"""Mamba-2 (arXiv 2405.21060) over packed sequences.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T      y_t = C_t h_t + D x_t      h = 0 before every sequence

On a GPU mamba-ssm's Triton scan runs where it is installed, else `hnet_kernels.mamba2`: all between the two projections
in kernels of our own. A backend named by hand ("triton", "reference") goes first. On a CPU, and while a cache is
filled, the same recurrence as matrix products (`ssd`); "triton" runs the kernels in Triton's interpreter there. A
decoding step is plain PyTorch, whose launches, of a few rows each, are for a captured graph to save on a GPU, or on a
CPU part of the one call of hnet/model/native_step.py.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hnet_kernels as hk
from hnet.config import MAMBA_HEADDIM
from hnet_kernels import dispatch
from hnet_kernels.reference import ssd

from .cache import MambaCache, Rows
from .conv import DepthwiseConv1d, last_rows
from .norm import rms_norm
from .pack import Pack


class Mamba2(nn.Module):
    """headdim 64, one B/C group, gated RMSNorm after the scan. Parameter names and layout as published."""

    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int, chunk_size: int) -> None:
        super().__init__()
        self.d_state, self.chunk_size = d_state, chunk_size
        self.d_inner = expand * d_model
        self.nheads = self.d_inner // MAMBA_HEADDIM
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * d_state + self.nheads, bias=False)
        self.conv1d = DepthwiseConv1d(self.d_inner + 2 * d_state, d_conv)
        dt = torch.exp(torch.rand(self.nheads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = GatedRMSNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.in_proj(x).split([self.d_inner, self.d_inner + 2 * self.d_state, self.nheads], dim=-1)

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = F.silu(xBC).split([self.d_inner, self.d_state, self.d_state], dim=-1)
        return x.view(-1, self.nheads, MAMBA_HEADDIM), B, C

    def forward(self, u: Tensor, pack: Pack, cache: MambaCache | None = None, slots: Tensor | None = None) -> Tensor:
        if cache is None and (u.is_cuda or dispatch.in_force() == "triton"):
            return self._fused(u, pack)
        z, xBC, dt = self._project(u)
        if cache is not None:
            cache.tail[slots] = last_rows(xBC, pack, cache.tail.shape[1]).to(cache.tail.dtype)
        x, B, C = self._split(self.conv1d(xBC, pack))
        A = -self.A_log.float().exp()
        with torch.autocast(u.device.type, enabled=False):
            x32, B, C = x.float(), B.float(), C.float()
            dt = F.softplus(dt.float() + self.dt_bias.float())
            if cache is not None:
                cache.ssm[slots] = final_states(x32, dt, A, B, pack)
            y = ssd(x32, dt, A, B, C, pack.seq_idx) + self.D.float()[:, None] * x32
        return self.out_proj(self.norm(y.flatten(1).to(u.dtype), z))

    def _fused(self, u: Tensor, pack: Pack) -> Tensor:
        if dispatch.in_force() == "auto" and (fused := _mamba_ssm()) is not None:
            z, xBC, dt = self._project(u)
            return self.out_proj(self.norm(fused(self, xBC, dt, pack), z))
        conv, norm = self.conv1d, self.norm
        y = hk.mamba2(
            self.in_proj(u), conv.weight[:, 0], conv.bias, self.dt_bias, self.A_log, self.D, norm.weight,
            pack.cu_seqlens, eps=norm.eps,
        )  # fmt: skip
        return self.out_proj(y)

    def allocate_cache(self, batch: int, max_length: int) -> MambaCache:
        w = self.in_proj.weight
        channels = self.d_inner + 2 * self.d_state
        return MambaCache(
            w.new_zeros(batch, self.conv1d.kernel_size - 1, channels),
            w.new_zeros(batch, self.nheads, MAMBA_HEADDIM, self.d_state, dtype=torch.float32),
        )

    def step(self, u: Tensor, cache: MambaCache, rows: Rows) -> Tensor:
        """One new position for each slot: u (n, d_model)."""
        z, xBC, dt = self._project(u)
        xBC, tail = self.conv1d.step(xBC, rows.take(cache.tail))
        rows.put(cache.tail, tail)
        x, B, C = (t.float() for t in self._split(xBC))
        dt = F.softplus(dt.float() + self.dt_bias.float())
        decay = torch.exp(-dt * self.A_log.float().exp())
        h = rows.take(cache.ssm).mul_(decay[..., None, None])
        h.addcmul_((dt[..., None] * x)[..., None], B[:, None, None, :])
        rows.put(cache.ssm, h)
        y = (h * C[:, None, None, :]).sum(-1) + self.D.float()[:, None] * x
        return self.out_proj(self.norm(y.flatten(1).to(u.dtype), z))


class GatedRMSNorm(nn.Module):
    def __init__(self, d: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return rms_norm((y * F.silu(z)).float(), self.weight, self.eps).to(y.dtype)


def final_states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, pack: Pack) -> Tensor:
    """(N, H, P, S): h after the last position of each sequence."""
    out = x.new_zeros(pack.N, x.shape[1], x.shape[2], B.shape[1])
    for n, (s, length) in enumerate(zip(pack.starts, pack.lengths, strict=True)):
        if length:
            rows = slice(s, s + length)
            log = (dt[rows] * A).flip(0).cumsum(0).flip(0) - dt[rows] * A  # decay from after a position to the end
            out[n] = torch.einsum("lhp,ls->hps", x[rows] * (dt[rows] * log.exp())[..., None], B[rows])
    return out


def suits_causal_conv1d(x: Tensor, kernel: int) -> bool:
    """causal-conv1d takes channels by eights and two to four taps; a single row has no stride it would accept."""
    return x.shape[0] > 1 and x.shape[1] % 8 == 0 and 2 <= kernel <= 4


@functools.cache
def _mamba_ssm():
    """mamba-ssm's scan (and causal-conv1d's convolution, if there) over a pack, or None."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        causal_conv1d_fn = None

    def run(m: Mamba2, xBC: Tensor, dt: Tensor, pack: Pack) -> Tensor:
        seq = pack.seq_idx[None]
        if causal_conv1d_fn is not None and suits_causal_conv1d(xBC, m.conv1d.kernel_size):
            if xBC.stride(0) % 8:  # a slice of a projection of odd width
                xBC = xBC.clone(memory_format=torch.contiguous_format)
            w, b = m.conv1d.weight[:, 0].to(xBC.dtype), m.conv1d.bias.to(xBC.dtype)
            xBC = causal_conv1d_fn(xBC.T[None], w, b, seq_idx=seq, activation="silu")[0].T
            x, B, C = xBC.split([m.d_inner, m.d_state, m.d_state], dim=-1)
            x = x.reshape(-1, m.nheads, MAMBA_HEADDIM)
        else:
            x, B, C = m._split(m.conv1d(xBC, pack))
        y = mamba_chunk_scan_combined(
            x[None], dt[None], -m.A_log.float().exp(), B[None, :, None], C[None, :, None], chunk_size=m.chunk_size,
            D=m.D.float(), dt_bias=m.dt_bias.float(), dt_softplus=True, seq_idx=seq,
        )  # fmt: skip
        return y[0].flatten(1)

    return run
