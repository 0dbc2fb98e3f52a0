"""All of a run that a checkpoint holds, saved and loaded as one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hnet.config.run import RunConfig
from hnet.device import World
from hnet.model.checkpoint_format import read_weights

from . import checkpoint, distributed
from .optim import Optimizers
from .weight_ema import WeightEMA


@dataclass
class RunState:
    """task: what is trained, see task.py. parts: whatever else has a state_dict, by the name it is saved under.
    step, bytes, seconds: optimiser steps, positions and time so far."""

    config: RunConfig
    world: World
    device: torch.device
    task: Any
    optimizers: Optimizers
    ema: WeightEMA | None
    parts: dict[str, Any]
    step: int = 0
    bytes: int = 0
    seconds: float = 0.0
    background: checkpoint.Background = field(default_factory=checkpoint.Background)

    @property
    def root(self) -> Path:
        """The folder of the checkpoints."""
        return Path(self.config.out) / "checkpoints"

    def save(self, best: bool = False) -> Path:
        """A checkpoint of now, also as `best`. With async_checkpoints it is complete after `background.wait()`."""
        step, keep = self.step, self.config.keep_checkpoints
        write = distributed.snapshot(
            self.root, self.task.model, self.state_dict(), self.optimizers, self.ema, self.world,
            copy=self.config.async_checkpoints,
        )  # fmt: skip
        about = {"config": dataclasses.asdict(self.config), "processes": self.world.size}

        def job() -> None:
            path = checkpoint.save_checkpoint(self.root, step, write, about, keep)
            if best:
                checkpoint.mark_best(path)
            self.task.saved(path, step)

        if self.world.main:
            if self.config.async_checkpoints:
                self.background.start(job)
            else:
                job()
        return self.root / f"step_{step:08d}"

    def state_dict(self) -> dict[str, Any]:
        rng = torch.get_rng_state()
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "step": self.step, "bytes": self.bytes, "seconds": self.seconds,
            "optimizers": self.optimizers.state_dict(), "task": self.task.state_dict(),
            "ema": None if self.ema is None else {"updates": self.ema.updates},
            "rng": distributed.gather((rng, cuda), self.world),
            **{name: part.state_dict() for name, part in self.parts.items()},
        }  # fmt: skip

    def load(self, path: Path) -> None:
        """Everything, from a checkpoint."""
        state = checkpoint.load_trainer(path)
        self._load_model(path, state)
        self.step, self.bytes, self.seconds = state["step"], state["bytes"], state["seconds"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        if self.world.rank < len(state["rng"]):  # more processes than before: the new ones keep their own seed
            rng, cuda = state["rng"][self.world.rank]
            torch.set_rng_state(rng)
            if cuda is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(cuda, self.device)

    def roll_back(self) -> Path | None:
        """Weights and optimiser of the last checkpoint, which is returned, if there is one; steps and data go on."""
        self.background.wait()
        distributed.barrier(self.world)
        found = checkpoint.list_checkpoints(self.root)
        if not found:
            return None
        self._load_model(found[-1], checkpoint.load_trainer(found[-1]))
        return found[-1]

    def _load_model(self, path: Path, state: dict[str, Any]) -> None:
        self.task.load_weights(checkpoint.load_weights(path), path)
        if state["optimizers"] is None:
            distributed.load_shards(path / checkpoint.SHARDED, self.task.model, self.optimizers)
        else:
            self.optimizers.load_state_dict(state["optimizers"])
        self.task.load_state_dict(state["task"])
        if self.ema is None:
            return
        if state["ema"] is None:  # the checkpoint is of a run without
            self.ema.restart()
        else:
            self.ema.load(state["ema"]["updates"], read_weights(path / checkpoint.EMA))
