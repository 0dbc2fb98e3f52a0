"""Holding the compression target: weight of the ratio loss, its warm-up, annealed targets, the rate controller.

The ratio loss equals 1 for every F when G = 1/N, so by itself it may rest far from the target; the controller closes
the loop on F itself. "bias" integrates a logit bias of every stage, b <- b - gain (F N - 1), which moves the rate and
not the threshold, within +-8; the bias is saved in the model's config. "alpha" integrates the weight of the ratio loss,
alpha <- alpha + gain alpha_0 (|F N - 1| - 0.02).

A router that has decided hardly moves for either: its p are far from 1/2. Where one is taught (hnet.train.decisive),
both also move what it is taught, with a gain of their own: the share of positions is 1/N e^c, c <- c - gain (F N - 1),
within a factor of 2, from where the teacher acts in full. All stand still for the last tenth of the run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hnet.events import Event
from hnet.model.causal_lm import HNetForCausalLM
from hnet.plateau import ValidationPlateau

from .config import TrainConfig

TOLERANCE = 0.02
MAX_BIAS = 8.0  # a factor of 3000 on the odds; what that does not reach cannot be reached
MOST = 100.0  # times its start is as far as alpha goes
MAX_TAUGHT = math.log(2.0)  # of c


def auto_ratio_weight(parameters: int) -> float:
    """1 up to 10M parameters, then parameters^-0.35: 0.2 at 1B. The same push on p needs less weight in a larger model
    (a fit to published runs; the paper's own 0.03 undershoots its targets by a fifth)."""
    return min(1.0, (1e7 / max(parameters, 1)) ** 0.35)


class Compression:
    """Everything about the target that changes during a run. Tensors stay on the device; nothing here waits for it."""

    def __init__(self, config: TrainConfig, model: HNetForCausalLM) -> None:
        self.config = config
        self.stages = [s for s in model.stages() if not s.innermost]
        device = model.embeddings.weight.device
        weight = config.ratio_weight
        if isinstance(weight, str):
            weight = auto_ratio_weight(sum(p.numel() for p in model.parameters()))
        self.base = float(weight)
        self.alpha = torch.full((len(self.stages),), self.base, device=device)
        self.warm = torch.ones((), device=device)  # share of alpha while it warms up
        self.taught = torch.zeros(len(self.stages), device=device)  # c
        self.notch = 0
        self.at_limit: set[int] = set()  # stages whose bias has been reported
        self.plateau = ValidationPlateau(config.plateau_patience, config.plateau_cooldown, config.plateau_min_gain)
        if config.rate_control == "bias":
            for s in self.stages:
                if s.logit_bias is None:
                    s.set_logit_bias(0.0)

    def prepare(self, step: int) -> None:
        """Before `step`: what a captured one reads from the device."""
        if warmup := self.config.ratio_warmup:
            self.warm.fill_(min(1.0, (step + 1) / warmup))

    def weights(self) -> Tensor:
        """(stages,) weight of every stage's ratio loss in the step that was prepared"""
        return self.alpha * self.warm if self.config.ratio_warmup else self.alpha

    @property
    def teaches(self) -> bool:
        """Whether what is taught moves with the rate."""
        c = self.config
        return c.rate_control != "none" and c.surprisal_gain > 0 and any(c.surprisal_weight) and bool(self.stages)

    def shares(self, step: int) -> list[Tensor | float]:
        """The share of every stage's positions to teach as boundaries; () on the device where it is controlled."""
        wanted = self.targets(step)
        if not self.teaches:
            return [1 / n for n in wanted]
        return [f / n for f, n in zip(self.taught.exp().unbind(), wanted, strict=True)]

    def targets(self, step: int) -> list[float]:
        """Positions per chunk to aim at now."""
        c = self.config
        if not c.compression_start:
            return c.compression
        if c.compression_anneal == "plateau":
            done = self.notch / c.compression_notches
        else:
            done = min(1.0, step / (c.compression_anneal_steps or max(c.steps // 2, 1)))
        return [a + (b - a) * done for a, b in zip(c.compression_start, c.compression, strict=True)]

    @torch.no_grad()
    def after_step(self, step: int, F: Tensor) -> None:
        """F (stages,): the share of boundaries of the whole step, over all processes."""
        c = self.config
        if c.rate_control == "none" or step >= 0.9 * c.steps or not self.stages:
            return
        targets = self.targets(step)  # numbers, not a tensor: that would wait for a GPU
        error = torch.stack([f * n for f, n in zip(F.unbind(), targets, strict=True)]) - 1
        if c.rate_control == "bias":
            move = c.rate_gain * error.clamp(-1, 1)
            for s, m in zip(self.stages, move.unbind(), strict=True):
                assert s.logit_bias is not None
                s.logit_bias.sub_(torch.where(m.isfinite(), m, 0)).clamp_(-MAX_BIAS, MAX_BIAS)
        else:
            move = c.rate_gain * max(self.base, 1e-3) * (error.abs().clamp(max=1) - TOLERANCE)
            self.alpha.add_(move.nan_to_num()).clamp_(self.base, MOST * max(self.base, 1e-3))
        if self.teaches and step >= c.surprisal_warmup * c.steps:
            move = c.surprisal_gain * error.clamp(-1, 1)
            self.taught.sub_(move.nan_to_num()).clamp_(-MAX_TAUGHT, MAX_TAUGHT)

    def observe(self, val_ce: float) -> bool:
        """The cross entropy of an evaluation. With annealing by plateau: True if the target moved a notch."""
        c = self.config
        if not c.compression_start or c.compression_anneal != "plateau" or self.notch >= c.compression_notches:
            return False
        if not self.plateau.observe(val_ce):
            return False
        self.plateau.clear()  # what was reached with the old target is out of reach
        self.notch += 1
        return True

    def at_limits(self, row: dict[str, Any]) -> list[Event]:
        """Says once of every stage that its bias can go no further while the target is missed."""
        events = []
        for i in range(len(self.stages)):
            bias, F, target = (row.get(f"stage{i}/{k}", 0.0) for k in ("logit_bias", "F", "target"))
            missed = math.copysign(1, bias) * (1 - F * target) > TOLERANCE  # on the side that the bias pushes to
            if abs(bias) < MAX_BIAS - 1e-3:
                self.at_limit.discard(i)
            elif missed and i not in self.at_limit:
                self.at_limit.add(i)
                few = bias > 0  # chunks, though the bias asks for as many as it can
                why = "boundaries allows no more" if few else "every sequence begins a chunk, and documents are short"
                events.append(Event(
                    "rate_at_limit", f"stage{i} has its logit bias at the limit, {bias:+g}, and {1 / max(F, 1e-9):.2f} "
                    f"positions a chunk where {target:g} are asked for: this data cannot reach that, perhaps because "
                    f"{why}; {'raise' if few else 'lower'} compression",
                ))  # fmt: skip
        return events

    def state_dict(self) -> dict[str, Any]:
        biases = [None if s.logit_bias is None else s.logit_bias.cpu() for s in self.stages]
        return {
            "alpha": self.alpha.cpu(), "taught": self.taught.cpu(), "biases": biases, "notch": self.notch,
            "plateau": self.plateau.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alpha.copy_(state["alpha"])
        self.taught.copy_(state.get("taught", self.taught))  # not in 0.1.0
        self.notch = state["notch"]
        self.plateau.load_state_dict(state["plateau"])
        for s, b in zip(self.stages, state["biases"], strict=True):
            s.logit_bias = None if b is None else b.to(self.alpha.device)
