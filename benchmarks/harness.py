"""Races: contenders timed round-robin in one process, so that a noisy neighbour slows all of them alike.

Memory is kept (`hnet_kernels.keep_memory`), inputs are random, every run starts with a cold cache, figures are medians.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def race(contenders: dict[str, Callable[[int], object]], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each contender, called with the round number (to pick an input set)."""
    for run in contenders.values():
        for i in range(warmup):
            run(i)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    sweep = torch.zeros(1 << 25)  # 128 MB: more than the last-level cache
    for i in range(rounds):
        for name, run in contenders.items():
            sweep.add_(1.0)  # nobody inherits a cache warmed by the contender before
            begin = time.perf_counter()
            run(i)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(s) for name, s in seconds.items()}


def copy_of(T: int, D: int) -> tuple[Callable[[int], object], int]:
    """A contender that copies (T, D) fp32, and the bytes it moves: the bandwidth all others are measured against."""
    source, target = torch.randn(T, D), torch.empty(T, D)
    return lambda i: target.copy_(source), 8 * T * D


def machine() -> dict[str, object]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    from hnet_kernels import _C

    return {
        "cpu": cpu,
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "pytest " + " ".join(sys.argv[1:]),
        "memory": "kept (hnet_kernels.keep_memory)",
    }


def save(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
