"""`hnet segment`: the chunks a model makes of a file."""

from __future__ import annotations

from typing import Any

import click

from hnet.device import pick_device
from hnet.errors import UserError

from .models import load_hnet
from .options import device_options


@click.command()
@click.argument("model", type=click.Path())
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--bytes", "count", type=click.IntRange(1), default=2000, show_default=True, help="How much of FILE.")
@click.option("--stage", default=0, show_default=True, help="Which stage's chunks, 0 is the outermost.")
@device_options
def segment(model: str, file: Any, count: int, stage: int, device: str, dtype: str) -> None:
    """Show the chunks MODEL makes of FILE (default: standard input): colours on a terminal, bars in a pipe."""
    from rich.console import Console

    from hnet.segment import render_plain, render_rich
    from hnet.segment import segment as chunks_of

    found = chunks_of(load_hnet(model, pick_device(device), dtype), file.read(count))
    if not 0 <= stage < len(found.stages):
        raise UserError(f"stage must be 0 to {len(found.stages) - 1} for this model, got {stage}")
    console = Console(highlight=False)
    console.print(render_rich(found, stage) if console.is_terminal else render_plain(found, stage), markup=False)
