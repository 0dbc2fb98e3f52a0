"""Learning rate over the steps."""

from __future__ import annotations

import math


def lr_factor(step: int, steps: int, schedule: str, warmup_steps: int, decay_fraction: float, min_lr: float) -> float:
    """Fraction of the peak learning rate at `step` (0-based) of `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    after = max(steps - warmup_steps, 1)
    progress = min((step - warmup_steps) / after, 1.0)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    left = steps - step
    decay = max(decay_fraction * steps, 1e-9)
    return min_lr + (1 - min_lr) * min(1.0, left / decay)
