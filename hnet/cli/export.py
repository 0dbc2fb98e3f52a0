"""`hnet export`: a run's weights as a model directory, without what only training needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from hnet.chunk_lm import ChunkLM
from hnet.disk import full_disk
from hnet.errors import PathError, RunFailed, UserError, user_path
from hnet.model.causal_lm import HNetForCausalLM

from .export_program import write_program
from .models import checkpoint_of, load, load_average

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@click.command("export")
@click.argument("model", type=click.Path())
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--ema", is_flag=True, help="The average of the weights that weight_ema keeps.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
@click.option(
    "--format", "form", type=click.Choice(["hnet", "hf", "pt2"]), default="hnet", show_default=True,
    help="hf: for Hugging Face transformers, with its tokenizer; needs the extra hf. pt2: as hnet, and a program of "
    "torch.export besides, model.pt2, for texts of --length bytes. (H-Nets)",
)  # fmt: skip
@click.option("--length", type=click.IntRange(2), default=1024, show_default=True, help="pt2: bytes of a text.")
def export(model: str, out: Path, ema: bool, dtype: str, form: str, length: int) -> None:
    """Write MODEL (a run directory, a checkpoint, a weights file, a folder of either format) to OUT: config.json and
    model.safetensors.

    `from_pretrained(OUT)` and every command read it. Residual projections of an H-Net stay fp32. What was written is
    read again and must give the same logits.
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
        save(lm, out, form)
    except Exception as e:
        if not full_disk(e):
            raise
        raise PathError(f"cannot write {out}: no space left") from e
    verify(lm, out, form)
    if form == "pt2" and isinstance(lm, HNetForCausalLM):
        write_program(lm, out, length)
    size = sum(f.stat().st_size for f in out.iterdir())
    click.echo(f"wrote {out}: {sum(p.numel() for p in lm.parameters()) / 1e6:.2f} M parameters, {size / 1e6:.1f} MB")


def save(lm: HNetForCausalLM | ChunkLM, out: Path, form: str) -> None:
    if isinstance(lm, ChunkLM) and form != "hnet":
        raise UserError(f"format must be hnet for a ChunkLM, got {form}")
    if isinstance(lm, ChunkLM) or form != "hf":
        return lm.save_pretrained(out)
    from hnet import hf

    hf.HNetForCausalLM.from_native(lm).save_pretrained(out)
    hf.HNetTokenizer().save_pretrained(out)


@torch.no_grad()
def verify(lm: HNetForCausalLM | ChunkLM, out: Path, form: str) -> None:
    """
    Raises:
        RuntimeError: the model in `out` computes something else, be it in one bit.
    """
    again: Any
    if isinstance(lm, ChunkLM):
        again = ChunkLM.from_pretrained(out, dtype=lm.head.weight.dtype).eval()
        ids = torch.arange(min(256, lm.config.seq_len))[None]
        fp32 = lm.head.weight.dtype == torch.float32  # its Fourier transforms may not run in less
        compare(lm, again, [(lm(ids), again(ids))] if fp32 else [], out)
        return
    ids = torch.arange(256)[None] % lm.config.vocab_size
    if form == "hf":
        from transformers import AutoModelForCausalLM

        again = AutoModelForCausalLM.from_pretrained(out)
    else:
        again = HNetForCausalLM.from_pretrained(out, dtype=lm.embeddings.weight.dtype).eval()
    again._apply(torch.clone)  # a tensor may lie in its file where matrix products add up in another order
    compare(lm, again, [(lm(ids).logits, again(ids).logits)], out)


def compare(lm: Any, again: Any, pairs: list[tuple[torch.Tensor, torch.Tensor]], out: Path) -> None:
    """
    Raises:
        RunFailed: two of a pair, or any weights, differ.
    """
    pairs = [*pairs, *((x, again.state_dict()[k]) for k, x in lm.state_dict().items())]
    if not all(a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
        raise RunFailed(f"{out} does not hold the model that was to be written: do not use it, and report this")
