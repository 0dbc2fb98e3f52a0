"""Parameter groups by stage and kind, AdamW and Muon."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from hnet.config.run import RunConfig
from hnet.errors import UserError
from hnet.model.mamba2 import Mamba2
from hnet.model.parameters import stage_of

from .muon import Muon
from .shards import sharded, spread_like
from .table_adamw import TableAdamW, densify, wanted


def decays(name: str, parameter: nn.Parameter, embeddings: bool = False) -> bool:
    """Matrices decay; norms, biases, convolutions, Mamba's A_log, D, dt_bias and SpectralState's decay and angle (one
    number a bin and channel, no map) do not; embeddings if asked for."""
    if name.startswith("state.") and name.endswith((".decay", ".angle")):
        return False
    return parameter.dim() == 2 and (embeddings or not name.startswith(("embeddings.", "ngrams.")))


def muon_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters Muon orthogonalises: matrices inside blocks. Not embeddings and head, not the router (its
    identity start matters), not Mamba's in_proj, which stacks five different maps and did worse than under AdamW, not
    the factors of adapters (lora_rank)."""
    in_block = re.compile(r"(\.layers|^blocks)\.\d+\.")
    stacked = {id(m.in_proj.weight) for m in model.modules() if isinstance(m, Mamba2)}
    named = ((n, p) for n, p in model.named_parameters() if in_block.search(n) and ".lora_" not in n)
    matrices = (p for _, p in named if p.dim() == 2)
    return {id(p) for p in matrices} - stacked


class AdamW(torch.optim.AdamW):
    """found_inf: as of `Muon`; the fused step reads it. table: updates one of the parameters instead."""

    found_inf: Tensor
    table: TableAdamW | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's may be given one
        if self.table is not None:
            self.table.step()
        super().step(closure)


