"""Early stopping, on validation cross entropy alone: the sum with the ratio loss rises and falls with the target."""

from __future__ import annotations

import math
from typing import Any


class EarlyStopping:
    """patience: evaluations without improvement by min_delta until `stop`; 0: never. Those where `observe` is told to
    hold are not counted: something else is about to be tried. smoothing s: judged is s * (what was judged before) +
    (1 - s) * val_ce."""

    def __init__(self, patience: int = 0, min_delta: float = 0.0, smoothing: float = 0.0) -> None:
        self.patience, self.min_delta, self.smoothing = patience, min_delta, smoothing
        self.best = math.inf
        self.smooth: float | None = None
        self.best_step: int | None = None
        self.waited = 0

    def observe(self, step: int, val_ce: float, hold: bool = False) -> None:
        s = self.smoothing
        self.smooth = val_ce if self.smooth is None else s * self.smooth + (1 - s) * val_ce
        self.waited = 0 if hold else self.waited + 1
        if self.smooth < self.best - self.min_delta:
            self.best, self.best_step, self.waited = self.smooth, step, 0

    @property
    def stop(self) -> bool:
        return self.patience > 0 and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("best", "best_step", "smooth", "waited")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
