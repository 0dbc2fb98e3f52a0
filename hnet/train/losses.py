"""What is minimised: next-byte cross entropy and, for every stage with routing, the ratio loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import hnet_kernels as hk

from .decisive import Decisive, Teacher, mean_entropy


class StageStats(NamedTuple):
    """One stage with routing, all () on the device."""

    F: Tensor  # share of positions that are boundaries
    G: Tensor  # mean boundary probability
    ratio_loss: Tensor
    chunks: Tensor
    sequences: Tensor  # that are not empty
    dropped: Tensor  # boundaries past the budget


class Losses(NamedTuple):
    loss: Tensor  # to minimise
    ce: Tensor  # nats a target, without label smoothing
    ratio_loss: Tensor  # sum over the stages, unweighted
    stages: list[StageStats]


def losses(
    logits: Tensor,
    targets: Tensor,
    routing: list[hk.Routing],
    compression: list[float],
    weights: Tensor,
    *,
    reduction: str = "batch",
    straight_through: bool = False,
    label_smoothing: float = 0.0,
    decisive: Decisive | None = None,
    shares: Sequence[Tensor | float] | None = None,
    candidates: Tensor | None = None,
) -> Losses:
    """logits (T, vocab), targets (T,) int64; a target ratio for each Routing; weights (stages,) of the ratio losses.
    Asked for by `decisive`: shares, of every stage's positions to teach as boundaries, default 1 / compression;
    candidates (T,) bool: where chunks of the outermost stage may begin, if not anywhere."""
    taught = decisive is not None and decisive.surprisal is not None
    nats, unsure = hk.cross_entropy(logits, targets, with_entropy=taught)
    loss = ce = nats.mean()
    if label_smoothing:
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
    stages = []
    for r, n in zip(routing, compression, strict=True):
        share, mean = hk.boundary_fractions(r)
        ratio = hk.ratio_loss(r, n, reduction=reduction, straight_through=straight_through)
        sequences = (r.cu_seqlens.diff() > 0).sum()
        stages.append(StageStats(share, mean.detach(), ratio, r.num_chunks, sequences, r.num_dropped))
    ratios = [s.ratio_loss for s in stages]
    if ratios:
        loss = loss + torch.dot(weights, torch.stack(ratios))
    if decisive is not None and decisive.entropy is not None:
        loss = loss + torch.dot(decisive.entropy, torch.stack([mean_entropy(r) for r in routing]))
    if decisive is not None and decisive.surprisal is not None and unsure is not None:
        teacher = Teacher(unsure, candidates)
        taught_losses = [
            teacher.loss(r, share) for r, share in zip(routing, shares or [1 / n for n in compression], strict=True)
        ]
        loss = loss + torch.dot(decisive.surprisal, torch.stack(taught_losses))
    return Losses(loss, ce, sum(ratios, start=ce.new_zeros(())), stages)
