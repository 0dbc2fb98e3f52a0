"""What is minimised: next-byte cross entropy and, for every stage with routing, the ratio loss."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

import hnet_kernels as hk


class StageStats(NamedTuple):
    """One stage with routing, all () fp32 on the device."""

    F: Tensor  # share of positions that are boundaries
    G: Tensor  # mean boundary probability
    ratio_loss: Tensor
    chunks: Tensor


class Losses(NamedTuple):
    loss: Tensor
    ce: Tensor  # nats a target
    ratio_loss: Tensor  # sum over the stages, unweighted
    stages: list[StageStats]


def losses(
    logits: Tensor, targets: Tensor, routing: list[hk.Routing], compression: list[float], weight: float
) -> Losses:
    """logits (T, vocab), targets (T,) int64; one target ratio for each Routing."""
    ce = F.cross_entropy(logits.float(), targets)
    stages = []
    for r, n in zip(routing, compression, strict=True):
        share, mean = hk.boundary_fractions(r)
        stages.append(StageStats(share, mean.detach(), hk.ratio_loss(r, n), r.num_chunks.float()))
    ratio = sum((s.ratio_loss for s in stages), start=ce.new_zeros(()))
    return Losses(ce + weight * ratio, ce, ratio, stages)
