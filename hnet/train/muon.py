"""Muon as `torch.optim.Muon` defines it, in steps that look at nothing on the device: the rate may be a tensor, and
`found_inf` (as AdamW has it) skips the step. That one makes a Python number of the rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


class Muon(torch.optim.Muon):
    """found_inf: () fp32, 1 where the step must change nothing. Absent: it is taken."""

    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        skip = self.found_inf.bool() if hasattr(self, "found_inf") else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                self._step_one(p, state["momentum_buffer"], group, skip)

    @staticmethod
    def _step_one(p: Tensor, momentum: Tensor, group: dict[str, Any], skip: Tensor | None) -> None:
        lr, keep = group["lr"], group["momentum"]
        average = momentum.lerp(p.grad, 1 - keep)  # type: ignore[arg-type]
        update = p.grad.lerp(average, keep) if group["nesterov"] else average  # type: ignore[union-attr]
        update = _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        step = update.to(p.dtype) * _adjust_lr(lr, group["adjust_lr_fn"], p.shape)
        new = p * (1 - lr * group["weight_decay"]) - step
        p.copy_(new if skip is None else torch.where(skip, p, new))
        momentum.copy_(average if skip is None else torch.where(skip, momentum, average))
