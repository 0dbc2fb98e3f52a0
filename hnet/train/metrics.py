"""metrics.jsonl: one line a step, appended at once, so that a killed run loses at most the line being written. What a
full disk does not take is kept and written when there is room again.

A guard's event is a line {"step", "event", "message"}. Readers ignore keys they do not know.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from hnet.disk import full_disk, replacing

from .branches import WANDB_ID

KEPT = 10_000  # lines that wait for room on the disk; then the oldest go


class MetricsFile:
    """The file, and TensorBoard or Weights & Biases beside it if asked for."""

    def __init__(
        self, path: Path, *, done: int = 0, tensorboard: bool = False, wandb: str = "", config: dict | None = None
    ) -> None:
        """done: steps before this start; what TensorBoard has of later ones is taken back."""
        self.path = path
        self.waiting: deque[bytes] = deque(maxlen=KEPT)
        self.board: Any = None
        self.run: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=done + 1 if done else None)
        if wandb:
            import wandb as client

            name = wandb_id(path.parent)
            self.run = client.init(project=wandb, id=name, dir=str(path.parent), config=config, resume="allow")
        self.file = path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> bool:
        """False if the disk is full; the row waits for room."""
        self.waiting.append((json.dumps({k: _plain(v) for k, v in row.items()}) + "\n").encode())
        self._append_waiting()
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        if self.board is not None:
            try:
                for k, v in numbers.items():
                    self.board.add_scalar(k, v, row["step"])
            except OSError as e:
                if not full_disk(e):
                    raise
                self.board = None  # its thread has ended
        if self.run is not None:
            self.run.log(numbers, step=row["step"])
        return not self.waiting

    def _append_waiting(self) -> None:
        while self.waiting:
            end, rest = self.file.seek(0, os.SEEK_END), memoryview(self.waiting[0])
            try:
                while rest:
                    rest = rest[self.file.write(rest) :]
            except OSError as e:
                if not full_disk(e):
                    raise
                self.file.truncate(end)  # no half lines
                return
            self.waiting.popleft()

    def close(self) -> None:
        self._append_waiting()
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.run is not None:
            self.run.finish()


def _plain(v: Any) -> Any:
    if isinstance(v, float):
        return None if not math.isfinite(v) else float(f"{v:.7g}")
    return v


def wandb_id(out: Path) -> str:
    """Of the run in this directory, in all its starts; made at the first."""
    path = out / WANDB_ID
    if not path.exists():
        with replacing(path) as partial:
            partial.write_text(uuid4().hex[:12] + "\n")
    return path.read_text().strip()


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
