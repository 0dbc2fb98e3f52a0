"""`hnet generate --interactive`: a person and the model write one text by turns."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from hnet.errors import UserError
from hnet.generate import SamplingConfig
from hnet.model.causal_lm import HNetForCausalLM

from .live import write

HELP = """A line is added to the text, and the model goes on from there; an empty line lets it go on.
/undo   take the last turn back        /show   the whole text
/reset  begin anew                     /quit   leave (also Ctrl-D); Ctrl-C ends what the model writes"""


def converse(
    model: HNetForCausalLM, config: SamplingConfig, asked: dict[str, Any], *, limit: int, show_chunks: bool
) -> None:
    """Until the end of standard input. The model sees the whole text so far; arrow keys recall lines."""
    with contextlib.suppress(ImportError):  # its import is what gives input() a history
        import readline  # noqa: F401
    texts = [b""]  # after every turn
    seed = asked.get("seed")
    while True:
        try:
            line = input("> ")
        except EOFError:
            return click.echo()
        except KeyboardInterrupt:
            click.echo()
            continue
        if line.startswith("/"):
            if line == "/quit":
                return
            if line == "/undo":
                del texts[max(len(texts) - 1, 1) :]
            elif line == "/reset":
                del texts[1:]
            elif line == "/show":
                click.echo(texts[-1])
            else:
                click.echo(HELP)
            continue
        text = texts[-1] + line.encode("utf-8", "surrogateescape")
        if not text:
            click.echo(HELP)
            continue
        if len(text) > limit:
            click.echo(f"{len(text)} bytes of text are over the limit of {limit} (--max-prompt-bytes): /undo or /reset")
            continue
        turn = dict(asked, seed=None if seed is None else (seed + len(texts) - 1) % 2**63)
        try:
            request = write(model, text, config, turn, show_chunks=show_chunks, echo=False)
        except UserError as e:
            click.echo(f"Error: {e}")
            continue
        if request.finish == "error":
            click.echo(f"Error: {request.error}")
        texts.append(text + bytes(request.text))
