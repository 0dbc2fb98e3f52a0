"""Faults that no key of our config makes: small changes around the trainer, each of them a bug that others had."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

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
