"""The keys that every run has, whatever it trains: TOML keys, command-line flags and defaults in one place.

An H-Net's run adds those of `hnet.train.config.TrainConfig`, a ChunkLM's those of `hnet.chunk_lm.train_config`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

from hnet.errors import UserError

from . import toml
from .entries import parse_data
from .keys import check, fields, key


@dataclass
class RunConfig:
    # data
    data: list[str | dict] = key(
        [],
        "files or folders (text, .jsonl, .parquet, also .gz or .zst), or one hf: stream; or several of these as a "
        "mixture by weight: path:0.7,other:0.3 (TOML: {path = 'path', weight = 0.7}, ...)",
    )
    pattern: str = key("*", "which files below the folders, as a glob like '*.py'")
    exclude: list[str] = key([], "names of files or folders below the folders to leave out, as globs")
    documents: str = key(
        "file",
        "what a document is in plain text: file, paragraph (up to blank lines) or line",
        choices=("file", "paragraph", "line"),
    )
    text_key: str = key("text", "where JSONL lines, Parquet rows and streams have their text")
    val_data: list[str] = key([], "held-out files, folders or hf: stream; default: files named valid*, val*, dev*")
    val_fraction: float = key(0.05, "share of the bytes held out at random when nothing else says what to hold out")
    seq_len: int = key(1024, "longest sequence in bytes; longer documents are cut", low=2)
    shuffle_bytes: int = key(
        33554432, "streams are shuffled within windows of this size, all shards together, which memory must hold", low=1
    )
    accumulation: int = key(
        1, "micro-batches a process runs for one step; batch_bytes is their sum over all processes", low=1
    )

    # optimisation
    steps: int = key(1000, "optimiser steps", low=1)
    optimizer: str = key(
        "adamw", "adamw, or muon: Muon for matrices of the blocks and AdamW for the rest", choices=("adamw", "muon")
    )
    learning_rate: float = key(1e-3, "peak learning rate")
    betas: list[float] = key([0.9, 0.95], "AdamW moments")
    weight_decay: float = key(0.1, "decoupled weight decay of matrices; never of norms and biases", low=0)
    decay_embeddings: bool = key(False, "let the embeddings decay too")
    schedule: str = key(
        "wsd",
        "wsd (warm up, stay, decay), cosine, constant, plateau (drop when the validation loss stops falling), restarts "
        "(a cosine for each stage of restart_at)",
        choices=("wsd", "cosine", "constant", "plateau", "restarts"),
    )
    warmup_steps: int = key(100, "linear warm-up", low=0)
    warmup_fraction: float = key(0.0, "warm-up as a share of the steps, instead of warmup_steps", low=0, high=1)
    decay_fraction: float = key(0.3, "wsd: share of the steps spent decaying at the end", low=0, high=1)
    decay_shape: str = key(
        "linear",
        "wsd: linear, inverse-sqrt (1 - sqrt of progress), cosine",
        choices=("linear", "inverse-sqrt", "cosine"),
    )
    min_lr: float = key(0.0, "where the learning rate ends, as a fraction of the peak", low=0, high=1)
    restart_at: list[float] = key([0.0], "restarts: where stages begin, as shares of the run")
    restart_min: list[float] = key([0.1], "restarts: where each stage's cosine ends, as a share of learning_rate")
    restart_peak: list[float] = key([], "restarts: where each stage's cosine begins; default 1 for all")
    restart_on_plateau: bool = key(False, "restarts: a plateau also returns the rate to its peak")
    plateau_patience: int = key(
        3,
        "a plateau: more evaluations in a row than this, after the warm-up, without a better validation cross entropy "
        "(schedule plateau, restart_on_plateau, compression_anneal plateau)",
        low=0,
    )
    plateau_cooldown: int = key(1, "evaluations after a plateau that do not count towards the next", low=0)
    plateau_min_gain: float = key(
        0.001, "a plateau: better is below the best validation cross entropy by at least this share", low=0, high=0.99
    )
    plateau_factor: float = key(
        0.5, "plateau schedule: the drop; min_lr, or 0.001 of the peak, is the lowest rate", low=0, high=0.99
    )
    clipping: str = key(
        "norm",
        "norm: to max_grad_norm; adaptive: every stage to a percentile of its recent norms; off",
        choices=("norm", "adaptive", "off"),
    )
    max_grad_norm: float = key(1.0, "clip the gradient to this norm; 0: never", low=0)
    clip_percentile: float = key(90.0, "adaptive clipping: the percentile", low=0, high=100)
    clip_window: int = key(100, "adaptive clipping: how many recent norms", low=1)
    dropout: float = key(0.0, "share of every mixer's and MLP's output dropped in training", low=0, high=0.99999)
    label_smoothing: float = key(
        0.0, "of the cross entropy that is minimised; what is reported has none", low=0, high=0.99999
    )
    weight_ema: float = key(
        0.0,
        "decay of an exponential average of the weights, evaluated and saved beside them; 0: none",
        low=0,
        high=0.99999,
    )

    # stopping and guards
    patience: int = key(
        0,
        "stop after so many evaluations without a better validation cross entropy; 0: never. With schedule plateau "
        "they are counted once the rate is at its lowest",
        low=0,
    )
    min_delta: float = key(0.0, "what counts as better, nats", low=0)
    stop_smoothing: float = key(
        0.0, "exponential smoothing of the validation cross entropy before it is judged", low=0, high=0.99999
    )
    max_bad_steps: int = key(10, "give up after so many steps in a row with a non-finite loss or gradient", low=1)
    spike_factor: float = key(
        6.0, "a loss this many deviations above its recent median, three steps long, is a spike; 0: off", low=0
    )
    spike_rollback: bool = key(True, "return to the last checkpoint before it at a spike")
    spike_lr_cut: float = key(1.0, "multiply the learning rate by this at a rollback", low=0, high=1)

    # run
    out: str = key("runs/hnet", "run directory")
    seed: int = key(0, "seed of weights, data order and the held-out split")
    device: str = key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    dtype: str = key(
        "auto", "auto, fp32 or bf16 (autocast; master weights stay fp32)", choices=("auto", "fp32", "bf16")
    )
    tf32: bool = key(
        True,
        "on a GPU multiply fp32 matrices in TF32 (torch.set_float32_matmul_precision, for the whole process); never on "
        "a CPU",
    )
    deterministic: bool = key(
        False, "only deterministic algorithms, for bit-exact resume on a GPU (a CPU is always exact)"
    )
    parallel: str = key(
        "ddp",
        "several processes (torchrun): ddp, or fsdp (weights, gradients and optimiser sharded)",
        choices=("ddp", "fsdp"),
    )
    profile: int = key(0, "write a torch profiler trace of this many steps, from step 10 on", low=0)
    log_every: int = key(1, "steps between lines of metrics.jsonl", low=1)
    eval_every: int = key(250, "steps between held-out evaluations (also one at the end)", low=1)
    eval_bytes: int = key(65536, "held-out bytes of an evaluation", low=1)
    checkpoint_every: int = key(250, "steps between checkpoints (also one at the end, and on Ctrl-C)", low=1)
    keep_checkpoints: int = key(
        2, "how many of the latest checkpoints stay; the best by validation stays besides", low=1
    )
    async_checkpoints: bool = key(False, "write checkpoints in the background")
    sample_bytes: int = key(128, "bytes generated at every evaluation into samples/, with their chunks; 0: none", low=0)
    sample_prompt: str = key("", "what the samples continue; default: the start of a held-out document")
    plots: bool = key(True, "draw the run as PNG files at its end")
    tensorboard: bool = key(False, "log to TensorBoard in the run directory too (pip install tensorboard)")
    wandb: str = key("", "log to this Weights & Biases project too (pip install wandb)")

    @property
    def warmup(self) -> int:
        """Steps."""
        return round(self.warmup_fraction * self.steps) if self.warmup_fraction else self.warmup_steps

    def need(self, ok: bool, name: str, what: str) -> None:
        if not ok:
            raise UserError(f"{name} must be {what}, got {getattr(self, name)!r}")

    def validate(self) -> RunConfig:
        """Returns self.

        Raises:
            ValueError: a value out of range, naming the key, what it is and what it may be.
        """
        for f in fields(type(self)):
            check(f, getattr(self, f.name))
        self.need(len(self.data) > 0, "data", "at least one file or folder")
        parse_data(self.data)
        self.need(bool(self.val_data) or 0 < self.val_fraction < 1, "val_fraction", "in (0, 1)")
        self.need(self.learning_rate > 0, "learning_rate", "positive")
        self.need(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two numbers in [0, 1)")
        check_restarts(self.restart_at, self.restart_min, self.restart_peak)
        for name in ("tensorboard", "wandb"):
            if getattr(self, name) and importlib.util.find_spec(name) is None:
                raise UserError(f"{name} needs its package: pip install {name}")
        restarts = self.schedule == "restarts"
        self.need(restarts or not self.restart_on_plateau, "restart_on_plateau", "off unless schedule is restarts")
        return self

    def derive(self, **values: Any) -> None:
        """Fill in keys that follow from others. config.toml keeps what was given, so that they follow again when a
        resumed run changes the others."""
        given = self.__dict__.setdefault("given", {})
        for name, value in values.items():
            given.setdefault(name, getattr(self, name))
            setattr(self, name, value)

    def to_toml(self) -> str:
        """What config.toml holds: every key as it was given or its default."""
        return toml.dumps(dataclasses.asdict(self) | self.__dict__.get("given", {}))


def check_restarts(at: list[float], low: list[float], peak: list[float] | None = None) -> None:
    """Raises ValueError unless stages begin at 0, rise below 1, and each has an end value >= 0 below its peak."""
    if not at or at[0] != 0 or any(b <= a for a, b in zip(at, at[1:], strict=False)) or at[-1] >= 1:
        raise UserError(f"restart_at must begin with 0 and rise, below 1, got {at}")
    peak = peak or []
    if len(peak) not in (0, len(at)) or not all(p > 0 for p in peak):
        raise UserError(
            f"restart_peak must be empty or have a value above 0 for each of the {len(at)} stages, got {peak}"
        )
    tops = peak or [1.0] * len(at)
    if len(low) != len(at) or not all(0 <= v <= p for v, p in zip(low, tops, strict=True)):
        wanted = "in [0, 1]" if not peak else f"from 0 to its restart_peak {peak}"
        raise UserError(f"restart_min must have a value {wanted} for each of the {len(at)} stages, got {low}")
