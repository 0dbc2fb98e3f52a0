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
        grads = [local_rows(p.grad) for p in parameters]
        momenta = [local_rows(self._momentum(p)) for p in parameters]
        if skip is None:
            torch._foreach_lerp_(momenta, grads, 1 - keep)
        averages = momenta if skip is None else [m.lerp(g, 1 - keep) for m, g in zip(momenta, grads, strict=True)]
        updates = torch._foreach_lerp(grads, averages, keep) if group["nesterov"] else averages
        whole = [joined(u.bfloat16(), p) for u, p in zip(updates, parameters, strict=True)]
        directions = orthogonalize(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        mine = [local_rows(p) for p in parameters]
        steps = [
            rows_here(d, p).to(p.dtype) * _adjust_lr(lr, group["adjust_lr_fn"], p.shape)
            for p, d in zip(parameters, directions, strict=True)
        ]
        if skip is None:
            torch._foreach_mul_(mine, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(mine, steps)
            return
        for p, step, momentum, average in zip(mine, steps, momenta, averages, strict=True):
            new = p * (1 - lr * group["weight_decay"]) - step
            p.copy_(torch.where(skip, p, new))
            momentum.copy_(torch.where(skip, momentum, average))

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


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