class Optimizers:
    """One or two torch optimisers stepped together; every group knows its stage and its peak learning rate.

    On a GPU, unless the parameters are sharded, the rates are numbers there, of which a CUDA graph knows the address.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        multipliers: list[float],
        router_lr: float = 1.0,
        tables_by_row: bool = False,
    ) -> None:
        """multipliers: learning-rate factor of every stage; router_lr: of routing projections, on top; tables_by_row:
        update embeddings of n-grams where they were read, if that can be."""
        groups: dict[tuple, list[nn.Parameter]] = {}
        for_muon = muon_parameters(model) if config.optimizer == "muon" else set()
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            kind = (id(p) in for_muon, stage_of(name), ".routing_module." in name)
            groups.setdefault((*kind, decays(name, p, config.decay_embeddings)), []).append(p)
        adam: list[dict] = []
        muon: list[dict] = []
        for (is_muon, stage, router, decay), params in groups.items():
            lr = config.learning_rate * multipliers[stage] * (router_lr if router else 1.0)
            group = {"params": params, "lr": lr, "peak": lr, "stage": stage, "router": router}
            group["weight_decay"] = config.weight_decay if decay else 0.0
            (muon if is_muon else adam).append(group)
        if not adam:  # the rest is frozen; AdamW's state and rates are asked for all the same
            none: dict[str, Any] = {"params": [], "lr": 0.0, "peak": 0.0, "stage": 0, "router": True}
            adam = [none | {"weight_decay": 0.0}]
        first = AdamW(adam, betas=(config.betas[0], config.betas[1]), fused=True)
        self.parts: list[AdamW | Muon] = [first]
        if muon:  # scaled so that its updates have AdamW's size: one learning rate serves both
            self.parts.append(Muon(muon, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
        self.ngrams: Any = getattr(model, "ngrams", None)
        if tables_by_row and self.ngrams is not None and self.ngrams.weight.requires_grad:
            self._update_by_row(first)
        self.factor = 1.0
        self.rates: Tensor | None = None  # (groups,)
        device = next(model.parameters()).device
        if device.type == "cuda" and not sharded(model):
            self.keep_rates_on(device)

    def _groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def _update_by_row(self, adam: AdamW) -> None:
        weight = self.ngrams.weight
        group = next(g for g in adam.param_groups if any(p is weight for p in g["params"]))
        if wanted(weight, group["betas"], group["weight_decay"]):
            table = adam.table = TableAdamW(weight, adam)
            self.ngrams.before_reading = lambda rows: table.bring_up(rows)  # a method would be copied with the model

    @property
    def table(self) -> TableAdamW | None:
        return getattr(self.parts[0], "table", None)

    def settle(self) -> None:
        """Every parameter becomes what it is after the steps so far, rows of a table that none of late has read too."""
        if self.table is not None:
            self.table.settle()

    def keep_rates_on(self, device: torch.device) -> None:
        """From now on the rates are read from memory of the device, and no step looks at anything."""
        if isinstance(adam := self.parts[0], AdamW) and adam.table is not None:
            raise RuntimeError("a table that is updated row by row asks the host for the rate")
        dtype = torch.float64 if device.type == "cpu" else torch.float32  # what AdamW computes with there
        groups = self._groups()
        self.rates = torch.zeros(len(groups), dtype=dtype, device=device)
        for group, rate in zip(groups, self.rates.unbind(), strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = device.type == "cuda"
        self.set_lr(self.factor)

    def set_lr(self, factor: float) -> dict[int, float]:
        """Sets every group to `factor` of its peak. Returns AdamW's learning rate of each stage."""
        self.factor, groups = factor, self._groups()
        now = [g["peak"] * factor for g in groups]
        if self.rates is None:
            for group, rate in zip(groups, now, strict=True):
                group["lr"] = rate
        else:
            new = torch.tensor(now, dtype=self.rates.dtype)
            self.rates.copy_(new.pin_memory() if self.rates.is_cuda else new, non_blocking=True)
        return {g["stage"]: g["peak"] * factor for g in self.parts[0].param_groups if not g["router"]}

    def step(self, finite: Tensor) -> None:
        """One update, or none at all where `finite` () bool is false: on a CPU by looking, on a GPU without waiting."""
        if finite.is_cuda or self.rates is not None:
            self.step_without_waiting(finite)
        elif finite:
            for part in self.parts:
                part.step()

    def step_without_waiting(self, finite: Tensor) -> None:
        """`step` where nobody may look at `finite`: both optimisers can skip by themselves."""
        skip = (~finite).float()
        for part in self.parts:
            part.found_inf = skip
            part.step()
            del part.found_inf

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        self.settle()
        states = [part.state_dict() for part in self.parts]
        for group in (g for s in states for g in s["param_groups"]):
            group["lr"] = group["peak"] * self.factor  # a number, wherever it is kept
        return states

    def load_state_dict(self, state: list[dict]) -> None:
        """Moments and step counts; rates and weight decay are what this run's config says.

        Raises:
            UserError: they are of other parameters than this run trains.
        """
        mine = [[len(g["params"]) for g in part.param_groups] for part in self.parts]
        saved = [[len(g["params"]) for g in part["param_groups"]] for part in state]
        if mine != saved:
            raise UserError(
                "optimizer, decay_embeddings, lora_* and freeze must be those of the run that goes on, which trained "
                f"parameters in groups of {saved}, this one {mine}; to change them start anew, with init_from"
            )
        for part, s in zip(self.parts, state, strict=True):
            own_keys = ("lr", "peak", "weight_decay", "capturable")
            kept = [{k: g[k] for k in own_keys if k in g} for g in part.param_groups]
            params = [p for g in part.param_groups for p in g["params"]]
            by_row = None if self.table is None else self.table.table
            whole = {
                i: values if params[i] is by_row else densify(values, s["param_groups"][0].get("betas"))
                for i, values in s["state"].items()
            }
            moments = {i: {k: spread_like(v, params[i]) for k, v in values.items()} for i, values in whole.items()}
            part.load_state_dict({**s, "state": moments})
            for group, own in zip(part.param_groups, kept, strict=True):
                group.update(own)
