"""An exponential average of the weights, for evaluation and release."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .shards import local_rows, spread_like


class WeightEMA:
    """average <- decay average + (1 - decay) weights, after every step; the first steps average evenly. Of frozen
    parameters it is themselves, to the bit."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        named = dict(model.named_parameters())
        self.names = list(named)
        self.parameters: list[Tensor] = list(named.values())
        self.average: list[Tensor] = [p.detach().clone() for p in self.parameters]

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

    def named(self) -> dict[str, Tensor]:
        """The average of every parameter; spread over the processes as the parameter is."""
        return dict(zip(self.names, self.average, strict=True))

    @torch.no_grad()
    def load(self, updates: int, average: Mapping[str, Tensor]) -> None:
        """Go on from `updates` and, by name, the average of each parameter, whole on every process."""
        self.updates = updates
        for name, mine in self.named().items():
            mine.copy_(spread_like(average[name], mine))

    def restart(self) -> None:
        """Begin from the weights of now, as if they were the first."""
        self.updates = 0
        torch._foreach_copy_(_local(self.average), _local(self.parameters))


def _local(tensors: list[Tensor]) -> list[Tensor]:
    return [local_rows(t).detach() for t in tensors]
