"""The plateau rule that moves the learning rate, the target ratio, and ChunkLM's cutoff."""

from __future__ import annotations

import math
from collections import deque


class Plateau:
    """Fires when the loss has stopped falling: of the last `window` losses, the mean of the second half is less than
    the share `threshold` below the mean of the first. `clear` begins a new history."""

    def __init__(self, window: int = 50, threshold: float = 0.005) -> None:
        if window < 2 or not threshold >= 0:
            raise ValueError(f"window must be at least 2 and threshold >= 0, got {window} and {threshold}")
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
