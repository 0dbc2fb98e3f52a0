"""Learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hnet.config.run import RunConfig


def cosine(progress: float, low: float) -> float:
    """1 at progress 0, `low` at 1"""
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


LEAST = 1e-3  # of the peak: a plateau drops the rate no further, even where min_lr is less

DECAYS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda progress, low: low + (1 - low) * (1 - progress),
    "inverse-sqrt": lambda progress, low: low + (1 - low) * (1 - math.sqrt(progress)),
    "cosine": cosine,
}


class Schedule:
    """Factor of the peak learning rate at every step. All its state is where the last restart was and what drops and
    cuts have accumulated.

    kind: wsd, cosine, constant, plateau or restarts, see TrainConfig.  steps: of the whole run.
    restart_at: first step of every stage of "restarts"; restart_peak, restart_min: where its cosine begins, ends.
    """

    def __init__(
        self,
        kind: str,
        steps: int,
        *,
        warmup_steps: int = 0,
        decay_fraction: float = 0.3,
        decay_shape: str = "linear",
        min_lr: float = 0.0,
        restart_at: list[int] | None = None,
        restart_min: list[float] | None = None,
        restart_peak: list[float] | None = None,
        plateau_factor: float = 0.5,
    ) -> None:
        self.kind, self.steps, self.warmup_steps, self.min_lr = kind, steps, warmup_steps, min_lr
        self.decay_fraction, self.decay_shape, self.plateau_factor = decay_fraction, decay_shape, plateau_factor
        self.restart_at, self.restart_min = restart_at or [0], restart_min or [0.1]
        self.restart_peak = restart_peak or [1.0] * len(self.restart_at)
        self.restarted = 0  # the step of the last restart that something triggered
        self.drops = 1.0  # of the plateau schedule
        self.cut = 1.0  # by guards

    def factor(self, step: int) -> float:
        """For 0-based `step`; the warm-up lasts warmup_steps and reaches the peak at its last."""
        if step < self.warmup_steps:
            return self.cut * (step + 1) / self.warmup_steps
        return self.cut * self._after_warmup(step)

    def _after_warmup(self, step: int) -> float:
        if self.kind == "constant":
            return 1.0
        if self.kind == "plateau":
            return max(self.drops, self.min_lr)
        if self.kind == "cosine":
            return cosine((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), self.min_lr)
        if self.kind == "restarts":
            stage = max(i for i, at in enumerate(self.restart_at) if at <= step)
            ends = [*self.restart_at[1:], self.steps]
            begin = max(self.restart_at[stage], self.restarted, self.warmup_steps)
            peak = self.restart_peak[stage]
            return peak * cosine((step - begin) / max(ends[stage] - begin, 1), self.restart_min[stage] / peak)
        decay = self.decay_fraction * self.steps
        progress = 0.0 if decay == 0 else max(0.0, 1 - (self.steps - step) / decay)
        return DECAYS[self.decay_shape](min(progress, 1.0), self.min_lr)

    def begins(self, step: int) -> bool:
        """Whether a stage but the first begins as planned at 0-based `step` ("restarts" only)."""
        return self.kind == "restarts" and step > 0 and step in self.restart_at

    def restart(self, step: int) -> None:
        """From `step` on: back to the peak, and down again over what is left of the stage ("restarts" only)."""
        self.restarted = step

    def drop(self) -> None:
        """At a plateau ("plateau" only)."""
        self.drops = max(self.drops * self.plateau_factor, self._lowest)

    @property
    def can_drop(self) -> bool:
        return self.kind == "plateau" and self.drops > self._lowest

    @property
    def _lowest(self) -> float:
        return max(self.min_lr, LEAST)

    def state_dict(self) -> dict[str, Any]:
        return {"restarted": self.restarted, "drops": self.drops, "cut": self.cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restarted, self.drops, self.cut = state["restarted"], state["drops"], state["cut"]


def make_schedule(c: RunConfig) -> Schedule:
    """That of a run; its restarts are shares of the steps."""
    return Schedule(
        c.schedule, c.steps, warmup_steps=c.warmup, decay_fraction=c.decay_fraction, decay_shape=c.decay_shape,
        min_lr=c.min_lr, restart_at=[round(a * c.steps) for a in c.restart_at], restart_min=c.restart_min,
        restart_peak=c.restart_peak,
        plateau_factor=c.plateau_factor,
    )  # fmt: skip
