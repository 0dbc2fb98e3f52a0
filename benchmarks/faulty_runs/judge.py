"""Making a run, and what the diagnosis says of it."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from hnet.chunk_lm.task import ChunkLMTask
from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.config.run import RunConfig
from hnet.diagnose.checkpoint import open_material
from hnet.diagnose.findings import Finding
from hnet.diagnose.runs import read_log
from hnet.diagnose.whole import examine_run
from hnet.errors import RunFailed, UserError
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

from .faults import BASE, Run


def folder(root: Path, run: Run) -> Path:
    return root / run.name.replace(" ", "_").replace(",", "")


def config(run: Run, root: Path, texts: Path, **keys: Any) -> RunConfig:
    text = texts / run.text
    given: dict[str, Any] = BASE | run.keys | {"data": [str(text)], "out": str(folder(root, run))} | keys
    if given.pop("held_out", False):
        given |= {"data": [str(text / "text")], "val_data": [str(text / "held_out")]}
    if not run.chunk_lm:
        return TrainConfig(**given)
    known = {f.name for f in dataclasses.fields(ChunkLMTrainConfig)}
    small = {
        "width": 48,
        "n_layers": 2,
        "seq_len": 128,
        "kernel_len": 32,
        "chunk": 4,
        "batch_size": 8,
        "accumulation": 1,
    }
    return ChunkLMTrainConfig(**{k: v for k, v in given.items() if k in known} | small | {"steps_per_epoch": 60})


def make(run: Run, root: Path, texts: Path, **keys: Any) -> float:
    """Train it, unless it is there; seconds."""
    c = config(run, root, texts, **keys)
    done = Path(c.out) / ".done"
    if done.exists():
        return float(done.read_text())
    begin = time.perf_counter()
    trainer = Trainer(c, make_task=ChunkLMTask if run.chunk_lm else None)
    if run.drive is not None:
        run.drive(trainer)
    try:
        trainer.train()
    except RunFailed as e:  # its log says why
        print(f"{run.name}: {e}")
    if run.after is not None:
        run.after(c)
    seconds = time.perf_counter() - begin
    done.write_text(f"{seconds:.1f}")
    return seconds


def findings(run: Run, root: Path) -> list[Finding]:
    """Of the whole run: log, config, text, and its checkpoint where it has one."""
    path = folder(root, run)
    try:
        material = None if run.chunk_lm else open_material(path)
    except (UserError, OSError):
        material = None
    return [f for f in examine_run(read_log(path), material).findings if f.severity != "ok"]


def judge(run: Run, root: Path) -> dict[str, Any]:
    """A row of the confusion table. found: ids that name the fault, with their severity; others: all other ids."""
    ids: dict[str, str] = {}
    for f in findings(run, root):
        ids.setdefault(f.name, f.severity)  # the worst comes first
    named = {n: s for n, s in ids.items() if n in run.found_by}
    unseen = {"unseen": run.unseen, "at_first": list(run.at_first) if run.unseen == "learnt" else list(named)}
    return {
        "run": run.name, **(unseen if run.unseen else {}),
        "healthy": not run.found_by, "found_by": list(run.found_by), "found": named,
        "others": {n: s for n, s in ids.items() if n not in named},
        "seconds": float((folder(root, run) / ".done").read_text()), "steps": _steps(folder(root, run)),
    }  # fmt: skip


def _steps(path: Path) -> int:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return max((int(json.loads(line).get("step") or 0) for line in lines), default=0)


def make_all(runs: list[Run], root: Path, texts: Path) -> None:
    torch.set_num_threads(1)
    for run in runs:
        print(f"{run.name}: {make(run, root, texts):.0f} s", flush=True)
