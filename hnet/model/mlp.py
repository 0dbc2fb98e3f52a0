"""SwiGLU: fc2(silu(gate) * y) with y, gate = fc1(x)."""

from __future__ import annotations

from torch import Tensor, nn

import hnet_kernels as hk


def swiglu_width(d_intermediate: int, multiple_of: int = 128) -> int:
    return -(-d_intermediate // multiple_of) * multiple_of


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_intermediate: int) -> None:
        super().__init__()
        width = swiglu_width(d_intermediate)
        self.fc1 = nn.Linear(d_model, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(hk.swiglu(self.fc1(x)))
