"""Checkpoints: a folder each, complete or not there at all.

    checkpoints/step_00000250/  config.json  model.safetensors  trainer.pt

The first two are a model directory for `HNetForCausalLM.from_pretrained`; trainer.pt holds everything else a run needs
to go on exactly where it was. A checkpoint is written beside its place, flushed to disk, then renamed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.checkpoint_format import WEIGHTS, load_state, read_weights, save_pretrained

TRAINER = "trainer.pt"


def save_checkpoint(root: Path, step: int, model: HNetForCausalLM, trainer: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `step` and remove all but the latest `keep`."""
    final = root / f"step_{step:08d}"
    partial = root / f".partial_{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    save_pretrained(model, partial)
    torch.save(trainer, partial / TRAINER)
    for path in partial.iterdir():
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    _flush(root)
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in root.glob("step_*") if (p / TRAINER).is_file())


def latest_checkpoint(root: Path) -> Path:
    found = list_checkpoints(root)
    if not found:
        raise FileNotFoundError(f"nothing to resume: no checkpoint in {root}")
    return found[-1]


def load_checkpoint(path: Path, model: HNetForCausalLM) -> dict[str, Any]:
    """Weights into the model; returns the trainer state."""
    load_state(model, read_weights(path / WEIGHTS), str(path / WEIGHTS))
    try:
        return torch.load(path / TRAINER, map_location="cpu", weights_only=True)
    except Exception as e:  # the zip reader and the unpickler raise many kinds
        raise ValueError(f"{path / TRAINER} is damaged: {str(e).splitlines()[0]}") from None


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
