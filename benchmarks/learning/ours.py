"""Our H-Net as `hnet train configs/laptop.toml` trains it, but for what suits two minutes and a small text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnet.config import BOS
from hnet.config.keys import override, read_toml
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

RECIPE = Path(__file__).parents[2] / "configs" / "laptop.toml"
# The recipe's steps are for minutes on megabytes of code. Here there are seconds and a text that is read several times.
CHANGED: dict[str, Any] = {"batch_bytes": 2048, "seq_len": 256, "ngram_dropout": 0.5, "plots": False, "sample_bytes": 0}


def recipe(**keys: Any) -> TrainConfig:
    """Of the recipe, with these keys others"""
    return TrainConfig(**override(read_toml(RECIPE, TrainConfig), CHANGED | keys))


class Learner:
    def __init__(self, train: Tensor, seed: int, **keys: Any) -> None:
        """train: (bytes,) int64; keys: of the recipe, to be others"""
        self.folder = tempfile.TemporaryDirectory()
        text, some = (Path(self.folder.name) / name for name in ("train.txt", "val.txt"))
        text.write_bytes(bytes(train.to(torch.uint8).numpy()))
        some.write_bytes(text.read_bytes()[:1024])  # a trainer wants one; nothing here looks at it
        here = {"data": [str(text)], "val_data": [str(some)], "out": str(text.with_name("run")), "seed": seed}
        config = recipe(**here | keys)
        self.trainer = Trainer(config)
        self.context = self.trainer.config.seq_len - 1  # BOS comes first
        self.bytes_per_step = config.batch_bytes
        self.parameters = sum(p.numel() for p in self.trainer.model.parameters())
        self.flops_per_byte = 0.0  # as realised in the step before: it depends on how many chunks there are
        self.bytes_per_chunk = 1.0

    @property
    def steps(self) -> int:
        return self.trainer.step

    def step(self, progress: float) -> None:
        """One step, at this share of the run: as many steps are planned as would make it so"""
        t = self.trainer
        planned = t.step + 1 if progress >= 1 else max(round(t.step / max(progress, 1e-3)), t.step + 1)
        t.config.steps = t.schedule.steps = planned
        row = t.train_step()
        self.flops_per_byte, self.bytes_per_chunk = row["flops_per_byte"], row["stage0/bytes_per_chunk"]

    def log_probs(self, ids: Tensor) -> Tensor:
        t = self.trainer
        t.model.eval()
        with t.autocast():
            logits = t.model(torch.cat([torch.full_like(ids[:, :1], BOS), ids], 1)).logits
        t.model.train()
        return logits[:, 1:].float().log_softmax(-1)
