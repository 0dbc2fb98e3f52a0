"""An exponential average of the weights, for evaluation and release."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .shards import local_rows, spread_like


class WeightEMA:
    """average <- decay average + (1 - decay) weights, after every step; the first steps average evenly."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        keep = min(self.decay, self.updates / (self.updates + 10))
        torch._foreach_lerp_(_local(self.average), _local(self.parameters), 1 - keep)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the `with`."""
        weights = _local(self.parameters)
        current = [w.clone() for w in weights]
        torch._foreach_copy_(weights, _local(self.average))
        try:
            yield
        finally:
            torch._foreach_copy_(weights, current)

    def state_dict(self) -> dict[str, Tensor | int | list[Tensor]]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for mine, average in zip(self.average, state["average"] or self.average, strict=True):
            mine.copy_(spread_like(average, mine))


def _local(tensors: list[Tensor]) -> list[Tensor]:
    return [local_rows(t).detach() for t in tensors]
