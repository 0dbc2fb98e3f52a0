"""All of a run that a checkpoint holds, saved and loaded as one."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hnet.config.run import RunConfig
from hnet.data.pack_stream import merge
from hnet.device import World
from hnet.disk import full_disk
from hnet.errors import MissingPath, PathTaken, RunFailed, user_path
from hnet.model.checkpoint_format import read_weights

from . import branches, checkpoint, distributed
from .optim import Optimizers
from .weight_ema import WeightEMA


@dataclass
class RunState:
    """task: what is trained, see task.py. parts: whatever else has a state_dict, by the name it is saved under.
    step, bytes, seconds: optimiser steps, bytes of text and time so far."""

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

    def find(self, resume: bool | str | Path) -> Path | None:
        """The checkpoint to go on from, on all processes the same; None: a fresh start.

        Args:
            resume: False; True or "latest"; "auto", the latest if there is one; or the path of one.

        Raises:
            MissingPath: there is none.
            PathTaken: a fresh start, or a checkpoint from elsewhere, where there is a run already.
            RunFailed: the processes see different checkpoints.
        """
        out = Path(self.config.out)
        taken = any(distributed.gather((out / branches.METRICS).exists(), self.world))
        if not resume:
            if taken:
                raise PathTaken(f"{out} already holds a run: resume it with --resume, or choose another --out")
            return None
        if resume not in (True, "latest", "auto"):
            path = Path(str(resume))
            if taken and path.resolve().parent != self.root.resolve():
                raise PathTaken(f"{out} holds a run that {path} is no checkpoint of: choose another --out")
            seen = distributed.gather({path.name: checkpoint.fingerprint(path)}, self.world)
            if any(s != seen[0] for s in seen):
                raise self._not_shared(seen)
            return path
        seen = distributed.gather(self._fingerprints(), self.world)
        if any(s != seen[0] for s in seen):
            raise self._not_shared(seen)
        if not seen[0] and resume != "auto":  # under auto: killed before its first checkpoint, or never started
            raise MissingPath(f"nothing to resume: no checkpoint in {self.root}")
        return self.root / list(seen[0])[-1] if seen[0] else None

    def set_aside(self, best_step: int | None) -> branches.Abandoned | None:
        """Before a run writes anything: move away what its directory holds of later steps than now."""
        if not self.world.main:
            return None
        with user_path(self.config.out, "write"):
            return branches.set_aside(Path(self.config.out), self.step or -1, best_step)

    def save(self, best: bool = False) -> Path:
        """A checkpoint of now, also as `best`. With async_checkpoints it is complete after `background.wait()`.

        Raises:
            checkpoint.NotWritten: the disk is full; with async_checkpoints it is the save before that this is said of.
        """
        step, config = self.step, self.config
        about = {"config": dataclasses.asdict(config), "processes": self.world.size}
        with self._whole_or_not_at_all(step):
            write = distributed.snapshot(
                self.root, self.task.model, self.state_dict(), self.optimizers, self.ema, self.world,
                copy=config.async_checkpoints,
            )  # fmt: skip

        def job() -> None:
            with self._whole_or_not_at_all(step):
                path = checkpoint.save_checkpoint(self.root, step, write, about, config.keep_checkpoints)
                if best:
                    checkpoint.mark_best(path)
                self.task.saved(path, step)

        if self.world.main:
            if config.async_checkpoints:
                self.background.start(job)
            else:
                job()
        return self.root / checkpoint.name_of(step)

    @contextmanager
    def _whole_or_not_at_all(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            if self.world.main:
                shutil.rmtree(self.root / distributed.PARTIAL, ignore_errors=True)
            if code := full_disk(e):
                raise checkpoint.NotWritten(code, step, self.root) from e
            raise

    def state_dict(self) -> dict[str, Any]:
        rng = torch.get_rng_state()
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        # Each process knows the exact place of the documents it reads itself.
        parts["data"] = merge(distributed.gather(parts["data"], self.world))
        return {
            "step": self.step, "bytes": self.bytes, "seconds": self.seconds,
            "optimizers": self.optimizers.state_dict(), "task": self.task.state_dict(),
            "ema": None if self.ema is None else {"updates": self.ema.updates},
            "rng": distributed.gather((rng, cuda), self.world),
            **parts,
        }  # fmt: skip

    def load(self, path: Path) -> None:
        """Everything, from a checkpoint."""
        state = checkpoint.load_trainer(path)
        self._load_model(path, state)
        self.task.load_state_dict(state["task"])
        self.step, self.bytes, self.seconds = state["step"], state["bytes"], state["seconds"]
        for name, part in self.parts.items():
            if name in state:  # 0.1.0 has no "unanswered"
                part.load_state_dict(state[name])
        if self.world.rank < len(state["rng"]):  # more processes than before: the new ones keep their own seed
            rng, cuda = state["rng"][self.world.rank]
            torch.set_rng_state(rng)
            if cuda is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(cuda, self.device)

    def roll_back(self, until: int) -> Path | None:
        """Weights and optimiser of the last checkpoint up to step `until` that all processes see, which is returned;
        None if there is no such checkpoint. Steps and data go on, and so do the task's curriculum, targets and
        controllers: the cutoff never falls.

        Raises:
            RunFailed: there are checkpoints, but none that all processes see.
        """
        self.background.join()  # an error of it is said at the next save
        distributed.barrier(self.world)
        seen = distributed.gather(self._fingerprints(until=until), self.world)
        common = [name for name, mark in seen[0].items() if all(s.get(name) == mark for s in seen)]
        if not common:
            if any(seen):
                raise self._not_shared(seen)
            return None
        path = self.root / common[-1]
        self._load_model(path, checkpoint.load_trainer(path))
        return path

    def _fingerprints(self, until: float = math.inf) -> dict[str, str | None]:
        """Of all checkpoints this process sees, oldest first."""
        return {p.name: checkpoint.fingerprint(p) for p in checkpoint.list_checkpoints(self.root, until)}

    def _not_shared(self, seen: list[dict[str, str | None]]) -> RunFailed:
        """seen: by process, `_fingerprints`."""
        names = [", ".join(n for n, mark in s.items() if mark) or "none" for s in seen]
        each = "; ".join(f"process {i} sees {name}" for i, name in enumerate(names))
        need = "which must be on a disk that all nodes share"
        return RunFailed(f"the processes see different checkpoints in {self.root}, {need}: {each}")

    def _load_model(self, path: Path, state: dict[str, Any]) -> None:
        self.task.load_weights(checkpoint.load_weights(path), path)
        if state["optimizers"] is None:
            distributed.load_shards(path / checkpoint.SHARDED, self.task.model, self.optimizers)
        else:
            self.optimizers.load_state_dict(state["optimizers"])
        if self.ema is None:
            return
        if state["ema"] is None:  # the checkpoint is of a run without
            self.ema.restart()
        else:
            self.ema.load(state["ema"]["updates"], read_weights(path / checkpoint.EMA))
