"""`hnet generate`, also under its older name generate-chunk-lm."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

import click

from hnet.chunk_lm import ChunkLM
from hnet.device import pick_device
from hnet.errors import RunFailed, UserError

from .models import load
from .options import device_options
from .sampling_options import biases, checked_prompt, sampling_options


@click.command()
@click.argument("model", type=click.Path())
@click.option("--prompt", help="Text to continue; default: standard input.")
@click.option("--prompts", metavar="IN.jsonl", help="Continue many: an object with a prompt on every line. With --out.")
@click.option("--out", metavar="OUT.jsonl", help="Where --prompts writes; called again, it goes on where it stopped.")
@click.option("--interactive", is_flag=True, help="Write by turns with the model; /help says what it knows.")
@click.option(
    "--show-chunks", is_flag=True, help="Chunks in colours as they are made (bars in a pipe), and their sizes."
)
@click.option(
    "--max-new-bytes", "--max-tokens", "max_new_bytes", default=256, show_default=True,
    help="How many bytes to write at most; here a token is a byte.",
)  # fmt: skip
@click.option("--max-prompt-bytes", type=click.IntRange(1), default=1 << 16, show_default=True, help="An error beyond.")
@sampling_options
@click.option("--ignore-eos", is_flag=True, help="H-Net: go on after the end of a document.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Makes the text repeatable.")
@click.option(
    "--logprobs",
    type=click.IntRange(0, 256),
    metavar="N",
    help="With --prompts: log-probabilities of the bytes written and of the N most probable ones.",
)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="--prompts: texts side by side.")
@click.option("--stateful", is_flag=True, help="ChunkLM: remember the text beyond the window.")
@device_options
def generate(
    model: str, prompt: str | None, prompts: str | None, out: str | None, interactive: bool, show_chunks: bool,
    max_prompt_bytes: int, stateful: bool, batch: int, device: str, dtype: str, **options: Any,
) -> None:  # fmt: skip
    """Continue a prompt. MODEL is a run directory, a checkpoint, a .safetensors or .pt file (also of train-chunk-lm
    --ckpt), of an H-Net or a ChunkLM; for an H-Net also a repository. docs/generation.md explains the options."""
    from hnet.generate import SamplingConfig

    given = [n for n, v in (("--prompt", prompt), ("--prompts", prompts), ("--interactive", interactive or None)) if v]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} do not go together")
    if (prompts is None) != (out is None):
        raise UserError("--prompts and --out need each other")
    if options["logprobs"] is not None and prompts is None:
        raise UserError("--logprobs is for --prompts")
    if show_chunks and (prompts is not None):
        raise UserError("--show-chunks does not go with --prompts")
    options["logit_bias"] = biases(options["logit_bias"])
    sampling = {f.name: options.pop(f.name) for f in fields(SamplingConfig)}
    config = SamplingConfig(**sampling)
    asked = {"stop_at_eos": not options.pop("ignore_eos"), **options}
    lm = load(model, pick_device(device), dtype)
    if isinstance(lm, ChunkLM):
        for name, wanted in (("--prompts", prompts), ("--interactive", interactive), ("--show-chunks", show_chunks)):
            if wanted:
                raise UserError(f"{name} needs an H-Net, {model} is a ChunkLM")
    elif stateful:
        raise UserError("--stateful is for a ChunkLM: an H-Net remembers the whole text anyway")
    elif prompts is not None and out is not None:
        from .generate_file import generate_file

        return generate_file(lm, prompts, out, config, asked, batch=batch, limit=max_prompt_bytes)
    elif interactive:
        from .converse import converse

        return converse(lm, config, asked, limit=max_prompt_bytes, show_chunks=show_chunks)
    text = sys.stdin.buffer.read() if prompt is None else prompt.encode("utf-8", "surrogateescape")
    checked_prompt(text, max_prompt_bytes)
    if isinstance(lm, ChunkLM):
        from hnet.generate.chunk_lm import generate_text

        del asked["stop_at_eos"]
        click.echo(text, nl=False)
        for piece in generate_text(lm, text, stateful=stateful, **asked, **sampling):
            click.echo(piece, nl=False)
            sys.stdout.flush()
        click.echo()
    else:
        from .live import write

        request = write(lm, text, config, asked, show_chunks=show_chunks)
        if request.finish == "error":
            raise RunFailed(request.error)
