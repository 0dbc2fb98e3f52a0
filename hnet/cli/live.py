"""A text on the screen while it is written: plain, or with its chunks in colours."""

from __future__ import annotations

import codecs
import sys
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from hnet.generate import Engine, Request, SamplingConfig
from hnet.model.causal_lm import HNetForCausalLM
from hnet.segment.render import BARS, COLOURS, show


def write(
    model: HNetForCausalLM, prompt: bytes, config: SamplingConfig, asked: dict[str, Any], *, show_chunks: bool = False,
    echo: bool = True,
) -> Request:  # fmt: skip
    """Show the prompt (unless not `echo`) and its continuation as it comes. Ctrl-C ends the text, not the command.

    asked: arguments of `Engine.submit` besides the config.
    """
    engine = Engine(model, slots=1, max_length=1 + len(prompt) + asked["max_new_bytes"], chunks=show_chunks)
    request = engine.submit(prompt, config, **asked)
    screen: Plain | Painter = Painter(request, echo) if show_chunks else Plain(prompt if echo else b"")
    try:
        while engine.busy:
            engine.step()
            screen.more(request)
    except KeyboardInterrupt:
        engine.cancel(request)
    screen.end(request)
    return request


class Plain:
    """UTF-8 characters as they become whole; bytes that are none become U+FFFD."""

    def __init__(self, before: bytes) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        click.echo(before, nl=False)

    def more(self, request: Request) -> None:
        if piece := self.decoder.decode(request.take()):
            click.echo(piece, nl=False)
            sys.stdout.flush()

    def end(self, request: Request) -> None:
        click.echo(self.decoder.decode(request.take(), final=True))


class Painter:
    """Every chunk in a colour other than its neighbour's, on a hue by the next stage; bars where there are no colours.

    Where a chunk begins is known once its first byte has been fed to the model, so the screen is a byte behind.
    """

    def __init__(self, request: Request, echo: bool) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.echo, self.at, self.pending = echo, 0, b""
        self.turns, self.level, self.painted = [0, 0, 0], 0, False

    def more(self, request: Request) -> None:
        """Paint the bytes whose chunk is known: of the prompt, then of the text."""
        prompt = len(request.prompt)
        known = min(len(request.prompt_depths) + len(request.depths), prompt + len(request.text))
        for at in range(self.at, known):
            new = at - prompt
            byte, depth = (
                (request.prompt[at], request.prompt_depths[at]) if new < 0 else (request.text[new], request.depths[new])
            )
            if new >= 0 or self.echo:
                self._byte(byte, depth)
        self.at = max(self.at, known)

    def end(self, request: Request) -> None:
        """The rest, and how long the chunks are."""
        self.more(request)
        for byte in request.text[max(self.at - len(request.prompt), 0) :]:  # the model has not seen the last one
            self._byte(byte, 0)
        self._flush()
        self.console.print()
        depths = request.prompt_depths + request.depths
        for stage in range(max(depths, default=0)):
            chunks = sum(depth > stage for depth in depths)
            click.echo(f"stage {stage}: {len(depths) / chunks:.2f} bytes per chunk, {chunks} chunks", err=True)

    def _byte(self, byte: int, depth: int) -> None:
        if depth:
            self._flush()
            self.level = depth
            for stage in range(min(depth, len(self.turns))):
                self.turns[stage] += 1
        self.pending += bytes([byte])
        try:
            self.pending.decode()
        except UnicodeDecodeError as e:
            if e.reason == "unexpected end of data":
                return
        self._flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        text, self.pending = show(self.pending), b""
        if self.console.color_system is None:
            self.console.out(
                BARS[min(self.level, len(BARS)) - 1] + text if self.level and self.painted else text, end=""
            )
        else:
            style = COLOURS[self.turns[1] % 2][self.turns[0] % 2]
            self.console.print(Text(text, style=f"underline {style}" if self.turns[2] % 2 else style), end="")
        self.level, self.painted = 0, True
        sys.stdout.flush()
