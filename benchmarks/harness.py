"""Races: contenders timed round-robin in one process, so that a noisy neighbour slows all of them alike.

Every timed run starts with a cold cache, inputs are random, figures are medians. On a CPU memory is kept
(`hnet_kernels.keep_memory`) and the clock is the host's; on a GPU the clock is CUDA events, which also count the gaps
that a host too slow to launch leaves between kernels.
"""

from __future__ import annotations

import functools
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
MAX_SECONDS = 3.0  # a GPU race gets fewer rounds rather than take longer


class Pass(NamedTuple):
    """One contender of `race_passes`. Both take the round number, to pick an input set."""

    forward: Callable[[int], Any]
    backward: Callable[[int, Any], Any]  # also takes what forward returned


class Laps(NamedTuple):
    forward: float  # seconds, median
    backward: float
    both: float  # median of the sums
    peak_bytes: int | None  # allocated above what was there before, forward and backward; None on a CPU


def mark(device: str) -> Any:
    """A point in time: the host's clock, or an event in the current stream."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Any, end: Any) -> float:
    """Seconds; of two events, once they have happened."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def cache_sweep(device: str) -> Tensor:
    """Larger than any last-level cache: 128 MB on a CPU, 512 MB on a GPU, which also lets the host run ahead."""
    return torch.zeros(1 << (25 if device == "cpu" else 27), device=device)


def race(
    contenders: dict[str, Callable[[int], object]], rounds: int, device="cpu", warmup: int = 3
) -> dict[str, float]:
    """Median seconds of each contender, called with the round number (to pick an input set)."""
    for run in contenders.values():
        for i in range(warmup):
            run(i)
    marks: dict[str, list[tuple]] = {name: [] for name in contenders}
    sweep = cache_sweep(device)
    for i in range(rounds):
        for name, run in contenders.items():
            sweep.add_(1.0)  # nobody inherits a cache warmed by the contender before
            begin = mark(device)
            run(i)
            marks[name].append((begin, mark(device)))
    synchronize(device)
    return {name: statistics.median(between(*pair) for pair in pairs) for name, pairs in marks.items()}


def race_passes(contenders: dict[str, Pass], rounds: int, device: str, warmup: int = 3) -> dict[str, Laps]:
    """Forward and backward of each contender, each from a cold cache."""
    peaks, seconds = {}, 0.0
    for name, run in contenders.items():
        for i in range(warmup):
            run.backward(i, run.forward(i))
        peaks[name] = peak_bytes(run, device)
        synchronize(device)
        begin = time.perf_counter()
        run.backward(0, run.forward(0))
        synchronize(device)
        seconds += time.perf_counter() - begin
    if device == "cuda":
        rounds = max(3, min(rounds, int(MAX_SECONDS / max(seconds, 1e-6))))
    marks: dict[str, list[tuple]] = {name: [] for name in contenders}
    sweep = cache_sweep(device)
    for i in range(rounds):
        for name, run in contenders.items():
            sweep.add_(1.0)
            a = mark(device)
            out = run.forward(i)
            b = mark(device)
            sweep.add_(1.0)
            c = mark(device)
            run.backward(i, out)
            marks[name].append((a, b, c, mark(device)))
            del out
        synchronize(device)  # or the host would queue all rounds, and their outputs with them
    laps = {}
    for name, all_marks in marks.items():
        forward = [between(a, b) for a, b, _, _ in all_marks]
        backward = [between(c, d) for _, _, c, d in all_marks]
        both = [f + b for f, b in zip(forward, backward, strict=True)]
        laps[name] = Laps(*map(statistics.median, (forward, backward, both)), peaks[name])
    return laps


def peak_bytes(run: Pass, device: str) -> int | None:
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run.backward(0, run.forward(0))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_of(T: int, D: int) -> tuple[Callable[[int], object], int]:
    """A contender that copies (T, D) fp32, and the bytes it moves: the bandwidth all others are measured against."""
    source, target = torch.randn(T, D), torch.empty(T, D)
    return lambda i: target.copy_(source), 8 * T * D


def copy_pass(forward_bytes: int, backward_bytes: int, device: str) -> Pass:
    """Copies that move as many bytes as the contenders count: half of them read, half written."""

    def pair(size: int) -> tuple[Tensor, Tensor]:
        elements = max(size // 8, 1)  # fp32, each read and written
        return torch.randn(elements, device=device), torch.empty(elements, device=device)

    (source, target), (dsource, dtarget) = pair(forward_bytes), pair(backward_bytes)
    return Pass(lambda i: target.copy_(source), lambda i, out: dtarget.copy_(dsource))


# --- what ran where ----------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """'NVIDIA H200' -> 'nvidia-h200'"""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def gpu() -> dict[str, object]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver_version(),
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
    }


def machine(device: str = "cpu") -> dict[str, object]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    from hnet_kernels import _C

    return {
        **(gpu() if device == "cuda" else {}),
        "cpu": cpu,
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "pytest " + " ".join(sys.argv[1:]),
        "memory": "kept (hnet_kernels.keep_memory)",
    }


LABELS = ("op", "model", "direction", "T", "D", "L", "B", "N", "chunk", "dtype", "device")


def labels(row: dict) -> tuple:
    """What was measured, without what came out."""
    return tuple(row.get(name) for name in LABELS)


def save(path: Path, rows: list[dict], device: str = "cpu") -> None:
    write(path, machine(device), rows)


def add(path: Path, rows: list[dict], device: str = "cpu") -> None:
    """As `save`, but keeps the rows that the file has of other benchmarks, if the same card and versions made them."""
    here = machine(device)
    if path.exists():
        before = json.loads(path.read_text())
        there = before["machine"]
        if all(there.get(name) == here.get(name) for name in ("gpu", "torch", "triton")):
            measured = {labels(row) for row in rows}
            rows = [row for row in before["rows"] if labels(row) not in measured] + rows
            here["command"] = "; ".join(dict.fromkeys([*there["command"].split("; "), here["command"]]))
    write(path, here, rows)


def write(path: Path, machine: dict, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
