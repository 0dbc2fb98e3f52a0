"""A stack of pre-norm blocks of one width."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hnet.config import HNetConfig, parse_layout

from .attention import CausalAttention
from .cache import LayerCache, Rows
from .conv import GatedConv
from .mamba2 import Mamba2
from .mlp import SwiGLU
from .norm import RMSNorm
from .pack import Pack


def make_mixer(letter: str, config: HNetConfig, stage: int) -> nn.Module:
    d_model = config.d_model[stage]
    if letter in "tT":
        return CausalAttention(d_model, **config.attention(stage))
    if letter in "mM":
        return Mamba2(d_model, **config.ssm(stage))
    return GatedConv(d_model, config.conv_kernel(stage))


class Block(nn.Module):
    """Mixer, then SwiGLU for a capital letter, each after a norm over the residual stream."""

    def __init__(self, letter: str, config: HNetConfig, stage: int) -> None:
        super().__init__()
        d_model = config.d_model[stage]
        self.norm1 = RMSNorm(d_model)
        self.mixer: Any = make_mixer(letter, config, stage)
        self.norm2 = RMSNorm(d_model) if letter.isupper() else None
        self.mlp = SwiGLU(d_model, config.d_intermediate[stage]) if letter.isupper() else None
        self.dropout = 0.0

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _mlp(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if self.mlp is None or self.norm2 is None:
            return x, residual
        x, residual = self.norm2(x, residual)
        return self._drop(self.mlp(x)), residual

    def forward(self, x: Tensor, residual: Tensor | None, pack: Pack, cache=None, slots=None) -> tuple[Tensor, Tensor]:
        x, residual = self.norm1(x, residual)
        return self._mlp(self._drop(self.mixer(x, pack, cache, slots)), residual)

    def step(self, x: Tensor, residual: Tensor | None, cache: LayerCache, rows: Rows) -> tuple[Tensor, Tensor]:
        x, residual = self.norm1(x, residual)
        return self._mlp(self.mixer.step(x, cache, rows), residual)


class Isotropic(nn.Module):
    """Blocks of a layout such as "T1m4", and a last norm. (T, d_model) -> (T, d_model)."""

    def __init__(self, layout: str, config: HNetConfig, stage: int) -> None:
        super().__init__()
        letters = [letter for letter, count in parse_layout(layout) for _ in range(count)]
        self.layers: Any = nn.ModuleList(Block(letter, config, stage) for letter in letters)
        self.rmsnorm = RMSNorm(config.d_model[stage])
        self.recompute = False
        self.num_residuals = sum(2 if letter.isupper() else 1 for letter in letters)

    def forward(
        self, x: Tensor, pack: Pack, cache: list[LayerCache] | None = None, slots: Tensor | None = None
    ) -> Tensor:
        residual = None
        for i, layer in enumerate(self.layers):
            if self.recompute and self.training:  # in the backward, instead of keeping what it computes
                random = layer.dropout > 0  # else no state of a generator is kept, which a CUDA graph could not do
                x, residual = checkpoint(layer, x, residual, pack, use_reentrant=False, preserve_rng_state=random)
            else:
                x, residual = layer(x, residual, pack, None if cache is None else cache[i], slots)
        return self.rmsnorm(x, residual)[0]

    def step(self, x: Tensor, cache: list[LayerCache], rows: Rows) -> Tensor:
        residual = None
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, residual = layer.step(x, residual, layer_cache, rows)
        return self.rmsnorm(x, residual)[0]

    def allocate_cache(self, batch: int, max_length: int) -> list[LayerCache]:
        return [layer.mixer.allocate_cache(batch, max_length) for layer in self.layers]
