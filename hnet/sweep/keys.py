"""The keys of a sweep beside its tables: of its TOML file, and flags of `hnet sweep`."""

from __future__ import annotations

from dataclasses import dataclass

from hnet.config.keys import key

SAMPLERS = ("tpe", "random", "grid", "one_at_a_time")
PRUNERS = ("none", "median", "percentile", "successive_halving", "hyperband", "patient", "threshold")


@dataclass
class SweepKeys:
    base: str = key("", "config file of a run that the trials begin from, relative to the sweep's; [run] beats it")
    out: str = key("sweeps/hnet", "folder of the sweep: its database, its trials, its report")
    objective: str = key(
        "val_bpb",
        "formula over the metrics of an evaluation, such as 'val_bpb + 0.5 * abs(val_bytes_per_chunk / target - 1)'",
    )
    direction: str = key("minimize", "minimize or maximize", choices=("minimize", "maximize"))
    at: str = key(
        "last",
        "which evaluation of a trial counts: the last, or the best, the one with the lowest val_ce, which is kept as "
        "checkpoints/best",
        choices=("last", "best"),
    )
    sampler: str = key(
        "tpe",
        "tpe (learns where to look), random, grid (all combinations), one_at_a_time (the base, then each choice alone)",
        choices=SAMPLERS,
    )
    trials: int = key(0, "how many; 0: all of grid and one_at_a_time, 20 of the others", low=0)
    pruner: str = key("none", "Optuna's pruner that may stop a trial at an evaluation", choices=PRUNERS)
    seed: int = key(0, "of the search; the trials have a seed of their own", low=0)
    workers: int = key(1, "trials at a time, each a process", low=1)
    threads: int = key(0, "threads of each worker; 0: the cores shared out", low=0)
