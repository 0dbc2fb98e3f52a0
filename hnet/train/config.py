"""Every knob of a training run: TOML keys, command-line flags and defaults in one place."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from hnet.architecture import from_shorthand, targets
from hnet.config import BOUNDARIES, HNetConfig

from .schedule import check_restarts


def key(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    # data
    data: list[str] = key([], "files or folders (text, .jsonl, .parquet, also .gz or .zst), or one hf: stream")
    pattern: str = key("*", "which files below the folders, as a glob like '*.py'")
    exclude: list[str] = key([], "names of files or folders below the folders to leave out, as globs")
    documents: str = key("file", "what a document is in plain text: file, paragraph (up to blank lines) or line")
    text_key: str = key("text", "where JSONL lines, Parquet rows and streams have their text")
    val_data: list[str] = key([], "held-out files, folders or hf: stream; default: files named valid*, val*, dev*")
    val_fraction: float = key(0.05, "share of the bytes held out at random when nothing else says what to hold out")
    seq_len: int = key(1024, "longest sequence in bytes; longer documents are cut")
    batch_bytes: int = key(8192, "bytes of every optimiser step, packed without padding")
    shuffle_bytes: int = key(33554432, "hf: streams are shuffled within windows of this size, which memory must hold")
    num_workers: int = key(0, "processes that make batches ahead; 0: none, batches are made between steps")
    accumulation: int = key(1, "micro-batches a process runs for one step; batch_bytes is their sum over all processes")

    # model
    preset: str = key("small", "architecture by name; `hnet info` lists them")
    model_config: str = key("", "architecture from a JSON file of the published format, instead of a preset")
    arch: str = key("", "architecture as one layout a stage, outermost first: 'm4 T4', 'm4 T1m4 T26', 'c2/c1T1 T2'")
    d_model: list[int] = key([], "with arch: width of every stage, growing inwards")
    heads: list[int] = key([], "with arch: attention heads of every stage; default: 64 channels each")
    windows: list[int] = key([], "with arch: attention window of every stage; default: 1023, innermost -1 (all)")
    d_intermediate: list[int] = key([], "with arch: SwiGLU width of every stage; default: 8/3 of d_model, up to 128s")
    dropout: float = key(0.0, "share of every mixer's and MLP's output dropped in training")

    # compression
    compression: list[float] = key(
        [4.0],
        "positions per chunk to aim at, every stage with routing, outermost first; or bytes a unit of every "
        "stage, the byte included: 1,3,9 is 3,3",
    )
    ratio_weight: float | str = key(
        "auto",
        "weight alpha of the ratio loss; auto: 1 below 10M parameters, falling to 0.2 at 1B (the paper's 0.03 "
        "undershoots, most of all small models)",
    )
    ratio_warmup: int = key(0, "steps over which alpha grows from 0")
    ratio_reduction: str = key("batch", "F and G over the micro-batch, one loss a sequence, or global: over processes")
    straight_through: bool = key(False, "let F carry G's gradient in the ratio loss")
    compression_start: list[float] = key([], "anneal the target from here to compression; default: no annealing")
    compression_anneal: str = key(
        "steps", "when the target moves: over steps, or one notch at each plateau of the loss"
    )
    compression_anneal_steps: int = key(0, "length of the annealing; 0: half the run")
    compression_notches: int = key(4, "plateau annealing: how many plateaus until the final target")
    rate_control: str = key(
        "none",
        "hold the realised F at the target: bias (a logit bias of every stage, saved with the model), alpha "
        "(steers the ratio loss's weight), none; frozen for the last tenth",
    )
    rate_gain: float = key(0.02, "how far the controller moves a step for an error of 100 %")
    boundaries: str = key(
        "any", "where chunks may begin: any, char-start, char-end (first or last byte of UTF-8 characters)"
    )
    max_chunks: list[float] = key(
        [],
        "most chunks of a stage, as a share of a micro-batch's bytes: static shapes, no host sync, the least "
        "probable boundaries beyond are dropped",
    )

    # optimisation
    steps: int = key(1000, "optimiser steps")
    optimizer: str = key("adamw", "adamw, or muon: Muon for matrices of the blocks and AdamW for the rest")
    learning_rate: float = key(1e-3, "peak learning rate")
    lr_multipliers: list[float] | str = key(
        [],
        "learning-rate factor of every stage, outermost first; auto: sqrt(positions for each innermost one x "
        "width ratio); default 1 for all",
    )
    betas: list[float] = key([0.9, 0.95], "AdamW moments")
    weight_decay: float = key(0.1, "decoupled weight decay of matrices; never of norms and biases")
    decay_embeddings: bool = key(False, "let the embeddings decay too")
    schedule: str = key(
        "wsd",
        "wsd (warm up, stay, decay), cosine, constant, plateau (drop when the loss stops falling), restarts (a "
        "cosine for each stage of restart_at)",
    )
    warmup_steps: int = key(100, "linear warm-up")
    warmup_fraction: float = key(0.0, "warm-up as a share of the steps, instead of warmup_steps")
    decay_fraction: float = key(0.3, "wsd: share of the steps spent decaying at the end")
    decay_shape: str = key("linear", "wsd: linear, inverse-sqrt (1 - sqrt of progress), cosine")
    min_lr: float = key(0.0, "where the learning rate ends, as a fraction of the peak")
    restart_at: list[float] = key([0.0], "restarts: where stages begin, as shares of the run")
    restart_min: list[float] = key([0.1], "restarts: where each stage's cosine ends")
    restart_on_plateau: bool = key(False, "restarts: a plateau also returns the rate to its peak")
    plateau_window: int = key(50, "losses a plateau is judged on")
    plateau_threshold: float = key(
        0.005,
        "a plateau: the mean of the window's second half is less than this share below that of its first half",
    )
    plateau_factor: float = key(0.5, "plateau schedule: the drop")
    clipping: str = key(
        "norm", "norm: to max_grad_norm; adaptive: every stage to a percentile of its recent norms; off"
    )
    max_grad_norm: float = key(1.0, "clip the gradient to this norm; 0: never")
    clip_percentile: float = key(90.0, "adaptive clipping: the percentile")
    clip_window: int = key(100, "adaptive clipping: how many recent norms")
    label_smoothing: float = key(0.0, "of the cross entropy that is minimised; what is reported has none")
    weight_ema: float = key(
        0.0, "decay of an exponential average of the weights, evaluated and saved beside them; 0: none"
    )

    # stopping and guards
    patience: int = key(0, "stop after so many evaluations without a better validation cross entropy; 0: never")
    min_delta: float = key(0.0, "what counts as better, nats")
    stop_smoothing: float = key(0.0, "exponential smoothing of the validation cross entropy before it is judged")
    max_bad_steps: int = key(10, "give up after so many steps in a row with a non-finite loss or gradient")
    spike_factor: float = key(
        6.0, "a loss this many deviations above its recent median, three steps long, is a spike; 0: off"
    )
    spike_rollback: bool = key(True, "return to the last checkpoint's weights at a spike")
    spike_lr_cut: float = key(1.0, "multiply the learning rate by this at a rollback")

    # run
    out: str = key("runs/hnet", "run directory")
    seed: int = key(0, "seed of weights, data order and the held-out split")
    device: str = key("auto", "auto, cpu or cuda")
    dtype: str = key("auto", "auto, fp32 or bf16 (autocast; master weights stay fp32)")
    deterministic: bool = key(
        False, "only deterministic algorithms, for bit-exact resume on a GPU (a CPU is always exact)"
    )
    parallel: str = key("ddp", "several processes (torchrun): ddp, or fsdp (weights, gradients and optimiser sharded)")
    compile: bool = key(False, "torch.compile the blocks, shapes dynamic")
    recompute: bool = key(False, "activation checkpointing: compute blocks again in the backward")
    profile: int = key(0, "write a torch profiler trace of this many steps, from step 10 on")
    log_every: int = key(1, "steps between lines of metrics.jsonl")
    eval_every: int = key(250, "steps between held-out evaluations (also one at the end)")
    eval_bytes: int = key(65536, "held-out bytes of an evaluation")
    checkpoint_every: int = key(250, "steps between checkpoints (also one at the end, and on Ctrl-C)")
    keep_checkpoints: int = key(2, "how many of the latest checkpoints stay; the best by validation stays besides")
    async_checkpoints: bool = key(False, "write checkpoints in the background")
    sample_bytes: int = key(128, "bytes generated at every evaluation into samples/, with their chunks; 0: none")
    sample_prompt: str = key("", "what the samples continue; default: the start of a held-out document")
    plots: bool = key(True, "draw the run as PNG files at its end")
    tensorboard: bool = key(False, "log to TensorBoard in the run directory too (pip install tensorboard)")
    wandb: str = key("", "log to this Weights & Biases project too (pip install wandb)")

    def model(self) -> HNetConfig:
        if self.arch:
            config = from_shorthand(
                self.arch, self.d_model, heads=self.heads, windows=self.windows, d_intermediate=self.d_intermediate
            )
        elif self.model_config:
            config = HNetConfig.from_json(self.model_config)
        else:
            config = HNetConfig.preset(self.preset)
        if self.boundaries != "any":
            config.routing_cfg.boundaries = self.boundaries
        return config

    @property
    def warmup(self) -> int:
        """Steps."""
        return round(self.warmup_fraction * self.steps) if self.warmup_fraction else self.warmup_steps

    def validate(self) -> TrainConfig:
        """Returns self, with compression as one target a stage.

        Raises:
            ValueError: a value out of range, naming the key, what it is and what it may be.
            FileNotFoundError: model_config does not exist.
        """

        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

        for name, choices in CHOICES.items():
            need(getattr(self, name) in choices, name, "one of " + ", ".join(choices))
        for name, (low, high) in RANGES.items():
            values = getattr(self, name)
            for v in values if isinstance(values, list) else [values]:
                what = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
                need(low <= v <= high, name, what)
        need(len(self.data) > 0, "data", "at least one file or folder")
        need(bool(self.val_data) or 0 < self.val_fraction < 1, "val_fraction", "in (0, 1)")
        need(self.learning_rate > 0, "learning_rate", "positive")
        need(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two numbers in [0, 1)")
        for name in ("ratio_weight", "lr_multipliers"):
            value = getattr(self, name)
            need(value == "auto" or not isinstance(value, str), name, "numeric, or auto")
        need(isinstance(self.ratio_weight, str) or self.ratio_weight >= 0, "ratio_weight", ">= 0 or auto")
        need(not self.d_model or bool(self.arch), "d_model", "left out unless arch is given")
        routed = self.model().num_stages - 1
        self.compression = targets(self.compression, routed)
        if self.compression_start:
            self.compression_start = targets(self.compression_start, routed)
        need(len(self.max_chunks) in (0, routed), "max_chunks", f"empty or one share for each of {routed} stages")
        need(all(0 < m <= 1 for m in self.max_chunks), "max_chunks", "in (0, 1]")
        if not isinstance(self.lr_multipliers, str):
            need(
                len(self.lr_multipliers) in (0, routed + 1),
                "lr_multipliers",
                f"empty or one for each of {routed + 1} stages",
            )
            need(all(m > 0 for m in self.lr_multipliers), "lr_multipliers", "positive")
        check_restarts(self.restart_at, self.restart_min)
        return self

    def to_toml(self) -> str:
        return tomli_w.dumps(dataclasses.asdict(self))


CHOICES = {
    "ratio_reduction": ("batch", "sequence", "global"),
    "compression_anneal": ("steps", "plateau"),
    "rate_control": ("none", "bias", "alpha"),
    "boundaries": BOUNDARIES,
    "optimizer": ("adamw", "muon"),
    "schedule": ("wsd", "cosine", "constant", "plateau", "restarts"),
    "decay_shape": ("linear", "inverse-sqrt", "cosine"),
    "clipping": ("norm", "adaptive", "off"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "fp32", "bf16"),
    "parallel": ("ddp", "fsdp"),
}
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("batch_bytes", "steps", "log_every", "eval_every", "eval_bytes", "checkpoint_every", "keep_checkpoints",
         "accumulation", "compression_notches", "clip_window", "max_bad_steps"),
        (1, math.inf),
    ),
    **dict.fromkeys(
        ("weight_decay", "warmup_steps", "max_grad_norm", "ratio_warmup", "compression_anneal_steps", "rate_gain",
         "patience", "min_delta", "spike_factor", "profile", "sample_bytes"),
        (0, math.inf),
    ),
    **dict.fromkeys(
        ("decay_fraction", "min_lr", "warmup_fraction", "plateau_threshold", "plateau_factor", "spike_lr_cut"), (0, 1)
    ),
    **dict.fromkeys(("dropout", "label_smoothing", "weight_ema", "stop_smoothing"), (0, 0.99999)),
    "seq_len": (2, math.inf),
    "plateau_window": (2, math.inf),
    "clip_percentile": (0, 100),
}  # fmt: skip


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
    return parse(f"{where}: {name}", value, str(known[name].type))


def parse(where: str, value: Any, kind: str) -> Any:
    """`value` as `kind` ("int", "list[float]", "float | str"), or an error."""
    if " | " in kind and not isinstance(value, str):
        kind = kind.split(" | ")[0]
    elif " | " in kind:
        kind = "str"
    if kind.startswith("list"):
        return [_scalar(where, v, kind[5:-1]) for v in (value if isinstance(value, list) else [value])]
    return _scalar(where, value, kind)


def _scalar(where: str, value: Any, kind: str) -> Any:
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value).__name__ != kind:
        raise ValueError(f"{where} must be {kind}, got {value!r}")
    return value
