"""Muon as `torch.optim.Muon` defines it, in steps that look at nothing on the device: the rate may be a tensor, and
`found_inf` (as AdamW has it) skips the step. That one makes a Python number of the rate.

Where matrices are spread over the processes by rows (fsdp), momentum and weight decay keep to the rows that are here.
Only the direction, which Newton-Schulz iterations find, takes the whole: one matrix at a time is joined, in bf16, in
which the iterations work anyway, and every process takes its own rows of what it finds. They are those of one process
to the bit: the iterations would multiply a difference of one rounding by hundreds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from .shards import joined, local_rows, rows_here


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
        mine, grad, momentum = local_rows(p), local_rows(p.grad), local_rows(momentum)
        average = momentum.lerp(grad, 1 - keep)
        update = joined((grad.lerp(average, keep) if group["nesterov"] else average).bfloat16(), p)
        update = _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        step = rows_here(update, p).to(p.dtype) * _adjust_lr(lr, group["adjust_lr_fn"], p.shape)
        new = mine * (1 - lr * group["weight_decay"]) - step
        mine.copy_(new if skip is None else torch.where(skip, mine, new))
        momentum.copy_(average if skip is None else torch.where(skip, momentum, average))
