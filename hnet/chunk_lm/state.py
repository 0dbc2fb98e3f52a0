"""The spectral state: a leaky rotating accumulator over the spectra of successive chunks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotating_scan(inputs: Tensor, decay: Tensor, angle: Tensor, initial: Tensor | None = None) -> Tensor:
    """H_n = decay e^{i angle} H_{n-1} + (1 - decay) F_n, all n in about log2(N) rounds.

    Round k adds to each state the one 2^k before it, turned and decayed 2^k times; decay < 1 keeps every term bounded.

    Args:
        inputs: (B, N, ...) complex, F. decay, angle: (...) real, decay in [0, 1), angle in radians.
        initial: (B, ...) complex, H before F_1, default 0.

    Returns:
        (B, N, ...) complex, H after each chunk
    """
    turn = torch.polar(decay, angle)
    H = (1 - decay) * inputs
    if initial is not None:
        H = torch.cat([H[:, :1] + (turn * initial)[:, None], H[:, 1:]], 1)
    reach = 1
    while reach < H.shape[1]:
        H = torch.cat([H[:, :reach], H[:, reach:] + turn * H[:, :-reach]], 1)
        turn, reach = turn * turn, 2 * reach
    return H


class SpectralState(nn.Module):
    """Chunks of bytes -> their spectra (of a small embedding) -> accumulator -> (B, d_model), zero at initialisation.

    decay starts between 0.5 and 0.98 over the channels, angle at 0; both are learnt for every bin and channel.
    """

    def __init__(self, chunk: int, width: int, d_model: int) -> None:
        super().__init__()
        self.chunk, bins = chunk, chunk // 2 + 1
        self.embedding = nn.Embedding(256, width)
        half_life = torch.linspace(0, math.log(32), width).exp()
        self.decay = nn.Parameter(torch.logit(0.5 ** (1 / half_life)).expand(bins, width).clone())  # logits
        self.angle = nn.Parameter(torch.zeros(bins, width))
        self.project = nn.Linear(2 * bins * width, d_model, bias=False)
        nn.init.normal_(self.embedding.weight, std=chunk**-0.5)
        nn.init.zeros_(self.project.weight)

    def states(self, ids: Tensor, initial: Tensor | None = None) -> Tensor:
        """(B, T) bytes -> (B, ceil(T / chunk), bins, width) complex. Chunks end with the text: a first one that is not
        whole has silence (zeros) before its bytes."""
        x = self.embedding(ids)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = F.pad(x, (0, 0, -ids.shape[1] % self.chunk, 0)).unflatten(1, (-1, self.chunk))
        spectra = torch.fft.rfft(x, dim=2)
        return rotating_scan(spectra, self.decay.to(x.dtype).sigmoid(), self.angle.to(x.dtype), initial)

    def forward(self, H: Tensor) -> Tensor:
        """(B, bins, width) complex -> (B, d_model)"""
        return self.project(torch.view_as_real(H).flatten(1).to(self.project.weight.dtype))
