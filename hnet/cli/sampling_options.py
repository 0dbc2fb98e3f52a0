"""How bytes are chosen, as options of a command; prompts that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from hnet.errors import UserError

OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--temperature", {"default": 0.8, "help": "0 is greedy."}),
    ("--top-p", {"default": 0.95, "help": "The most probable bytes whose share reaches it."}),
    ("--top-k", {"default": 0, "help": "The k most probable bytes; 0: all."}),
    ("--min-p", {"default": 0.0, "help": "Bytes at least so probable, relative to the most probable."}),
    (
        "--repetition-penalty",
        {"default": 1.0, "help": "Divides logits > 0 of the last bytes, multiplies others."},
    ),
    ("--repetition-window", {"default": 64, "help": "How many of the last bytes."}),
    ("--presence-penalty", {"default": 0.0, "help": "Off the logit of every byte generated before."}),
    ("--frequency-penalty", {"default": 0.0, "help": "The same for each time."}),
    ("--no-repeat-ngram", {"default": 0, "help": "No n bytes come twice, those of the prompt neither; 0: they may."}),
    ("--dry-multiplier", {"default": 0.0, "help": "DRY: off the logit of a byte that would go on with a repetition."}),
    ("--dry-base", {"default": 1.15, "help": "DRY: times this for every byte longer."}),
    ("--dry-allowed", {"default": 12, "help": "DRY: repeated bytes before it acts."}),
    ("--dry-window", {"default": 1024, "help": "DRY: how far back it looks."}),
)


def sampling_options(command: Callable) -> Callable:
    """The fields of SamplingConfig but logprobs, and stop."""
    extra = [
        click.option(
            "--logit-bias", multiple=True, metavar="BYTE=X",
            help="Add X to the logit of a byte, 0 to 255 or 0x00 to 0xff. Repeatable.",
        ),
        click.option("--valid-utf8", is_flag=True, help="Only whole characters, at the end too."),
        click.option("--stop", multiple=True, help="Text that ends it and is not shown. Repeatable."),
    ]  # fmt: skip
    for option in reversed([*(click.option(name, show_default=True, **how) for name, how in OPTIONS), *extra]):
        command = option(command)
    return command


def biases(given: tuple[str, ...]) -> dict[int, float]:
    """("0x41=-2",) -> {65: -2.0}"""
    found = {}
    for text in given:
        byte, _, value = text.partition("=")
        try:
            found[int(byte, 0)] = float(value)
        except ValueError:
            raise UserError(f"logit-bias must be BYTE=X such as 101=-2 or 0x65=-2, got {text!r}") from None
    return found


def checked_prompt(text: bytes, limit: int) -> None:
    """Raises:
    UserError: there is none, or it is longer than `limit` bytes.
    """
    if not text:
        raise UserError("prompt must hold at least one byte")
    if len(text) > limit:
        raise UserError(f"a prompt of {len(text)} bytes is over the limit of {limit} (--max-prompt-bytes)")
