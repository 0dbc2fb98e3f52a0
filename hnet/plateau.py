"""When a loss has stopped falling: of validation (learning rate, targets), and of training (ChunkLM's cutoff)."""

from __future__ import annotations

import math
from collections import deque

from .errors import UserError


class ValidationPlateau:
    """`observe(loss)` is True when more than `patience` evaluations in a row were not below the best one by the share
    `min_gain`; the `cooldown` evaluations that follow are not counted. The rule of torch's ReduceLROnPlateau."""

    def __init__(self, patience: int, cooldown: int = 0, min_gain: float = 0.0) -> None:
        self.patience, self.cooldown, self.min_gain = patience, cooldown, min_gain
        self.best = math.inf
        self.bad = self.cooling = 0

    def observe(self, loss: float) -> bool:
        if loss < self.best * (1 - self.min_gain):
            self.best, self.bad = loss, 0
        else:
            self.bad += 1
        if self.cooling:
            self.cooling, self.bad = self.cooling - 1, 0
        if self.bad <= self.patience:
            return False
        self.cooling, self.bad = self.cooldown, 0
        return True

    def clear(self) -> None:
        """Any loss is the best so far; a cooldown goes on."""
        self.best, self.bad = math.inf, 0

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "bad": self.bad, "cooling": self.cooling}

    def load_state_dict(self, state: dict[str, float] | list[float]) -> None:
        if isinstance(state, list):  # 0.1.0 looked at training losses instead
            return
        self.best, self.bad, self.cooling = state["best"], int(state["bad"]), int(state["cooling"])


class Plateau:
    """Fires when the loss has stopped falling: of the last `window` losses, the mean of the second half is less than
    the share `threshold` below the mean of the first. `clear` begins a new history. The losses of single steps are
    noisy: what the window must average away is noise * sqrt(4 / window) against what falls in half a window."""

    def __init__(self, window: int = 50, threshold: float = 0.005) -> None:
        if window < 2 or not threshold >= 0:
            raise UserError(f"window must be at least 2 and threshold >= 0, got {window} and {threshold}")
        self.window, self.threshold = window, threshold
        self.losses: deque[float] = deque(maxlen=window)

    def observe(self, loss: float) -> None:
        if math.isfinite(loss):
            self.losses.append(loss)

    def fires(self) -> bool:
        if len(self.losses) < self.window:
            return False
        half = self.window // 2
        losses = list(self.losses)
        first, second = sum(losses[:half]) / half, sum(losses[half:]) / (self.window - half)
        return (first - second) / first < self.threshold

    def clear(self) -> None:
        self.losses.clear()

    def state_dict(self) -> list[float]:
        return list(self.losses)

    def load_state_dict(self, state: list[float]) -> None:
        self.losses = deque(state, maxlen=self.window)
