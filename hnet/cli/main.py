"""hnet: train, eval, export, generate, serve, segment, plot, diagnose, sweep, info; {train,generate}-chunk-lm."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import click

from hnet.device import out_of_memory
from hnet.errors import UserError
from hnet_kernels import __version__
from hnet_kernels.dispatch import BackendUnavailable

from .diagnose import diagnose, plot
from .evaluate import evaluate
from .export import export
from .generate import generate
from .segment import segment
from .serve import serve
from .sweep import sweep
from .train import train, train_chunk_lm


class OneLineErrors(click.Group):
    """Mistakes of users (`UserError`, a backend that cannot run here) end in one line and exit code 1.

    All else is our bug: a traceback.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, BackendUnavailable) as e:
            if ctx.params.get("traceback"):
                raise
            raise click.ClickException(" ".join(str(e).split())) from None
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e) or ctx.params.get("traceback"):
                raise
            raise click.ClickException(f"out of memory: {' '.join(str(e).split())[:200]}") from None


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--traceback", is_flag=True, help="Show where an error came from.")
@click.version_option(__version__, "-V", "--version", prog_name="hnet")
def main(traceback: bool) -> None:
    """Train and run H-Nets: byte-level language models that learn their own chunks (arXiv 2507.07955)."""
    from hnet_kernels import keep_memory
    from hnet_kernels.dispatch import check_environment

    try:
        check_environment()
    except ValueError as e:
        raise UserError(str(e)) from None
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode gets a question mark, not an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    keep_memory()
    # Every new chunk count is a new shape, and oneDNN keeps a compiled bf16 product for each of the last 1024:
    # gigabytes for a small model. 128 are as fast (laptop model, 60 steps: 1.4 GB against 1.8 and rising).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


@main.command()
@click.option("--out", default="runs/demo", show_default=True, help="Run directory; an earlier demo there is replaced.")
@click.option("--steps", default=1000, show_default=True, help="About four minutes on two cores.")
def demo(out: str, steps: int) -> None:
    """Train a small H-Net on Python's standard library, then let it write and show its chunks."""
    from .demo import demo as run

    run(out, steps)


main.add_command(train)
main.add_command(train_chunk_lm)
main.add_command(generate)
main.add_command(generate, "generate-chunk-lm")
main.add_command(serve)
main.add_command(segment)
main.add_command(evaluate)
main.add_command(export)
main.add_command(plot)
main.add_command(diagnose)
main.add_command(sweep)


@main.command()
def info() -> None:
    """What is built and usable here, and the model presets."""
    from hnet.config import HNetConfig
    from hnet_kernels.info import report

    click.echo(report())
    click.echo("presets: " + ", ".join(HNetConfig.presets()))
