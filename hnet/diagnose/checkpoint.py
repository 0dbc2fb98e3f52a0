"""The model and the text of a run, for what a log cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from hnet.config.keys import read_toml
from hnet.data.corpus import Corpus, Source
from hnet.data.mixture import Mixture
from hnet.data.sources import open_data
from hnet.errors import MissingPath, UserError, user_path
from hnet.model.causal_lm import HNetForCausalLM
from hnet.train.checkpoint import latest_checkpoint
from hnet.train.config import TrainConfig

MOST = 1 << 22  # bytes of the training text that copies are looked for in


class Material(NamedTuple):
    model: HNetForCausalLM
    held_out: bytes
    source: bytes  # training text, b"" where it does not lie in memory
    step: int = 0
    config: TrainConfig | None = None
    train: Source | Mixture | None = None  # None where the run's data cannot be read
    val: Corpus | None = None


def open_material(run: Path, text: Path | None = None) -> Material:
    """The latest checkpoint of a run directory of an H-Net, on the CPU, with held-out text: `text`, or the run's.

    Raises:
        MissingPath: no checkpoint, or the data are not where the config says.
        UserError: it is no run directory of an H-Net.
    """
    if not (run / "checkpoints").is_dir():
        raise MissingPath(f"{run} holds no checkpoints")
    path = latest_checkpoint(run / "checkpoints")
    if not (run / "config.toml").is_file():
        raise MissingPath(f"{run} holds no config.toml")
    config = TrainConfig(**read_toml(run / "config.toml", TrainConfig))
    source = held_out = b""
    train = val = None
    if text is not None:
        with user_path(text):
            held_out = text.read_bytes()
    try:
        train, val = open_data(config, lambda line: None)
    except (UserError, OSError):
        if text is None:
            raise
    else:
        source = _bytes(train) if isinstance(train, Corpus) else b""
        held_out = held_out or _bytes(val)
    model = HNetForCausalLM.from_pretrained(path, device=torch.device("cpu")).eval()
    return Material(model, held_out, source, step_of(path), config, train, val)


def weights_bytes(run: Path) -> int:
    """Bytes of the latest checkpoint's weights; 0 where there is none."""
    if not (run / "checkpoints").is_dir():
        return 0
    try:
        return sum(p.stat().st_size for p in latest_checkpoint(run / "checkpoints").glob("*.safetensors"))
    except MissingPath:
        return 0


def step_of(checkpoint: Path) -> int:
    """checkpoints/step_00000120 -> 120"""
    digits = checkpoint.name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else 0


def _bytes(corpus: Corpus) -> bytes:
    out, size = [], 0
    for i in range(len(corpus)):
        out.append(corpus.document(i).tobytes())
        size += len(out[-1])
        if size > MOST:
            break
    return b"\n".join(out)[:MOST]
