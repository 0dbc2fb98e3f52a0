"""Parameter groups by stage and kind, AdamW and Muon."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from hnet.config.run import RunConfig
from hnet.model.mamba2 import Mamba2
from hnet.model.parameters import stage_of

from .shards import spread_like


def decays(name: str, parameter: nn.Parameter, embeddings: bool = False) -> bool:
    """Matrices decay; norms, biases, convolutions, Mamba's A_log, D, dt_bias and SpectralState's decay and angle (one
    number a bin and channel, no map) do not; embeddings if asked for."""
    if name.startswith("state.") and name.endswith((".decay", ".angle")):
        return False
    return parameter.dim() == 2 and (embeddings or not name.startswith("embeddings."))


def muon_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters Muon orthogonalises: matrices inside blocks. Not embeddings and head, not the router (its
    identity start matters), not Mamba's in_proj, which stacks five different maps and did worse than under AdamW."""
    in_block = re.compile(r"(\.layers|^blocks)\.\d+\.")
    stacked = {id(m.in_proj.weight) for m in model.modules() if isinstance(m, Mamba2)}
    matrices = (p for name, p in model.named_parameters() if in_block.search(name) and p.dim() == 2)
    return {id(p) for p in matrices} - stacked


class Optimizers:
    """One or two torch optimisers stepped together; every group knows its stage and its peak learning rate."""

    def __init__(self, model: nn.Module, config: RunConfig, multipliers: list[float], router_lr: float = 1.0) -> None:
        """multipliers: learning-rate factor of every stage; router_lr: of routing projections, on top."""
        groups: dict[tuple, list[nn.Parameter]] = {}
        for_muon = muon_parameters(model) if config.optimizer == "muon" else set()
        for name, p in model.named_parameters():
            kind = (id(p) in for_muon, stage_of(name), ".routing_module." in name)
            groups.setdefault((*kind, decays(name, p, config.decay_embeddings)), []).append(p)
        adam: list[dict] = []
        muon: list[dict] = []
        for (is_muon, stage, router, decay), params in groups.items():
            lr = config.learning_rate * multipliers[stage] * (router_lr if router else 1.0)
            group = {"params": params, "lr": lr, "peak": lr, "stage": stage, "router": router}
            group["weight_decay"] = config.weight_decay if decay else 0.0
            (muon if is_muon else adam).append(group)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(adam, betas=(config.betas[0], config.betas[1]), fused=True)
        ]
        if muon:  # scaled so that its updates have AdamW's size: one learning rate serves both
            self.parts.append(torch.optim.Muon(muon, momentum=0.95, adjust_lr_fn="match_rms_adamw"))

    def set_lr(self, factor: float) -> dict[int, float]:
        """Sets every group to `factor` of its peak. Returns AdamW's learning rate of each stage."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak"] * factor
        return {g["stage"]: g["lr"] for g in self.parts[0].param_groups if not g["router"]}

    def step(self, finite: Tensor) -> None:
        """One update, or none at all where `finite` () bool is false: on a CPU by looking, on a GPU without waiting."""
        if finite.is_cuda:
            self.step_without_waiting(finite)
        elif finite:
            for part in self.parts:
                part.step()

    @torch.no_grad()
    def step_without_waiting(self, finite: Tensor) -> None:
        """`step` where nobody may look at `finite`: AdamW can skip by itself; Muon's updates are taken back."""
        for part in self.parts:
            if isinstance(part, torch.optim.AdamW):
                part.found_inf = (~finite).float()  # type: ignore[attr-defined]
                part.step()
            else:
                _step_one_by_one(part, finite)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict]) -> None:
        """Moments and step counts; rates and weight decay are what this run's config says."""
        for part, s in zip(self.parts, state, strict=True):
            kept = [{k: g[k] for k in ("lr", "peak", "weight_decay")} for g in part.param_groups]
            params = [p for g in part.param_groups for p in g["params"]]
            moments = {i: {k: spread_like(v, params[i]) for k, v in values.items()} for i, values in s["state"].items()}
            part.load_state_dict({**s, "state": moments})
            for group, own in zip(part.param_groups, kept, strict=True):
                group.update(own)


def _step_one_by_one(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """A step in which every parameter and its moments are as before where `finite` is false. One parameter at a time,
    so that what is kept of before is never more than one of them."""
    groups = optimizer.param_groups
    try:
        for group in groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                kept = {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
                before = p.clone()
                optimizer.param_groups = [{**group, "params": [p]}]
                optimizer.step()
                p.copy_(torch.where(finite, p, before))
                for k, v in optimizer.state[p].items():
                    if isinstance(v, Tensor):
                        v.copy_(torch.where(finite, v, kept.get(k, torch.zeros_like(v))))
    finally:
        optimizer.param_groups = groups
