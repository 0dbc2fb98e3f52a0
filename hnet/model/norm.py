"""RMSNorm over a separate fp32 residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hnet_kernels as hk


class RMSNorm(nn.Module):
    """h = weight * r / sqrt(mean(r^2) + eps) with r = x + residual.

    forward(x, residual): x (T, D) any float dtype, residual (T, D) fp32 or None (the stream starts here).
    Returns h (T, D) in x's dtype and the new residual stream (T, D) fp32.
    """

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return hk.add_rms_norm(x, residual, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) fp32, weight (D,)"""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight.float(), eps)
