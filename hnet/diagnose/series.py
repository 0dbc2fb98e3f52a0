"""Small robust statistics of a logged series."""

from __future__ import annotations

import numpy as np


def noise(values: np.ndarray) -> float:
    """Standard deviation of the step-to-step noise, blind to any smooth trend and to rare outliers: the median absolute
    deviation of second differences, whose variance is 6 times the noise's. 0 for fewer than 5 values."""
    if len(values) < 5:
        return 0.0
    second = np.diff(values, 2)
    return float(1.4826 * np.median(np.abs(second - np.median(second))) / np.sqrt(6))


def trailing_median(values: np.ndarray, window: int) -> np.ndarray:
    """(n,) median of the up to `window` values before each; the first value stands for itself."""
    out = values.copy()
    for i in range(1, min(window, len(values))):
        out[i] = np.median(values[:i])
    if len(values) > window:
        out[window:] = np.median(np.lib.stride_tricks.sliding_window_view(values[:-1], window), axis=1)
    return out


def tail(values: np.ndarray, share: float = 0.1, least: int = 5) -> np.ndarray:
    """The last `share` of the values, at least `least` of them where there are so many."""
    return values[-max(int(len(values) * share), least) :]


def slope(values: np.ndarray) -> tuple[float, float]:
    """(least-squares change per value, its standard error from `noise`)."""
    n = len(values)
    if n < 3:
        return 0.0, float("inf")
    per = float(np.polyfit(np.arange(n), values, 1)[0])
    return per, float(noise(values) * np.sqrt(12 / n**3))


def episodes(where: np.ndarray, gap: int = 1) -> list[tuple[int, int]]:
    """[first, last] indexes of runs of True; runs at most `gap` apart are one."""
    out: list[tuple[int, int]] = []
    for i in np.flatnonzero(where):
        if out and i - out[-1][1] <= gap:
            out[-1] = (out[-1][0], int(i))
        else:
            out.append((int(i), int(i)))
    return out


def percent(x: float) -> str:
    return f"{100 * x:.0f} %" if abs(x) >= 0.095 else f"{100 * x:.1f} %"
