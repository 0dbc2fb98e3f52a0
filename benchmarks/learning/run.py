"""Runs: a model learns for so many seconds, or so many FLOPs, and is scored on what was held out."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hnet_kernels as hk
from hnet.config.keys import tomllib

from ..harness import machine
from . import isotropic, nanogpt, ours
from .validation import nats_per_byte

LEARNERS: dict[str, Any] = {
    "hnet": ours.Learner,
    "isotropic": isotropic.Learner,
    "isotropic+ngrams": lambda train, seed: isotropic.Learner(train, seed, ours.recipe()),
    "nanogpt": nanogpt.Learner,
}
UNITS = ("seconds", "teraflops")
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests")


class Run(NamedTuple):
    """model: one of LEARNERS; the H-Net also with keys of its recipe to be others, as TOML: 'hnet compression=[6.0]'"""

    model: str
    corpus: str  # the path of a file, or "python"
    amount: float  # of training
    unit: str
    seed: int
    eval_bytes: int  # held out and scored; 0: all that is held out

    @property
    def key(self) -> list:
        return [self.model, name_of(self.corpus), self.amount, self.unit, self.seed]


def name_of(corpus: str) -> str:
    return corpus if corpus == "python" else Path(corpus).stem


def read(corpus: str) -> tuple[Tensor, Tensor]:
    """The first nine tenths and the last tenth of a file's bytes, int64; "python": of Python's standard library, files
    in an order that a hash of their names gives.

    Raises:
        ValueError: fewer than 10,000 bytes.
    """
    if corpus == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in root.rglob("*.py") if not set(p.relative_to(root).parts) & set(LEFT_OUT)]
        names = {hashlib.sha256(str(p.relative_to(root)).encode()).digest(): p for p in files}
        data = b"\n".join(names[digest].read_bytes() for digest in sorted(names))
    else:
        data = Path(corpus).read_bytes()
    if len(data) < 10_000:
        raise ValueError(f"{corpus} has {len(data)} bytes, at least 10,000 are needed")
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def learner(model: str, train: Tensor, seed: int) -> Any:
    name, *keys = model.split()
    return LEARNERS[name](train, seed, **tomllib.loads("\n".join(keys)))


def measure(run: Run, evaluations: int = 4) -> dict[str, Any]:
    """The row of a run. Only steps count, data and optimiser included; evaluations (so many, evenly spread) and what
    the first steps of a process set up (they are made by a model that is thrown away) do not."""
    hk.keep_memory()
    train, held_out = read(run.corpus)
    held_out = held_out[: run.eval_bytes or None]
    spare = learner(run.model, train, run.seed)
    for _ in range(2):
        spare.step(0.0)
    del spare
    model = learner(run.model, train, run.seed)
    seconds = teraflops = done = 0.0
    curve: list[tuple[float, float, float]] = []
    while done < 1:
        begin = time.perf_counter()
        model.step(done)
        seconds += time.perf_counter() - begin
        teraflops += model.flops_per_byte * model.bytes_per_step / 1e12
        done = (seconds if run.unit == "seconds" else teraflops) / run.amount
        if done >= (len(curve) + 1) / evaluations:
            curve.append((seconds, teraflops, nats_per_byte(model.log_probs, held_out, model.context)))
    return {
        "model": run.model, "corpus": name_of(run.corpus), "amount": run.amount, "unit": run.unit, "seed": run.seed,
        "val": curve[-1][2], "seconds": seconds, "teraflops": teraflops, "steps": model.steps,
        "bytes": model.steps * model.bytes_per_step, "context": model.context, "parameters": model.parameters,
        "train_bytes": len(train), "held_out_bytes": len(held_out),
        "bytes_per_chunk": getattr(model, "bytes_per_chunk", None), "curve": curve,
    }  # fmt: skip


def measure_all(runs: list[Run], path: Path) -> list[dict[str, Any]]:
    """Each in a process of its own, one after the other; rows are written as they come."""
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for row in pool.imap(measure, runs):
            rows.append(row)
            add(path, row)
            print(
                f"{row['corpus']}, {row['amount']:g} {row['unit']}, seed {row['seed']}, {row['model']}: "
                f"{row['val']:.4f} nats a byte, {row['steps']} steps in {row['seconds']:.1f} s; "
                f"{left(runs, rows, time.perf_counter() - begin)}",
                flush=True,
            )
    return rows


def left(runs: list[Run], rows: list[dict[str, Any]], elapsed: float) -> str:
    """What is to come, if runs take as long besides their steps as those that are done"""
    besides = (elapsed - sum(row["seconds"] for row in rows)) / len(rows)
    rest = runs[len(rows) :]
    text = f"{len(rows)} of {len(runs)}"
    if any(run.unit != "seconds" for run in rest):
        return text
    return f"{text}, about {sum(run.amount + besides for run in rest) / 60:.0f} minutes left"


def add(path: Path, row: dict[str, Any]) -> None:
    """Beside what the file has of other runs, if the same processor, threads and torch made them."""
    given = [Path(word).name for word in sys.argv[1:]]  # where a file lies is nobody's business
    here, rows = machine() | {"command": " ".join(["python -m benchmarks.learning", *given])}, []
    if path.exists():
        before = json.loads(path.read_text())
        if all(before["machine"][name] == here[name] for name in ("cpu", "threads", "torch")):
            rows = [r for r in before["rows"] if _key(r) != _key(row)]
            commands = [*before["machine"]["command"].split("; "), here["command"]]
            here["command"] = "; ".join(dict.fromkeys(commands))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": here, "rows": [*rows, row]}, indent=1) + "\n")


def _key(row: dict[str, Any]) -> list:
    return [row[name] for name in ("model", "corpus", "amount", "unit", "seed")]
