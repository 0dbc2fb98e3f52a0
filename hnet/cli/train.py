"""`hnet train` and `hnet train-chunk-lm`: one command with the keys of either model; a config file says whose it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.config.keys import fields, override, parse_toml, read_toml
from hnet.config.run import RunConfig
from hnet.errors import UserError
from hnet.train.config import TrainConfig

from .options import ManyValues, config_options, given

NAMES: dict[type[RunConfig], tuple[str, str]] = {
    TrainConfig: ("an H-Net", "hnet train"), ChunkLMTrainConfig: ("a ChunkLM", "hnet train-chunk-lm"),
}  # fmt: skip
# no mark of an H-Net's file: somebody may look for them in a ChunkLM's run
HNETS_ALONE = {"init_from", "freeze", *(f.name for f in fields(TrainConfig) if f.name.startswith("lora_"))}
resume_option = click.option(
    "--resume", is_flag=False, flag_value="latest", metavar="[auto|latest|CHECKPOINT]",
    help="Go on from the latest checkpoint of --out, or from the one named; auto: if there is one, else start. Without "
    "CONFIG all keys are the run's, flags beat them.",
)  # fmt: skip
config_argument = click.argument("config", required=False, type=click.Path(dir_okay=False))


@click.command(cls=ManyValues)
@config_argument
@resume_option
@click.option("--dry-run", is_flag=True, help="Check data and config, show size, cost and schedule; train nothing.")
@config_options(TrainConfig)
def train(config: str | None, resume: str | None, dry_run: bool, **options: Any) -> None:
    """Train a model. CONFIG is a TOML file with the keys below; a flag beats the file, the file beats the default.
    CONFIG, or the run to resume, may also be a ChunkLM's. Many processes: torchrun --nproc-per-node N -m hnet train ...
    """
    start(TrainConfig, config, resume, given(options), dry_run)


@click.command("train-chunk-lm", cls=ManyValues)
@config_argument
@resume_option
@config_options(ChunkLMTrainConfig, {"accumulation": ["--accum-steps"], "learning_rate": ["--lr"]})
def train_chunk_lm(config: str | None, resume: str | None, **options: Any) -> None:
    """Train a ChunkLM, the spectral byte model. CONFIG is a TOML file with the keys below; flags beat it."""
    start(ChunkLMTrainConfig, config, resume, given(options))


def start(
    default: type[RunConfig], config: str | None, resume: str | None, flags: dict[str, Any], dry_run: bool = False
) -> None:
    from hnet.chunk_lm.task import ChunkLMTask
    from hnet.train import distributed
    from hnet.train.loop import Trainer

    values = configuration(default, config, resume, flags)
    chunk_lm = isinstance(values, ChunkLMTrainConfig)
    if dry_run:
        from hnet.train.dry_run import report

        if not isinstance(values, TrainConfig):
            raise UserError("--dry-run plans the run of an H-Net, this is a ChunkLM's")
        click.echo(report(values.validate()))
        return
    try:
        Trainer(values, resume=resume or False, make_task=ChunkLMTask if chunk_lm else None).train()
    finally:
        distributed.finish()


def configuration(default: type[RunConfig], config: str | None, resume: str | None, flags: dict[str, Any]) -> RunConfig:
    """All keys of a run. Without `config`, a run that goes on has the keys it had; `flags` beat them. `default`: whose
    keys they are where a file leaves that open.

    Raises:
        UserError: as `read_toml`, or a flag that this model's run does not have.
    """
    if config is None and resume is not None:
        run = _run_of(default, resume, flags)
        if resume != "auto" or (run / "config.toml").is_file():
            flags = {"out": str(run), **flags}
            config = str(run / "config.toml")
    return read(config, default, flags) if config else build(default, flags)


def _run_of(default: type[RunConfig], resume: str | None, flags: dict[str, Any]) -> Path:
    """The run directory: that of a checkpoint named without --out, else where these flags put it."""
    if resume not in (None, "auto", "latest") and "out" not in flags and Path(str(resume)).parent.name == "checkpoints":
        return Path(str(resume)).parent.parent
    return Path(default(**flags).out)


def read(path: str, default: type[RunConfig], flags: dict[str, Any]) -> RunConfig:
    """The configuration in a file, of either model, with `flags` instead of its keys."""
    cls = kind_of(Path(path), default)
    known = {f.name for f in fields(cls)}
    for name in [*flags, *sorted(HNETS_ALONE & parse_toml(Path(path)).keys())]:
        if name not in known:
            model, command = NAMES[cls]
            raise UserError(f"{path} is of {model}, which has no {name}; {command} shows the keys it has")
    return build(cls, override(read_toml(path, cls), flags))


def build(cls: type[RunConfig], values: dict[str, Any]) -> RunConfig:
    """
    Raises:
        UserError: an H-Net's run is given both steps and epochs (in a ChunkLM's, epochs are counted in steps).
    """
    if cls is TrainConfig and "steps" in values and values.get("epochs"):
        raise UserError(f"steps and epochs exclude each other, got {values['steps']} and {values['epochs']:g}")
    return cls(**values)


def kind_of(path: Path, default: type[RunConfig]) -> type[RunConfig]:
    """Whose keys a config file has; `default` where they may be of either."""
    found = parse_toml(path).keys()
    names = {cls: {f.name for f in fields(cls)} for cls in NAMES}
    common = set.intersection(*names.values())
    own = [cls for cls in NAMES if found & (names[cls] - common - HNETS_ALONE)]
    return own[0] if len(own) == 1 else default
