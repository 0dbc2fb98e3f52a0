"""The published DeChunk formulation, written from its description: the EMA as a Mamba-2 scan with one state.

dt = log(1 / (1 - p))    x = z / dt    A = -1    B = p    C = 1        h <- e^(A dt) h + dt B x = (1-p) h + p z
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

HEAD = 64


@functools.cache
def ssd_scan() -> Callable | None:
    """mamba-ssm's Triton scan, or None where it cannot be imported."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception:  # absent, or installed without what it imports
        return None
    return mamba_chunk_scan_combined


def dechunk_ssd(scan: Callable) -> Callable:
    """A dechunk with the arguments of `baselines.DECHUNK`; `scan` has the signature of mamba_chunk_scan_combined."""

    def dechunk(
        z: Tensor, prob: Tensor, selected: Tensor, first: Tensor, chunk_start: Tensor, chunk_index: Tensor,
        residual: Tensor,
    ) -> Tensor:  # fmt: skip
        M, D = z.shape
        heads = D // HEAD
        p = prob[chunk_start].float().clamp(1e-4, 1 - 1e-4)
        dt = torch.log(1 / (1 - p))
        x = (z / dt[:, None]).to(z.dtype).view(1, M, heads, HEAD)
        A = -torch.ones(heads, device=z.device)
        B = p.to(z.dtype).view(1, M, 1, 1)
        seq_idx = (first.cumsum(0, dtype=torch.int32) - 1)[None]
        y = scan(
            x, dt.to(z.dtype)[None, :, None].expand(1, M, heads).contiguous(), A, B, torch.ones_like(B),
            chunk_size=256, seq_idx=seq_idx,
        ).view(M, D)  # fmt: skip
        ste = 1 + (selected - selected.detach())
        return (y.index_select(0, chunk_index).float() * ste[:, None] + residual).to(z.dtype)

    return dechunk
