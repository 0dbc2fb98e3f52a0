"""`hnet generate`, also under its older name generate-chunk-lm."""

from __future__ import annotations

import sys
from typing import Any

import click

from hnet.chunk_lm import ChunkLM
from hnet.device import pick_device
from hnet.errors import UserError

from .models import load
from .options import device_options


@click.command()
@click.argument("model", type=click.Path())
@click.option("--prompt", help="Text to continue; default: standard input.")
@click.option(
    "--max-new-bytes", "--max-tokens", "max_new_bytes", default=256, show_default=True,
    help="How many bytes to write; here a token is a byte.",
)  # fmt: skip
@click.option("--temperature", default=0.8, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=0.95, show_default=True)
@click.option("--repetition-penalty", default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Makes the text repeatable.")
@click.option("--stateful", is_flag=True, help="ChunkLM: remember the text beyond the window.")
@device_options
def generate(model: str, prompt: str | None, stateful: bool, device: str, dtype: str, **options: Any) -> None:
    """Continue a prompt. MODEL is a run directory, a checkpoint, a .safetensors or .pt file (also of train-chunk-lm
    --ckpt), of an H-Net or a ChunkLM; for an H-Net also a repository."""
    from hnet.generate.chunk_lm import generate_text
    from hnet.generate.texts import stream_text

    lm = load(model, pick_device(device), dtype)
    text = sys.stdin.buffer.read() if prompt is None else prompt.encode("utf-8", "surrogateescape")
    if isinstance(lm, ChunkLM):
        pieces = generate_text(lm, text, stateful=stateful, **options)
    elif stateful:
        raise UserError("--stateful is for a ChunkLM: an H-Net remembers the whole text anyway")
    else:
        pieces = stream_text(lm, text, **options)
    click.echo(text, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
