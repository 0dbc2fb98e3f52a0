"""Gradient norms by stage, and what is done about them. Nothing here waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import RunConfig
from .shards import local_rows
from .table_adamw import coalesced

AT_LEAST = 20  # norms before a percentile means anything


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """What this process has of them; of a sparse one the rows that it has."""
    found = []
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = coalesced(p.grad)
            found.append(p.grad.values())
        elif p.grad is not None:
            found.append(local_rows(p.grad))
    return found


def stage_norms(stages: list[list[nn.Parameter]], device: torch.device) -> Tensor:
    """(stages,) fp32: 2-norms of the gradients, of all shards where they are sharded"""
    grads = [gradients(parameters) for parameters in stages]
    norms = torch.stack([
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g)).float()) if g else torch.zeros((), device=device)
        for g in grads
    ])  # fmt: skip
    if any(hasattr(p.grad, "to_local") for parameters in stages for p in parameters):
        squares = norms.square()
        torch.distributed.all_reduce(squares)
        norms = squares.sqrt()
    return norms


class Clipper:
    """Scales the gradients of every stage. `adaptive` keeps the last norms of each stage and clips to a percentile of
    them; until there are enough, and in `norm`, the norm of all stages together is clipped to max_grad_norm."""

    def __init__(self, config: RunConfig, stages: list[list[nn.Parameter]], device: torch.device) -> None:
        self.config, self.stages, self.device = config, stages, device
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # norms seen
        self.history = torch.full((config.clip_window, len(stages)), float("nan"), device=device)

    def clip(self) -> Tensor:
        """(stages,) fp32: the norms before."""
        c = self.config
        norms = stage_norms(self.stages, self.device)
        total = torch.linalg.vector_norm(norms)
        if c.clipping == "off":
            return norms
        scale = torch.ones_like(norms)
        if c.max_grad_norm:
            scale *= (c.max_grad_norm / (total + 1e-6)).clamp(max=1.0)
        if c.clipping == "adaptive":
            limit = torch.nanquantile(self.history, c.clip_percentile / 100, dim=0)
            enough = self.count >= min(AT_LEAST, c.clip_window)
            scale = torch.where(enough, (limit / (norms + 1e-6)).clamp(max=1.0), scale)
            seen = torch.where(norms.isfinite(), norms, torch.nan)
            self.history.index_copy_(0, (self.count % c.clip_window)[None], seen[None])
            self.count += 1
        for parameters, s in zip(self.stages, scale.unbind(), strict=True):
            if grads := gradients(parameters):
                torch._foreach_mul_(grads, s)
        return norms

    def state_dict(self) -> dict[str, Any]:
        return {"count": int(self.count), "history": self.history.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count.fill_(state["count"])
        self.history.copy_(state["history"])
