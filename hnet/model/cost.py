"""What a run costs: parameters, arithmetic and memory by stage. MFU comes from the positions measured, see task.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from hnet.config import HNetConfig, parse_layout

from .attention import CausalAttention
from .causal_lm import HNetForCausalLM
from .isotropic import Block
from .mamba2 import CHUNK, Mamba2
from .parameters import stage_parameters

# dense bf16 FLOP/s by the vendor's data sheet; a device that is not here has no MFU
PEAK = {
    "A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "MI300X": 1307e12, "L40S": 362e12,
}  # fmt: skip


class StageCost(NamedTuple):
    parameters: int
    flops: float  # forward and backward, for one position of the stage


def peak_flops(device_name: str) -> float | None:
    found = [peak for name, peak in PEAK.items() if all(word in device_name for word in name.split())]
    return found[0] if found else None


def stage_costs(model: HNetForCausalLM, seq_len: float) -> list[StageCost]:
    """Cost of every stage, outermost first. seq_len: mean positions of a sequence in the outermost stage.

    A matrix costs 2 FLOPs a parameter and position forward, twice that backward; attention 4 width x context forward;
    the SSD of Mamba-2 two products with its states and two inside a chunk.
    """
    costs, length = [], seq_len
    for s, (stage, parameters) in enumerate(zip(model.stages(), stage_parameters(model), strict=True)):
        matrices = sum(p.numel() for p in parameters if p.dim() == 2)
        if s == 0:
            matrices -= model.embeddings.weight.numel()
            if model.config.tie_embeddings:  # one parameter, used as a matrix once
                matrices += model.embeddings.weight.numel()
        forward = 2.0 * matrices
        stacks = [stage.main_network] if stage.innermost else [stage.encoder, stage.decoder]
        for block in (b for stack in stacks for b in stack.modules() if isinstance(b, Block)):
            forward += mixer_flops(block.mixer, length)
        costs.append(StageCost(sum(p.numel() for p in parameters), 3 * forward))
    return costs


def mixer_flops(mixer: nn.Module, length: float) -> float:
    """Forward FLOPs of a position beside those of its matrices."""
    if isinstance(mixer, CausalAttention):
        context = length / 2 if mixer.window < 0 else min(mixer.window + 1, length / 2)
        return 4.0 * mixer.Wqkv.in_features * context
    if isinstance(mixer, Mamba2):
        return 4.0 * mixer.d_inner * mixer.d_state + CHUNK * (mixer.d_inner + mixer.d_state)
    return 0.0


def positions_per_byte(compression: list[float]) -> list[float]:
    """How many positions of every stage one byte makes."""
    return [1 / math.prod(compression[:s]) for s in range(len(compression) + 1)]


class Plan(NamedTuple):
    stages: list[StageCost]
    flops_per_byte: float
    state_bytes: int  # weights, gradients, optimiser
    activation_bytes: float


def plan(config: HNetConfig, compression: list[float], seq_len: int, batch_bytes: int, muon: bool, bf16: bool) -> Plan:
    """Of a run at its target compression. Activations are an estimate, within about a factor of two."""
    with torch.device("meta"):
        model = HNetForCausalLM(config, device="meta")
    share = positions_per_byte(compression)
    costs = stage_costs(model, seq_len)
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
    flops = sum(c.flops * p for c, p in zip(costs, share, strict=True))
    return Plan(costs, flops, state, activations)
