"""The laptop's training step as `hnet train configs/laptop.toml` runs it: its precision, a router that has learnt, real
text (Python's standard library), optimiser, clipping and data, in packs of a given size."""

from __future__ import annotations

import copy
import dataclasses
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hnet.config.keys import override, read_toml
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

from . import harness
from .learning.ours import RECIPE

PACKS = (2048, 16384)  # positions of a step
LEARNT = 120  # steps of 2,048 before anything is measured: a short run, after which the rate is at its target
SIDES = (1024, 2048, 3072)  # of square matrices whose products are the peak

TINY: dict[str, Any] = {  # to see that it runs
    "data": [str(Path(sysconfig.get_paths()["stdlib"]) / "email")], "preset": "tiny", "ngram_rows": 64, "seq_len": 128,
}  # fmt: skip


class Step(NamedTuple):
    seconds: float  # median
    bytes: float  # of text, mean
    flops_per_byte: float  # useful ones, forward and backward, by `hnet.model.cost`, of what was realised
    peak_flops: float  # a second, of the fastest product in the same rounds, in the same precision
    bytes_per_chunk: float
    p_on: float
    p_off: float

    @property
    def of_peak(self) -> float:
        return self.flops_per_byte * self.bytes / self.seconds / self.peak_flops


def config(out: Path, positions: int, smoke: bool = False) -> TrainConfig:
    """The recipe on Python's standard library, with packs of this size."""
    here: dict[str, Any] = {
        "data": [sysconfig.get_paths()["stdlib"]], "pattern": "*.py",
        "exclude": ["site-packages", "dist-packages", "test", "tests"], "batch_bytes": positions, "plots": False,
        "sample_bytes": 0, "device": "cpu", "out": str(out),
    }  # fmt: skip
    return TrainConfig(**override(read_toml(RECIPE, TrainConfig), here | (TINY if smoke else {})))


def learnt(out: Path, smoke: bool = False) -> dict[str, Any]:
    """What `trainer` goes on from: the weights, and what the task keeps, after LEARNT small steps."""
    steps = 3 if smoke else LEARNT
    first = Trainer(dataclasses.replace(config(out, 512 if smoke else PACKS[0], smoke), steps=steps))
    for _ in range(steps):
        first.train_step()
    first.task.stream.close()
    return {"step": first.step, "weights": first.model.state_dict(), "task": first.task.state_dict()}


def trainer(out: Path, positions: int, state: dict[str, Any], smoke: bool = False) -> Trainer:
    """Goes on at the step after `state`, so that rates and weights of the loss are those of that step."""
    made = Trainer(config(out, positions, smoke))
    made.task.load_weights(state["weights"], out)
    made.task.load_state_dict(copy.deepcopy(state["task"]))  # which it moves in place
    made.state.step = state["step"]
    return made


def products(dtype: torch.dtype, sides: tuple[int, ...]) -> dict[str, tuple[Any, float]]:
    """A contender and its FLOPs for every side"""
    found = {}
    for n in sides:
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        found[f"product {n}"] = (lambda i, a=a, b=b: a @ b, 2.0 * n**3)
    return found


def measure(trainer: Trainer, rounds: int, steps: int, sides: tuple[int, ...] = SIDES) -> Step:
    """`steps` in a row each round, and between them products of square matrices."""
    rows: list[dict[str, Any]] = []
    peaks = products(trainer.autocast_dtype or torch.float32, sides)
    run = {"steps": lambda i: rows.extend(trainer.train_step() for _ in range(steps))}
    seconds = harness.race(run | {name: call for name, (call, _) in peaks.items()}, rounds, warmup=2)
    own = rows[-rounds * steps :]
    before = rows[-rounds * steps - 1]["bytes"]

    def mean(name: str) -> float:
        return sum(row[name] for row in own) / len(own)

    return Step(
        seconds["steps"] / steps, (own[-1]["bytes"] - before) / len(own), mean("flops_per_byte"),
        max(flops / seconds[name] for name, (_, flops) in peaks.items()),
        *(mean(f"stage0/{name}") for name in ("bytes_per_chunk", "p_on", "p_off")),
    )  # fmt: skip
