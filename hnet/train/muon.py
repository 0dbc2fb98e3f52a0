"""Muon as `torch.optim.Muon` defines it, in steps that look at nothing on the device: the rate may be a tensor, and
`found_inf` (as AdamW has it) skips the step. That one makes a Python number of the rate. Matrices of one shape, either
way up, go through the Newton-Schulz iterations together: one by one, those of a small model leave a processor idle.

Where matrices are spread over the processes by rows (fsdp), momentum and weight decay keep to the rows that are here.
Only the direction, which Newton-Schulz iterations find, takes the whole: one matrix at a time is joined, in bf16, in
which the iterations work anyway, and every process takes its own rows of what it finds. They are those of one process
to the bit: the iterations would multiply a difference of one rounding by hundreds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr

from .shards import joined, local_rows, rows_here


class Muon(torch.optim.Muon):
    """found_inf: () fp32, 1 where the step must change nothing. Absent: it is taken."""

    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's may be given one
        skip = self.found_inf.bool() if hasattr(self, "found_inf") else None
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    key = p if hasattr(p, "full_tensor") else tuple(sorted(p.shape))
                    alike.setdefault(key, []).append(p)
            for parameters in alike.values():
                self._step_together(parameters, group, skip)

    def _step_together(self, parameters: list[Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
        lr, keep = group["lr"], group["momentum"]
        averages, updates = [], []
        for p in parameters:
            assert p.grad is not None  # as `step` has seen
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            grad = local_rows(p.grad)
            averages.append(local_rows(state["momentum_buffer"]).lerp(grad, 1 - keep))
            update = grad.lerp(averages[-1], keep) if group["nesterov"] else averages[-1]
            updates.append(joined(update.bfloat16(), p))
        directions = orthogonalize(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
        for p, average, direction in zip(parameters, averages, directions, strict=True):
            mine, momentum = local_rows(p), local_rows(self.state[p]["momentum_buffer"])
            step = rows_here(direction, p).to(p.dtype) * _adjust_lr(lr, group["adjust_lr_fn"], p.shape)
            new = mine * (1 - lr * group["weight_decay"]) - step
            mine.copy_(new if skip is None else torch.where(skip, mine, new))
            momentum.copy_(average if skip is None else torch.where(skip, momentum, average))


def orthogonalize(
    matrices: list[Tensor], coefficients: tuple[float, float, float], steps: int, eps: float
) -> list[Tensor]:
    """Of matrices (m, n) or (n, m), bf16: nearly U V^T of each one's singular value decomposition U S V^T, by `steps`
    Newton-Schulz iterations X <- a X + (b A + c A^2) X with A = X X^T."""
    a, b, c = coefficients
    tall = [x.size(0) > x.size(1) for x in matrices]
    X = torch.stack([x.mT if t else x for x, t in zip(matrices, tall, strict=True)])
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        A = torch.bmm(X, X.mT)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return [x.mT if t else x for x, t in zip(X.unbind(), tall, strict=True)]
