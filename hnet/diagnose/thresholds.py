"""What is too much or too little for a model of a given size: one table, each row with its source."""

from __future__ import annotations

import math
from typing import NamedTuple

REPORT = "the report of a 1.6B two-stage run that failed"
RECIPE = "the published recipe (configs/paper_2stage_XL.toml)"
OURS = "our own runs (laptop, small and demo recipes)"


class Row(NamedTuple):
    below: float  # parameters
    value: float
    source: str


TABLE: dict[str, list[Row]] = {
    # least warm-up, as a share of the steps
    "warmup": [
        Row(1e8, 0.01, f"{OURS}: 2 to 5 % does no harm, under 1 % does"),
        Row(1e9, 0.02, "between the rows above and below"),
        Row(math.inf, 0.05, f"{REPORT} had 2 % and asks for 5 %; {RECIPE} has 10 %"),
    ],
    # warm-up that is long enough even where the first steps are unstable
    "warmup_ample": [Row(math.inf, 0.05, f"{REPORT}: 5 %")],
    # warm-up to change to
    "warmup_advice": [Row(math.inf, 0.05, f"{REPORT}: 5,000 of 100,000 steps")],
    # largest over smallest multiplier of the learning rate
    "lr_spread": [
        Row(1e9, 4.0, "the paper's rule, sqrt(bytes per unit x width ratio), gives 2 to 3 outside"),
        Row(math.inf, 2.5, f"{RECIPE} has 2.0/1.5/1.0; {REPORT} had 3.0/1.7/0.9, 3.3 times"),
    ],
    # outermost multiplier to change to, innermost 1
    "lr_spread_advice": [Row(math.inf, 2.0, f"{RECIPE} and {REPORT}: 2.0/1.5/1.0")],
    # share of steps at which clipping acts
    "clipped": [Row(math.inf, 0.5, "over half of the steps clipped: the limit sets the step, not the gradient")],
    # a burst this many times the limit leaves a sliver of the gradient
    "clip_cut": [Row(math.inf, 100.0, f"{REPORT}: 1,810 at a limit of 1.0")],
    # factor on the limit to change to
    "clip_advice": [Row(math.inf, 5.0, f"{REPORT}: 5.0 instead of 1.0, or adaptive")],
    # a gradient norm this many times the median before it and of the run is a burst, and critical
    "burst": [Row(math.inf, 20.0, f"{OURS}: 6 to 8 at most")],
    "burst_critical": [Row(math.inf, 200.0, f"{REPORT}: 1,810, thousands of times its median")],
    # learning rate x weight decay: the share of a matrix that goes in a step
    "decay": [Row(math.inf, 0.005, f"{OURS} and {RECIPE}: 6e-5 to 1e-3")],
    # factor on the learning rate after bursts
    "lr_advice": [Row(math.inf, 2 / 3, f"{REPORT}: 2e-4 instead of 3e-4")],
}


def threshold(name: str, parameters: float = math.nan) -> float:
    """The value of a row for a model of so many parameters; of the first row where they are unknown."""
    return row(name, parameters).value


def row(name: str, parameters: float = math.nan) -> Row:
    rows = TABLE[name]
    return next((r for r in rows if parameters < r.below), rows[-1] if parameters == math.inf else rows[0])
