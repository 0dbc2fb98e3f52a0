"""What the device does in an optimiser step: forward, loss, backward, clipping, update.

Nothing in here looks at a number of the device or lets one decide a shape, given `max_chunks`, so a CUDA graph can hold
it (captured.py; tests/train/test_no_host_reads.py watches over it). Numbers that change from step to step are memory of
the device, written before: learning rates, the warm-up of the ratio loss. The loop (loop.py) does the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hnet.device import World

from . import distributed
from .clipping import Clipper
from .optim import Optimizers


class DeviceStep:
    """run(batches, step) -> values, and `names` of them: means over the step, then gradient norms before clipping."""

    def __init__(self, task: Any, replica: nn.Module, optimizers: Optimizers, clipper: Clipper, world: World) -> None:
        self.task, self.replica, self.optimizers, self.clipper, self.world = task, replica, optimizers, clipper, world
        self.names: list[str] = []

    def run(self, batches: list[Any], step: int) -> Tensor:
        """One optimiser step on the micro-batches, which are on the device.

        step: 0-based. What follows from it is taken as a constant, see `HNetTask.constants`.

        Returns:
            (names,) fp32. Where the loss or the norm is not finite, weights and moments are as before.
        """
        total_targets = sum(b.num_targets for b in batches)  # packs have one size: all processes have as many
        means: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            share = batch.num_targets / total_targets
            with distributed.accumulating(self.replica, i < len(batches) - 1):
                loss, scalars = self.task.loss(self.replica, batch, step)
                (loss * share).backward()
            for name, value in {"loss": loss, **scalars}.items():
                value = value.detach().float() * share
                means[name] = means[name] + value if name in means else value
        vector = torch.stack(list(means.values()))
        if self.world.size > 1:
            vector = distributed.add_up(vector, self.world) / self.world.size
        norms = self.clipper.clip()
        total = torch.linalg.vector_norm(norms)
        self.optimizers.step(finite=torch.isfinite(total) & torch.isfinite(vector[0]))
        self.optimizers.zero_grad()
        self.names = [*means, *(f"stage{i}/grad_norm" for i in range(len(norms))), "grad_norm"]
        return torch.cat([vector, norms, total[None]])
