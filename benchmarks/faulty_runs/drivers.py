"""Faults that no key of our config makes: small changes around the trainer, each of them a bug that others had."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hnet.config.run import RunConfig
from hnet.train.loop import Trainer


def zero_rarely(trainer: Trainer) -> None:
    """Gradients are zeroed at every 12th step only."""
    every, zero = 12, trainer.optimizers.zero_grad
    calls = [0]

    def sometimes() -> None:
        calls[0] += 1
        if calls[0] % every == 0:
            zero()

    trainer.optimizers.zero_grad = sometimes


def leak(trainer: Trainer) -> None:
    """Packs are one long sequence to the model."""
    loss = trainer.task.loss

    def joined(model: Any, batch: Any, step: int) -> Any:
        whole = torch.tensor([0, len(batch.input_ids)], dtype=torch.int32)
        return loss(model, dataclasses.replace(batch, cu_seqlens=whole, max_seqlen=len(batch.input_ids)), step)

    trainer.task.loss = joined


def stop_at_a_third(trainer: Trainer) -> None:
    start, last = trainer.start_step, trainer.config.steps // 3

    def until() -> Any:
        trainer.stop = trainer.stop or trainer.step + 1 >= last
        return start()

    trainer.start_step = until


def dead_router(trainer: Trainer) -> None:
    """A projection of the router that was zeroed and gets no gradient."""
    for stage in trainer.model.stages():
        if not stage.innermost:
            weight = stage.routing_module.q_proj_layer.weight
            torch.nn.init.zeros_(weight)
            weight.requires_grad_(False)


def frozen_router(trainer: Trainer) -> None:
    """Routing projections that the optimiser never moves."""
    for group in (g for part in trainer.optimizers.parts for g in part.param_groups):
        if group["router"]:
            group["peak"] = 0.0


def biased(bias: float) -> Any:
    """A router whose logits are off by a constant, which nothing corrects."""

    def drive(trainer: Trainer) -> None:
        for stage in trainer.model.stages():
            if not stage.innermost:
                stage.set_logit_bias(bias)

    return drive


def forget_on_resume(trainer: Trainer) -> None:
    """Half-way the optimiser starts anew, the weights are those of a while ago, and the learning rate is doubled."""
    start, at = trainer.start_step, trainer.config.steps // 2
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}

    def resumed() -> Any:
        if trainer.step == at:
            trainer.model.load_state_dict(before)
            for part in trainer.optimizers.parts:
                part.state.clear()
            trainer.schedule.cut *= 2
        return start()

    trainer.start_step = resumed


def write_sampling(config: RunConfig) -> None:
    """Sampling at temperature 1 from the whole distribution, as another trainer's config would have it."""
    path = Path(config.out) / "config.toml"
    path.write_text(path.read_text() + "\ntemperature = 1.0\ntop_p = 1.0\n")


def drop_stages(config: RunConfig) -> None:
    """A log without norms and compression of the stages, as another trainer would have written it."""
    path = Path(config.out) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.startswith("stage") or k.endswith("/lr")} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


class Changed:
    """A stream whose packs go through `change` first."""

    def __init__(self, stream: Any, change: Callable[[Any], Any]) -> None:
        self.stream, self.change = stream, change

    def __next__(self) -> Any:
        return self.change(next(self.stream))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def one_batch(trainer: Trainer) -> None:
    """The loader is made anew for every step: it always yields its first pack."""
    kept: list[Any] = []

    def first(batch: Any) -> Any:
        kept.append(batch)
        return kept[0]

    trainer.task.stream = Changed(trainer.task.stream, first)


def by_length(trainer: Trainer) -> None:
    """Pieces of the text come in order of their length."""
    shuffled = trainer.task.stream._rows[0][0].settle(0)
    shuffled.order = np.argsort(shuffled.pieces.positions, kind="stable").astype(shuffled.order.dtype)
    shuffled.ends = shuffled.pieces.positions[shuffled.order].cumsum(dtype=np.int64)


def sees_what_it_predicts(trainer: Trainer) -> None:
    """The model's input is a byte ahead, in training and in evaluation."""
    forward = trainer.model.forward

    def ahead(input_ids: Any, **more: Any) -> Any:
        return forward(torch.roll(input_ids, -1), **more)

    trainer.model.forward = ahead


def evaluates_on_training_text(trainer: Trainer) -> None:
    trainer.task.val = trainer.task.stream.source


def decays_at_once(trainer: Trainer) -> None:
    """The schedule counts micro-steps of another set-up: it is at its end after a quarter of the run."""
    factor, steps = trainer.schedule.factor, trainer.config.steps
    trainer.schedule.factor = lambda step: factor(min(4 * step, steps - 1))


def some_nan(trainer: Trainer) -> None:
    """Every 15th batch has a loss of NaN."""
    loss = trainer.task.loss

    def sometimes(model: Any, batch: Any, step: int) -> Any:
        value, means = loss(model, batch, step)
        return (value * float("nan") if step % 15 == 14 else value), means

    trainer.task.loss = sometimes


def inner_left_out(trainer: Trainer) -> None:
    """The optimiser was made without the innermost network."""
    groups = [g for part in trainer.optimizers.parts for g in part.param_groups]
    inner = max(g["stage"] for g in groups)
    for group in groups:
        if group["stage"] == inner:
            group["peak"] = group["weight_decay"] = 0.0


def outer_left_out(trainer: Trainer) -> None:
    """The optimiser was made without encoder and decoder of the outermost stage."""
    for group in (g for part in trainer.optimizers.parts for g in part.param_groups):
        if group["stage"] == 0:
            group["peak"] = group["weight_decay"] = 0.0


def two_ahead(trainer: Trainer) -> None:
    """Targets are shifted once more than they should be, in training only."""

    def shift(batch: Any) -> Any:
        return dataclasses.replace(batch, targets=torch.roll(batch.targets, -1))

    trainer.task.stream = Changed(trainer.task.stream, shift)


def forgetful(trainer: Trainer) -> None:
    """The optimiser's state is lost at every 10th step."""
    start = trainer.start_step

    def started() -> Any:
        if trainer.step % 10 == 9:
            for part in trainer.optimizers.parts:
                part.state.clear()
        return start()

    trainer.start_step = started


def summed(trainer: Trainer) -> None:
    """The gradient of a sum over the batch, not of its mean."""
    loss = trainer.task.loss

    def times(model: Any, batch: Any, step: int) -> Any:
        value, means = loss(model, batch, step)
        return (value * len(batch.targets) if model.training else value), means

    trainer.task.loss = times


def evaluates_in_training_mode(trainer: Trainer) -> None:
    """model.eval() was forgotten."""
    trainer.model.eval = lambda: trainer.model


def slower_and_slower(trainer: Trainer) -> None:
    """Something that every step goes through grows from step to step."""
    loss = trainer.task.loss

    def slowly(model: Any, batch: Any, step: int) -> Any:
        time.sleep(0.003 * step)
        return loss(model, batch, step)

    trainer.task.loss = slowly
