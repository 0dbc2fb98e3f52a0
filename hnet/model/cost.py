"""What a run costs: parameters, arithmetic and memory by stage. train/task.py prices the lengths that a run meets."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hnet.config import HNetConfig, parse_layout

from .attention import CausalAttention
from .causal_lm import HNetForCausalLM
from .isotropic import Block
from .mamba2 import Mamba2
from .parameters import stage_parameters

# dense bf16 FLOP/s by the vendor's data sheet; a device that is not here has no MFU
PEAK = {
    "A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "MI300X": 1307e12, "L40S": 362e12,
}  # fmt: skip


class StageCost(NamedTuple):
    """What a stage costs; FLOPs are those of forward and backward."""

    parameters: int
    flops: float  # of a position, whatever sequence it is in
    attention: dict[int, float]  # by window: of a position's look at one key

    def of(self, lengths: Tensor) -> Tensor:
        """() fp64 FLOPs of sequences of these lengths (N,), positions of the stage. Waits for no device."""
        lengths = lengths.double()
        total = lengths.sum() * self.flops
        for window, each in self.attention.items():
            total = total + keys_seen(lengths, window) * each
        return total


def keys_seen(lengths: Tensor, window: int) -> Tensor:
    """() how many pairs of a position and a key it sees, itself included, sequences of these lengths (N,) fp64 have."""
    if window < 0:
        return (lengths * (lengths + 1) / 2).sum()
    early = lengths.clamp(max=window + 1)  # positions that see all before them
    return (early * (early + 1) / 2 + (lengths - early) * (window + 1)).sum()


def peak_flops(device_name: str) -> float | None:
    found = [peak for name, peak in PEAK.items() if all(word in device_name for word in name.split())]
    return found[0] if found else None


def stage_costs(model: HNetForCausalLM) -> list[StageCost]:
    """Cost of every stage, outermost first, in useful FLOPs: what the model asks for, not what a kernel spends on it.

    Counted, 2 FLOPs a multiply-add, forward and twice that backward: every matrix at every position (projections, MLPs,
    router, residual projection, head; embeddings are looked up); attention's two products over the keys a position
    really sees, by causality, window and sequence; Mamba-2's write to and read from its state, 2 d_inner d_state each.
    Not counted: what a kernel adds (keys it computes and masks, padding, the products inside a chunk of the SSD,
    recomputation), and what is no matrix product (norms, gates, short convolutions, routing, pooling, dechunking).
    """
    costs = []
    for s, (stage, parameters) in enumerate(zip(model.stages(), stage_parameters(model), strict=True)):
        matrices = sum(p.numel() for p in parameters if p.dim() == 2)
        if s == 0 and not model.config.tie_embeddings:  # tied: one parameter, used as a matrix once
            matrices -= model.embeddings.weight.numel()
        if s == 0 and model.ngrams is not None:
            matrices -= model.ngrams.weight.numel()
        forward, attention = 2.0 * matrices, dict[int, float]()
        stacks = [stage.main_network] if stage.innermost else [stage.encoder, stage.decoder]
        for block in (b for stack in stacks for b in stack.modules() if isinstance(b, Block)):
            m = block.mixer
            if isinstance(m, CausalAttention):
                attention[m.window] = attention.get(m.window, 0.0) + 3 * 4.0 * m.Wqkv.in_features
            elif isinstance(m, Mamba2):
                forward += 4.0 * m.d_inner * m.d_state
        costs.append(StageCost(sum(p.numel() for p in parameters), 3 * forward, attention))
    return costs


def positions_per_byte(compression: list[float]) -> list[float]:
    """How many positions of every stage one byte makes."""
    return [1 / math.prod(compression[:s]) for s in range(len(compression) + 1)]


class Plan(NamedTuple):
    stages: list[StageCost]
    flops: list[float]  # of every stage, forward and backward, for a position of the outermost
    state_bytes: int  # weights, gradients, optimiser
    activation_bytes: float


def plan(
    config: HNetConfig, compression: list[float], lengths: Tensor | float, batch_bytes: int, muon: bool, bf16: bool
) -> Plan:
    """Of a run at its target compression. Activations are an estimate, within about a factor of two.

    lengths: (N,) positions of the sequences it trains on, or of a sample, or the one length of all; an inner stage sees
    each divided by the targets outside it.
    """
    with torch.device("meta"):
        model = HNetForCausalLM(config, device="meta")
    share, costs = positions_per_byte(compression), stage_costs(model)
    parameters = sum(c.parameters for c in costs)
    activations = 0.0
    for s, per_byte in enumerate(share):
        layers = [x for layout in config.layouts(s) for x in parse_layout(layout)]
        width = sum(
            n * (12 * config.d_model[s] + (4 * config.d_intermediate[s] if x.isupper() else 0)) for x, n in layers
        )
        activations += width * per_byte * batch_bytes * (2 if bf16 else 4)
    activations += 3 * config.vocab_size * batch_bytes * 4
    state = parameters * (4 + 4 + (6 if muon else 8))
    lengths = torch.as_tensor(lengths, dtype=torch.float64).flatten()
    flops = [(c.of((lengths * p).clamp(min=1)) / lengths.sum()).item() for c, p in zip(costs, share, strict=True)]
    return Plan(costs, flops, state, activations)
