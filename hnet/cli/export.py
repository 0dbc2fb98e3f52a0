"""`hnet export`: a run's weights as a model directory, without what only training needs."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from hnet.disk import full_disk
from hnet.errors import PathError, UserError, user_path

from .models import checkpoint_of, load, load_average

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@click.command("export")
@click.argument("model", type=click.Path())
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--ema", is_flag=True, help="The average of the weights that weight_ema keeps.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
def export(model: str, out: Path, ema: bool, dtype: str) -> None:
    """Write MODEL (a run directory, a checkpoint, a weights file) to OUT: config.json and model.safetensors.

    `from_pretrained(OUT)` and every command read it. Residual projections of an H-Net stay fp32.
    """
    with user_path(out):
        if out.exists() and any(out.iterdir()):
            raise UserError(f"OUT must be a new or empty folder, got {out}")
    path = checkpoint_of(model)
    lm = load(path, torch.device("cpu"))
    if ema:
        load_average(lm, path)
    cast = getattr(lm, "cast", lm.to)
    cast(DTYPES[dtype])
    with user_path(out, "write"):
        out.mkdir(parents=True, exist_ok=True)
    try:
        lm.save_pretrained(out)
    except Exception as e:
        if not full_disk(e):
            raise
        raise PathError(f"cannot write {out}: no space left") from e
    size = sum(f.stat().st_size for f in out.iterdir())
    click.echo(f"wrote {out}: {sum(p.numel() for p in lm.parameters()) / 1e6:.2f} M parameters, {size / 1e6:.1f} MB")
