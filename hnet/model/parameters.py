"""The parameters of a model, by stage."""

from __future__ import annotations

import torch
from torch import nn

from hnet.config import HNetConfig

from .causal_lm import HNetForCausalLM


def stage_of(name: str) -> int:
    """Stage of a parameter by its name; embeddings and head belong to the outermost.

    The innermost network's own layers are `main_network` of a stage that is itself a `main_network`.
    """
    depth = name.count("main_network.")
    return depth - 1 if "main_network.layers." in name or "main_network.rmsnorm." in name else depth


def stage_parameters(model: HNetForCausalLM) -> list[list[nn.Parameter]]:
    """Parameters of each stage, outermost first."""
    out: list[list[nn.Parameter]] = [[] for _ in range(model.config.num_stages)]
    for name, p in model.named_parameters():
        out[stage_of(name)].append(p)
    return out


def count_parameters(config: HNetConfig) -> int:
    """Of the model as built, without memory for it."""
    with torch.device("meta"):
        model = HNetForCausalLM(config, device="meta")
    return sum(p.numel() for p in model.parameters())
