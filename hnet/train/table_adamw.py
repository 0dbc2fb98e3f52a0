"""AdamW for a table of which a step reads few rows: the embeddings of n-grams, most of a small model's parameters.

Dense, every step would go over all rows five times: clear gradients, measure, scale, update three arrays. Here
gradients are those of the rows that were read (a sparse tensor), and other rows get their updates, by their old
momentum, when they are next read, or when somebody asks for all of them: `settle`. It is AdamW all the same
(hnet_kernels/rows.py), and whatever is asked for and when, for evaluations say, does not change a bit.

For one process on a CPU. Elsewhere the table is a parameter like any other, and checkpoints go from one to the other:
beside AdamW's own moments there is `row_steps` (R, 2) int32, see `hnet_kernels.rows.adamw_`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hnet_kernels import rows


def wanted(table: nn.Parameter, betas: tuple[float, float], weight_decay: float) -> bool:
    """Whether it can be updated row by row: rows that decay all change in every step."""
    return rows.usable(table) and rows.tail(*betas) is not None and not weight_decay


class TableAdamW:
    """The part of `optimizer`, an AdamW, that is for one of its parameters."""

    def __init__(self, table: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        self.table, self.optimizer = table, optimizer
        self.tail = rows.tail(*self._group()["betas"]) or 1
        self.recent = torch.zeros(2 * self.tail + 1, dtype=torch.float32)  # of steps that some row may have missed

    def _group(self) -> dict[str, Any]:
        return next(g for g in self.optimizer.param_groups if any(p is self.table for p in g["params"]))

    def _state(self) -> dict[str, Any]:
        """As a loaded checkpoint may have left it: with numbers in fp32, or of a table that was updated densely."""
        state = self.optimizer.state[self.table]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(self.table), torch.zeros_like(self.table)
        if "row_steps" not in state:
            state["row_steps"] = torch.full((len(self.table), 2), int(state["step"]), dtype=torch.int32)
        state["row_steps"] = state["row_steps"].to(torch.int32)
        return state

    def bring_up(self, which: Tensor | None) -> None:
        """Rows (U,) int64, rising, become those of now; None: all."""
        if self.table in self.optimizer.state:
            self._update(torch.arange(len(self.table)) if which is None else which, None)

    def settle(self) -> None:
        """All rows become those of now."""
        self.bring_up(None)

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradient, which is used up."""
        gradient, self.table.grad = self.table.grad, None
        if gradient is None:
            return
        state, group = self._state(), self._group()
        done, (beta1, beta2) = int(state["step"]), group["betas"]
        if done % self.tail == 0:
            self.settle()  # so that nobody asks for what `recent` has no more
        rate = group["lr"] * math.sqrt(1 - beta2 ** (done + 1)) / (1 - beta1 ** (done + 1))
        self.recent[(done + 1) % len(self.recent)] = rate
        if gradient.is_sparse:
            gradient = coalesced(gradient)
            self._update(gradient.indices()[0], gradient.values())
        else:
            self._update(torch.arange(len(self.table)), gradient)
        state["step"] += 1

    def _update(self, which: Tensor, gradient: Tensor | None) -> None:
        state, group = self._state(), self._group()
        rows.adamw_(
            self.table.detach(), state["exp_avg"], state["exp_avg_sq"], state["row_steps"], which, gradient,
            int(state["step"]), self.recent, betas=group["betas"], eps=group["eps"],
        )  # fmt: skip


def coalesced(gradient: Tensor) -> Tensor:
    """With every row once, rising. Of one backward it is so, which autograd forgets; of several it is their sum."""
    if not gradient.is_coalesced():
        which = gradient._indices()[0]
        if bool((which[1:] > which[:-1]).all()):
            gradient._coalesced_(True)
    return gradient.coalesce()


def densify(state: dict[str, Any], betas: tuple[float, float]) -> dict[str, Any]:
    """The state of a parameter for AdamW itself: moments that were left at the last gradient of a row, now."""
    if "row_steps" not in state:
        return state
    fades = float(state["step"]) - state["row_steps"][:, :1].double()
    left = {k: v for k, v in state.items() if k != "row_steps"}
    for key, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True):
        left[key] = (state[key] * beta**fades).to(state[key].dtype)
    return left
