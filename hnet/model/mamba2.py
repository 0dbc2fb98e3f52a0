"""Mamba-2 (arXiv 2405.21060) over packed sequences.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T      y_t = C_t h_t + D x_t      h = 0 before every sequence

On a GPU with mamba-ssm installed its Triton scan runs; elsewhere `ssd` below, the same recurrence as matrix products.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hnet.config import MAMBA_HEADDIM

from .cache import MambaCache, Rows
from .conv import DepthwiseConv1d, last_rows
from .norm import rms_norm
from .pack import Pack

CHUNK = 64  # positions a matrix product; measured best on a CPU (16: 14x slower, 256: 3.5x)


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
        z, xBC, dt = self._project(u)
        if cache is not None:
            cache.tail[slots] = last_rows(xBC, pack, cache.tail.shape[1]).to(cache.tail.dtype)
        elif u.is_cuda and (fused := _mamba_ssm()) is not None:
            return self.out_proj(self.norm(fused(self, xBC, dt, pack), z))
        x, B, C = self._split(self.conv1d(xBC, pack))
        A = -self.A_log.float().exp()
        with torch.autocast(u.device.type, enabled=False):
            x32, B, C = x.float(), B.float(), C.float()
            dt = F.softplus(dt.float() + self.dt_bias.float())
            if cache is not None:
                cache.ssm[slots] = final_states(x32, dt, A, B, pack)
            y = ssd(x32, dt, A, B, C, pack.seq_idx) + self.D.float()[:, None] * x32
        return self.out_proj(self.norm(y.flatten(1).to(u.dtype), z))

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


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, seq: Tensor, chunk: int = CHUNK) -> Tensor:
    """The scan as matrix products over chunks of positions.

    x (T, H, P), dt (T, H), A (H,) negative, B and C (T, S), all fp32; seq (T,) the sequence of each position, not
    decreasing. Returns y (T, H, P). Within a chunk, y = (C B^T * decay) (dt x); the state at each chunk's end is handed
    on by `pass_states`. Decay is zero wherever a sequence boundary lies between.
    """
    T, H, P = x.shape
    n = max(-(-T // chunk), 1)
    pad = n * chunk - T
    xdt = F.pad(x * dt[..., None], (0, 0, 0, 0, 0, pad)).view(n, chunk, H, P).transpose(1, 2)  # (n, H, Q, P)
    B, C = (F.pad(t, (0, 0, 0, pad)).view(n, chunk, -1) for t in (B, C))
    seq = F.pad(seq, (0, pad), value=-1).view(n, chunk)
    a = F.pad(dt * A, (0, 0, 0, pad)).view(n, chunk, H).transpose(1, 2).cumsum(-1)  # (n, H, Q), log decay so far

    visible = (seq[:, :, None] == seq[:, None, :]).tril()[:, None]
    decay = (a[..., :, None] - a[..., None, :]).masked_fill(~visible, -torch.inf).exp()
    y = (decay * (C @ B.transpose(1, 2))[:, None]) @ xdt

    if n > 1:
        to_end = (a[..., -1:] - a).exp() * (seq == seq[:, -1:])[:, None]
        states = torch.einsum("nhqp,nqs->nhps", xdt * to_end[..., None], B)
        unbroken = (seq[1:, -1] == seq[:-1, -1])[:, None]
        carry = torch.where(unbroken, a[1:, :, -1].exp(), 0)
        before = pass_states(states[:-1], carry[:-1])
        from_start = a[1:].exp() * (seq[1:] == seq[:-1, -1:])[:, None]
        y[1:] += from_start[..., None] * torch.einsum("nqs,nhps->nhqp", C[1:], before)
    return y.transpose(1, 2).reshape(n * chunk, H, P)[:T]


def pass_states(states: Tensor, carry: Tensor, block: int = 32) -> Tensor:
    """h_c = carry_{c-1} h_{c-1} + states_c for c = 0..n-1; states (n, H, P, S), carry (n-1, H) in [0, 1].

    Blocks of chunks at a time, each one matrix product that takes the block's incoming state as one more chunk.
    """
    n = states.shape[0]
    out: list[Tensor] = []
    for begin in range(0, n, block):
        s = states[begin : begin + block]
        c = carry[begin : begin + len(s) - 1]
        if out:
            s, c = torch.cat([out[-1][-1:], s]), carry[begin - 1 : begin + len(s) - 1]
        m, (H, P, S) = len(s), s.shape[1:]
        # weight[i, j] = carry_j ... carry_{i-1}: the product of the steps from j to i
        steps = torch.cat([c.new_ones(1, H), c]).T[:, :, None].expand(H, m, m)
        below = torch.ones(m, m, dtype=torch.bool, device=s.device).tril(-1)
        weight = torch.where(below, steps, 1).cumprod(1) * torch.ones_like(below).tril()
        h = torch.bmm(weight, s.transpose(0, 1).flatten(2)).view(H, m, P, S).transpose(0, 1)
        out.append(h[1:] if out else h)
    return torch.cat(out)


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
