"""How decided routers are: sums over a pack, on the device, and the numbers made of them.

A boundary is anything that begins a chunk, first positions of sequences (p = 1) among them, so that G = F p_on +
(1 - F) p_off. Whatever else has p > 1/2 (no candidate, past the budget) counts as elsewhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hnet_kernels import Routing

NEAR = 0.1  # of 1/2: undecided


class RouterSums(NamedTuple):
    """Of one stage, () fp32. They add up over packs and processes; padding (p = 0, no boundary) adds nothing."""

    on: Tensor  # p, summed over boundaries
    off: Tensor  # p, summed over all other positions
    near: Tensor  # positions with |p - 1/2| < NEAR


@torch.no_grad()
def router_sums(r: Routing) -> RouterSums:
    """Waits for the device nowhere; shapes follow from those of `r`."""
    p, b = r.boundary_prob.detach(), r.boundary_mask
    near = ((p - 0.5).abs() < NEAR).sum().to(p.dtype)
    return RouterSums(torch.where(b, p, 0).sum(), torch.where(b, 0, p).sum(), near)


def decisiveness(positions: float, chunks: float, on: float, off: float, near: float) -> dict[str, float]:
    """p_on: mean p on boundaries; p_off: mean p elsewhere, NaN where every position is a boundary; undecided: share of
    positions with |p - 1/2| < NEAR. From counts of positions and chunks, and `RouterSums`."""
    elsewhere = positions - chunks
    return {
        "p_on": on / max(chunks, 1),
        "p_off": off / elsewhere if elsewhere > 0.5 else math.nan,
        "undecided": near / max(positions, 1),
    }
