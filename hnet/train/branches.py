"""Going back: what a run directory holds of later steps than the one a run goes on from is moved aside, never deleted.

    RUN/abandoned/from_step_00000004_1/    config.toml  metrics.jsonl  held_out.jsonl  wandb_id  samples/  checkpoints/

That folder is a run directory itself (`hnet eval`, `generate`, `plot`), less the rows up to the step it parted at,
which stay in RUN. A killed run leaves only rows behind its last checkpoint: they are moved too, and written again.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from hnet.disk import replacing
from hnet.metrics_log import read_metrics

from .checkpoint import BEST, link, list_checkpoints, mark_best, name_of, step_of

METRICS, HELD_OUT, SAMPLES, WANDB_ID = "metrics.jsonl", "held_out.jsonl", "samples", "wandb_id"


class Abandoned(NamedTuple):
    folder: Path
    checkpoints: list[str]
    rows: int

    def __str__(self) -> str:
        what = [*self.checkpoints, *([f"{self.rows} rows of metrics"] if self.rows else [])]
        return f"{', '.join(what) or 'samples'}: moved to {self.folder}"


def set_aside(out: Path, step: int, best_step: int | None = None) -> Abandoned | None:
    """Move all that is later than `step` (-1: everything) out of the way. None if there was nothing.

    best_step: the best at `step`; `best` is linked to it again if it had moved on and that checkpoint is still there. A
    run that goes on from `best` has it as its latest checkpoint too.

    Raises:
        OSError: it could not all be moved; nothing is lost, and doing it again goes on with it.
    """
    root = out / "checkpoints"
    _tidy(root)
    best = root / BEST
    gone = [p for p in list_checkpoints(root) if (step_of(p) or 0) > step]
    if best.is_dir() and ((then := step_of(best)) is None or then > step):
        gone.append(best)
    samples = [p for p in sorted((out / SAMPLES).glob("step_*.txt")) if (step_of(p.with_suffix("")) or 0) > step]
    log = out / METRICS
    rows = read_metrics(log) if log.exists() else []
    later = [r for r in rows if r.get("step", 0) > step]
    kept = read_metrics(out / HELD_OUT) if (out / HELD_OUT).exists() else []
    done = None
    if gone or samples or later:
        folder = _new_folder(out / "abandoned", max(step, 0))
        if (out / "config.toml").exists():
            shutil.copy2(out / "config.toml", folder)
        if gone and (out / WANDB_ID).exists():  # W&B takes no step twice: what comes now is another of its runs
            os.rename(out / WANDB_ID, folder / WANDB_ID)
        _write_rows(folder / METRICS, later)
        if lines := [r for r in kept if r.get("step", 0) > step]:
            _write_rows(folder / HELD_OUT, lines)
        _move(samples, folder / SAMPLES)
        _move(gone, folder / "checkpoints")  # lowest first: if killed in between, the latest is still the same
        done = Abandoned(folder, [p.name for p in gone], len(later))
    if log.exists():
        _write_rows(log, [r for r in rows if r.get("step", 0) <= step])  # also without a last line cut short
    if kept:
        _write_rows(out / HELD_OUT, [r for r in kept if r.get("step", 0) <= step])
    if best.is_dir() and step_of(best) == step and not (root / name_of(step)).exists():
        link(best, root / name_of(step))
    if best_step is not None and not best.exists() and (root / name_of(best_step)).is_dir():
        mark_best(root / name_of(best_step))
    return done


def _new_folder(root: Path, step: int) -> Path:
    n = 1
    while (folder := root / f"from_{name_of(step)}_{n}").exists():
        n += 1
    folder.mkdir(parents=True)
    return folder


def _move(paths: list[Path], folder: Path) -> None:
    if paths:
        folder.mkdir()
    for p in paths:
        os.rename(p, folder / p.name)


def _write_rows(path: Path, rows: list[dict]) -> None:
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(r) + "\n" for r in rows))


def _tidy(root: Path) -> None:
    """What a killed save left: half a checkpoint, or one on its way out (see `checkpoint._replace`)."""
    for p in root.glob(".partial_*"):
        shutil.rmtree(p)
    for p in root.glob(".old_*"):
        if (root / p.name[5:]).exists():
            shutil.rmtree(p)
        else:
            os.rename(p, root / p.name[5:])
