"""Every knob of a training run: TOML keys, command-line flags and defaults in one place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from hnet.config import HNetConfig


def key(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    # data
    data: list[str] = key([], "files or folders to train on; every file is one document")
    pattern: str = key("*", "which files below the folders, as a glob like '*.py'")
    exclude: list[str] = key([], "names of files or folders below the folders to leave out, as globs")
    val_data: list[str] = key([], "held-out files or folders; default: a random val_fraction of the documents")
    val_fraction: float = key(0.05, "share of the bytes held out when val_data is not given")
    seq_len: int = key(1024, "longest sequence in bytes; longer documents are cut")
    batch_bytes: int = key(8192, "bytes of every optimiser step, packed without padding")

    # model
    preset: str = key("small", "architecture by name; `hnet info` lists them")
    model_config: str = key("", "architecture from a JSON file of the published format, instead of a preset")
    compression: list[float] = key([4.0], "target positions per chunk of every stage with routing, outermost first")
    ratio_weight: float = key(0.5, "weight alpha of the ratio loss; the paper's 0.03 is too weak for small models")

    # optimisation
    steps: int = key(1000, "optimiser steps")
    optimizer: str = key("adamw", "adamw, or muon: Muon for matrices of the blocks and AdamW for the rest")
    learning_rate: float = key(1e-3, "peak learning rate")
    lr_multipliers: list[float] = key([], "learning-rate factor of every stage, outermost first; default 1 for all")
    betas: list[float] = key([0.9, 0.95], "AdamW moments")
    weight_decay: float = key(0.1, "decoupled weight decay of matrices; never of norms, biases, embeddings")
    schedule: str = key("wsd", "wsd (warm up, stay, decay linearly), cosine, or constant after the warm-up")
    warmup_steps: int = key(100, "linear warm-up")
    decay_fraction: float = key(0.3, "wsd: share of the steps spent decaying at the end")
    min_lr: float = key(0.0, "where the learning rate ends, as a fraction of the peak")
    max_grad_norm: float = key(1.0, "clip the gradient to this norm; 0: never")

    # run
    out: str = key("runs/hnet", "run directory")
    seed: int = key(0, "seed of weights, data order and the held-out split")
    device: str = key("auto", "auto, cpu or cuda")
    dtype: str = key("auto", "auto, fp32 or bf16 (autocast; master weights stay fp32)")
    log_every: int = key(1, "steps between lines of metrics.jsonl")
    eval_every: int = key(250, "steps between held-out evaluations (also one at the end)")
    eval_bytes: int = key(65536, "held-out bytes of an evaluation")
    checkpoint_every: int = key(250, "steps between checkpoints (also one at the end, and on Ctrl-C)")
    keep_checkpoints: int = key(2, "how many of the latest checkpoints stay")

    def model(self) -> HNetConfig:
        return HNetConfig.from_json(self.model_config) if self.model_config else HNetConfig.preset(self.preset)

    def validate(self) -> TrainConfig:
        """Returns self.

        Raises:
            ValueError: a value out of range, naming the key, what it is and what it may be.
            FileNotFoundError: model_config does not exist.
        """

        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

        routed = self.model().num_stages - 1
        need(len(self.data) > 0, "data", "at least one file or folder")
        for name in ("seq_len", "batch_bytes", "steps", "log_every", "eval_every", "eval_bytes", "checkpoint_every"):
            need(getattr(self, name) >= 1, name, "at least 1")
        need(self.seq_len >= 2, "seq_len", "at least 2")
        need(self.keep_checkpoints >= 1, "keep_checkpoints", "at least 1")
        need(bool(self.val_data) or 0 < self.val_fraction < 1, "val_fraction", "in (0, 1)")
        need(len(self.compression) == routed, "compression", f"one target for each of the {routed} stages with routing")
        need(all(c > 1 for c in self.compression), "compression", "above 1 everywhere")
        need(
            len(self.lr_multipliers) in (0, routed + 1),
            "lr_multipliers",
            f"empty or one for each of {routed + 1} stages",
        )
        need(all(m > 0 for m in self.lr_multipliers), "lr_multipliers", "positive")
        need(self.ratio_weight >= 0, "ratio_weight", ">= 0")
        need(self.learning_rate > 0, "learning_rate", "positive")
        need(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two numbers in [0, 1)")
        need(self.weight_decay >= 0, "weight_decay", ">= 0")
        need(self.warmup_steps >= 0, "warmup_steps", ">= 0")
        need(0 <= self.decay_fraction <= 1, "decay_fraction", "in [0, 1]")
        need(0 <= self.min_lr <= 1, "min_lr", "in [0, 1]")
        need(self.max_grad_norm >= 0, "max_grad_norm", ">= 0")
        for name, choices in {
            "optimizer": ("adamw", "muon"),
            "schedule": ("wsd", "cosine", "constant"),
            "device": ("auto", "cpu", "cuda"),
            "dtype": ("auto", "fp32", "bf16"),
        }.items():
            need(getattr(self, name) in choices, name, "one of " + ", ".join(choices))
        return self

    def to_toml(self) -> str:
        import tomli_w  # only writing needs it

        return tomli_w.dumps(dataclasses.asdict(self))


def fields() -> list[dataclasses.Field]:
    return list(dataclasses.fields(TrainConfig))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The keys of a config file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, an unknown key, or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path} is not TOML: {e}") from None
    return {name: _typed(name, value, str(path)) for name, value in values.items()}


def _typed(name: str, value: Any, where: str) -> Any:
    known = {f.name: f for f in fields()}
    if name not in known:
        raise ValueError(f"{where}: unknown key {name!r}; known are {', '.join(known)}")
    kind = str(known[name].type)
    if kind.startswith("list"):
        element = kind[5:-1]
        value = value if isinstance(value, list) else [value]
        return [_scalar(f"{where}: {name}", v, element) for v in value]
    return _scalar(f"{where}: {name}", value, kind)


def _scalar(where: str, value: Any, kind: str) -> Any:
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value).__name__ != kind:
        raise ValueError(f"{where} must be {kind}, got {value!r}")
    return value
