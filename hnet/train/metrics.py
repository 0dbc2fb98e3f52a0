"""metrics.jsonl: one line a step, appended and flushed, so that a killed run loses at most the line being written.

A guard's event is a line {"step", "event", "message"}. Readers ignore keys they do not know.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnet.metrics_log import read_metrics


class MetricsFile:
    """The file, and TensorBoard or Weights & Biases beside it if asked for."""

    def __init__(self, path: Path, *, tensorboard: bool = False, wandb: str = "", config: dict | None = None) -> None:
        self.path = path
        self.board: Any = None
        self.run: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path.parent / "tensorboard"))
        if wandb:
            import wandb as client

            self.run = client.init(project=wandb, dir=str(path.parent), config=config, resume="allow")
        self.file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
        self.file.flush()
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        if self.board is not None:
            for k, v in numbers.items():
                self.board.add_scalar(k, v, row["step"])
        if self.run is not None:
            self.run.log(numbers, step=row["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.run is not None:
            self.run.finish()


def _plain(v: Any) -> Any:
    if isinstance(v, float):
        return None if not math.isfinite(v) else float(f"{v:.7g}")
    return v


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop what was logged after `last_step`: a resumed run writes it again."""
    if not path.exists():
        return
    kept = [r for r in read_metrics(path) if r.get("step", 0) <= last_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(r) + "\n" for r in kept))
    os.replace(partial, path)


class Reading:
    """Scalars on their way from the device: copied without waiting, read when asked for, usually a step later."""

    def __init__(self, names: list[str], values: Tensor) -> None:
        self.names = names
        self.arrived = None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        else:
            self.values = values

    def read(self) -> dict[str, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))
