"""Keys of a ChunkLM's run, beside those of any run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hnet.config.keys import check, fields, key
from hnet.config.run import RunConfig
from hnet.errors import UserError

from .config import ChunkLMConfig
from .curriculum import Curriculum


@dataclass
class ChunkLMTrainConfig(RunConfig):
    """A run of `epochs` x `steps_per_epoch` steps of the optimiser, each `accumulation` x `batch_size` windows."""

    out: str = key("runs/chunk_lm", "run directory; default with ckpt: its name without the ending")
    ckpt: str = key("", "also keep the latest weights in this one file, for people who pass files around")
    seq_len: int = key(1024, "bytes of a window", low=2)
    kernel_len: int = key(128, "taps of every block's kernel", low=1)
    chunk: int = key(16, "bytes predicted at once", low=1)
    width: int = key(512, "channels", low=1)
    n_layers: int = key(6, "blocks", low=1)
    causal: bool = key(False, "a next-byte head at every position instead of the chunk head")
    spectral_state: bool = key(False, "add the leaky rotating state over chunks (chunk head)")
    batch_size: int = key(4, "windows of a micro-batch", low=1)
    accumulation: int = key(8, "micro-batches of an optimiser step", low=1)
    epochs: int = key(50, "an epoch is steps_per_epoch optimiser steps, counted from 0", low=1)
    steps_per_epoch: int = key(1000, "optimiser steps of an epoch", low=1)
    steps: int = key(0, "optimiser steps; 0: epochs x steps_per_epoch", low=0)
    learning_rate: float = key(2e-4, "peak learning rate")
    weight_decay: float = key(0.01, "decoupled weight decay of matrices", low=0)
    dropout: float = key(0.1, "dropout", low=0, high=0.99999)
    schedule: str = key(
        "restarts",
        "restarts: a cosine for each of three stages, back to its peak at every raise of the cutoff; or wsd, cosine, "
        "constant, plateau",
        choices=("restarts", "wsd", "cosine", "constant", "plateau"),
    )
    stage1_epochs: int = key(2, "restarts: epochs of the first stage", low=1)
    stage2_epochs: int = key(3, "restarts: epochs of the second stage; the third lasts to the end", low=1)
    stage1_lr_mult: float = key(1.0, "restarts: peak of the first stage, as a share of learning_rate", low=0)
    stage2_lr_mult: float = key(1.0, "restarts: peak of the second stage", low=0)
    stage3_lr_mult: float = key(1.0, "restarts: peak of the third stage", low=0)
    stage1_min_mult: float = key(0.1, "restarts: where the first stage ends, as a share of learning_rate", low=0)
    stage2_min_mult: float = key(0.1, "restarts: where the second stage ends", low=0)
    stage3_min_mult: float = key(0.05, "restarts: where the third stage ends", low=0)
    warmup_steps: int = key(0, "linear warm-up", low=0)
    curriculum: str = key(
        "plateau",
        "what raises the cutoff: plateau of the loss, epochs (at raise_epochs), none (full bandwidth from the start)",
        choices=("plateau", "epochs", "none"),
    )
    cutoffs: list[int] = key([128, 256, 512, 0], "frequency bins passed, rising; 0 at the end: all")
    raise_epochs: list[int] = key([2, 5, 10], "curriculum epochs: when each raise comes")
    plateau_check: str = key(
        "epoch",
        "curriculum plateau: ask at the start of every epoch, so that a raise and the schedule's restart coincide, or "
        "after every step",
        choices=("epoch", "step"),
    )
    plateau_window: int = key(
        0, "curriculum plateau: losses of steps it is judged on, all since the last raise; 0: an epoch's", low=0
    )
    plateau_threshold: float = key(
        0.005,
        "curriculum plateau: the mean of the window's second half is less than this share below that of its first half",
        low=0,
        high=1,
    )
    min_epoch_before_raise: int = key(2, "curriculum plateau: no raise before this epoch", low=0)
    log_every: int = key(10, "steps between printed lines", low=1)
    eval_every: int = key(0, "steps between held-out evaluations; 0: every epoch", low=0)
    checkpoint_every: int = key(0, "steps between checkpoints; 0: every epoch", low=0)

    def __post_init__(self) -> None:
        if self.ckpt and self.out == "runs/chunk_lm":
            self.out = str(Path(self.ckpt).with_suffix(""))

    def model(self) -> ChunkLMConfig:
        return ChunkLMConfig(
            d_model=self.width, n_layers=self.n_layers, seq_len=self.seq_len, kernel_len=self.kernel_len,
            chunk=self.chunk, dropout=self.dropout, causal=self.causal, spectral_state=self.spectral_state,
        )  # fmt: skip

    def peak(self, step: int) -> float:
        """Learning rate that a restart at 0-based `step` returns to."""
        stage = sum(round(at * self.steps) <= step for at in self.restart_at) - 1
        return self.learning_rate * (self.restart_peak[stage] if self.restart_peak else 1.0)

    def make_curriculum(self) -> Curriculum:
        bins = self.model().bins
        return Curriculum(
            self.curriculum, self.cutoffs, bins, steps_per_epoch=self.steps_per_epoch,
            min_epoch=self.min_epoch_before_raise, window=self.plateau_window or max(self.steps_per_epoch, 2),
            threshold=self.plateau_threshold, raise_epochs=self.raise_epochs, check=self.plateau_check,
        )  # fmt: skip

    def validate(self) -> ChunkLMTrainConfig:
        """Returns self with `steps`, `eval_every`, `checkpoint_every` and the restarts filled in.

        Raises:
            ValueError: a value out of range, naming the key.
        """
        if self.ckpt and Path(self.ckpt) == Path(self.out):
            raise UserError(f"ckpt must be a file beside the run directory, like {self.out}.pt, got {self.ckpt!r}")
        if self.ckpt and Path(self.ckpt).is_dir():
            raise UserError(f"ckpt must be a file, got the folder {self.ckpt!r}")
        for f in fields(type(self)):
            check(f, getattr(self, f.name))
        self.derive(
            steps=self.steps or self.epochs * self.steps_per_epoch,
            eval_every=self.eval_every or self.steps_per_epoch,
            checkpoint_every=self.checkpoint_every or self.steps_per_epoch,
        )
        if self.schedule == "restarts" and self.restart_at == [0.0]:
            begins = [0, self.stage1_epochs, self.stage1_epochs + self.stage2_epochs]
            at = [e * self.steps_per_epoch / self.steps for e in begins]
            count = sum(a < 1 for a in at)
            peaks = [self.stage1_lr_mult, self.stage2_lr_mult, self.stage3_lr_mult]
            lows = [self.stage1_min_mult, self.stage2_min_mult, self.stage3_min_mult]
            for i, (peak, low) in enumerate(zip(peaks, lows, strict=True), 1):
                if not low <= peak or peak == 0:
                    raise UserError(f"stage{i}_min_mult must be at most stage{i}_lr_mult ({peak}), above 0; got {low}")
            self.derive(restart_at=at[:count], restart_min=lows[:count], restart_peak=peaks[:count])
        super().validate()
        self.need(self.plateau_window != 1, "plateau_window", "0 (an epoch) or at least 2")
        self.model()
        self.make_curriculum()
        return self
