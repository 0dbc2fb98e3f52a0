"""hnet: train, eval, export, generate, segment, plot, diagnose, info; train-chunk-lm, generate-chunk-lm."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.config.keys import read_toml
from hnet.errors import UserError
from hnet.train.config import TrainConfig
from hnet_kernels import __version__

from .diagnose import diagnose, plot
from .evaluate import evaluate
from .export import export
from .models import checkpoint_of, load_hnet
from .options import ManyValues, config_options, given


class OneLineErrors(click.Group):
    """Mistakes of users (`UserError`) end in one line and exit code 1; all else is our bug: a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as e:
            if ctx.params.get("traceback"):
                raise
            raise click.ClickException(" ".join(str(e).split())) from None


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--traceback", is_flag=True, help="Show where an error came from.")
@click.version_option(__version__, "-V", "--version", prog_name="hnet")
def main(traceback: bool) -> None:
    """Train and run H-Nets: byte-level language models that learn their own chunks (arXiv 2507.07955)."""
    from hnet_kernels import keep_memory

    keep_memory()
    # Every new chunk count is a new shape, and oneDNN keeps a compiled bf16 product for each of the last 1024:
    # gigabytes for a small model. 128 are as fast (laptop model, 60 steps: 1.4 GB against 1.8 and rising).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


@main.command(cls=ManyValues)
@click.argument("config", required=False, type=click.Path(dir_okay=False))
@click.option(
    "--resume", is_flag=False, flag_value="latest", metavar="[auto|latest|CHECKPOINT]",
    help="Go on from the latest checkpoint of --out, or from the one named; auto: if there is one, else start.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check data and config, show size, cost and schedule; train nothing.")
@config_options(TrainConfig)
def train(config: str | None, resume: str | None, dry_run: bool, **options: Any) -> None:
    """Train a model. CONFIG is a TOML file with the keys below; a flag beats the file, the file beats the default.
    Many processes: torchrun --nproc-per-node N -m hnet train ..."""
    from hnet.train import distributed
    from hnet.train.loop import Trainer

    flags = given(options)
    if config is None and resume is not None:
        saved = Path(flags.get("out", TrainConfig().out)) / "config.toml"
        config = str(saved) if resume != "auto" or saved.is_file() else None
    values = TrainConfig(**{**(read_toml(config, TrainConfig) if config else {}), **flags})
    if dry_run:
        from hnet.train.dry_run import report

        click.echo(report(values.validate()))
        return
    try:
        Trainer(values, resume=resume or False).train()
    finally:
        distributed.finish()


@main.command()
@click.option("--out", default="runs/demo", show_default=True, help="Run directory; an earlier demo there is replaced.")
@click.option("--steps", default=1000, show_default=True, help="About four minutes on two cores.")
def demo(out: str, steps: int) -> None:
    """Train a small H-Net on Python's standard library, then let it write and show its chunks."""
    from .demo import demo as run

    run(out, steps)


def text_options(command: Callable) -> Callable:
    for option in reversed([
        click.argument("model", type=click.Path()),
        click.option("--prompt", help="Text to continue; default: standard input."),
        click.option("--max-new-bytes", default=256, show_default=True),
        click.option("--temperature", default=0.8, show_default=True, help="0 is greedy."),
        click.option("--top-p", default=0.95, show_default=True),
        click.option("--repetition-penalty", default=1.0, show_default=True),
        click.option("--seed", type=int, help="Makes the text repeatable."),
    ]):  # fmt: skip
        command = option(command)
    return command


def write_text(stream: Callable, model: Any, prompt: str | None, options: dict[str, Any]) -> None:
    """The prompt, then what `stream` makes of it, piece by piece."""
    if prompt is None:
        prompt = sys.stdin.read()
    click.echo(prompt, nl=False)
    for piece in stream(model, prompt, **options):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


@main.command()
@text_options
def generate(model: str, prompt: str | None, **options: Any) -> None:
    """Continue a prompt. MODEL is a run directory, a checkpoint, a .safetensors or .pt file, or a repository."""
    from hnet.generate.engine import stream_text

    write_text(stream_text, load_hnet(model), prompt, options)


@main.command()
@click.argument("model", type=click.Path())
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--bytes", "count", default=2000, show_default=True, help="How much of FILE to show.")
@click.option("--stage", default=0, show_default=True, help="Which stage's chunks, 0 is the outermost.")
def segment(model: str, file: Any, count: int, stage: int) -> None:
    """Show the chunks MODEL makes of FILE (default: standard input): colours on a terminal, bars in a pipe."""
    from rich.console import Console

    from hnet.segment import boundaries, render_plain, render_rich

    text = file.read(count)
    starts = boundaries(load_hnet(model), text)
    if not 0 <= stage < len(starts):
        raise UserError(f"stage must be 0 to {len(starts) - 1} for this model, got {stage}")
    console = Console(highlight=False)
    console.print(
        render_rich(text, starts[stage]) if console.is_terminal else render_plain(text, starts[stage]), markup=False
    )


@main.command("train-chunk-lm", cls=ManyValues)
@click.argument("config", required=False, type=click.Path(dir_okay=False))
@click.option("--resume", is_flag=True, help="Go on from the latest checkpoint.")
@config_options(ChunkLMTrainConfig, {"accumulation": ["--accum-steps"], "learning_rate": ["--lr"]})
def train_chunk_lm(config: str | None, resume: bool, **options: Any) -> None:
    """Train a ChunkLM, the spectral byte model. CONFIG is a TOML file with the keys below; flags beat it."""
    from hnet.chunk_lm.task import ChunkLMTask
    from hnet.train.loop import Trainer

    values = read_toml(config, ChunkLMTrainConfig) if config else {}
    Trainer(ChunkLMTrainConfig(**{**values, **given(options)}), resume=resume, make_task=ChunkLMTask).train()


@main.command("generate-chunk-lm")
@text_options
@click.option("--stateful", is_flag=True, help="Remember the text beyond the window (causal or spectral-state models).")
def generate_chunk_lm(model: str, prompt: str | None, **options: Any) -> None:
    """Continue a prompt with a ChunkLM. MODEL is a run directory, a checkpoint, or a --ckpt file."""
    from hnet.chunk_lm import ChunkLM
    from hnet.generate.chunk_lm import generate_text

    write_text(generate_text, ChunkLM.from_pretrained(checkpoint_of(model)), prompt, options)


main.add_command(evaluate)
main.add_command(export)
main.add_command(plot)
main.add_command(diagnose)


@main.command()
def info() -> None:
    """What is built and usable here, and the model presets."""
    from hnet.config import HNetConfig
    from hnet_kernels.info import report

    click.echo(report())
    click.echo("presets: " + ", ".join(HNetConfig.presets()))
