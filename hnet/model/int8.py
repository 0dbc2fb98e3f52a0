"""Weights as whole numbers of 8 bits, for decoding on a CPU: a byte costs what reading the weights costs."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .isotropic import Isotropic

M = TypeVar("M", bound=nn.Module)


class Int8Linear(nn.Module):
    """y = (scale * int8) x, one scale a row of outputs; int8 (out, in), scale (out, 1) fp32. No gradient for weights.

    A decoding step reads the whole numbers (csrc/cpu/linear.cpp). Elsewhere, in prompts and whole texts, whose many
    positions share the work, the weights are made floating point first.
    """

    int8: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        if not weight.isfinite().all():
            raise ValueError("weights must be finite to be rounded to int8")
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        self.out_features, self.in_features, self.dtype = linear.out_features, linear.in_features, linear.weight.dtype
        self.register_buffer("int8", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """(out, in) in the dtype it had, made anew"""
        return (self.int8 * self.scale).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def _apply(self, fn, recurse: bool = True):
        """`model.to(dtype)` is for x and what is made of it; scales stay fp32."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.dtype = self.scale.dtype if self.scale.dtype != scale.dtype else self.dtype
        self.scale = scale.to(self.scale.device)
        return self


def quantize(model: M) -> M:
    """Round the weights of all projections inside blocks to int8, in place: a quarter of fp32's bytes, half of bf16's.
    Embeddings, head, routers and what goes past a stage stay as they are. For decoding, not for training or saving.
    Returns the model.

    Raises:
        ValueError: weights that are not finite.
    """
    for stack in [m for m in model.modules() if isinstance(m, Isotropic)]:
        for m in list(stack.modules()):
            for name, child in list(m.named_children()):
                if type(child) is nn.Linear:
                    setattr(m, name, Int8Linear(child))
    return model
