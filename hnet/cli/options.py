"""Command-line flags made from a config dataclass: --learning-rate for learning_rate, lists as 2.0,1.5 or repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from hnet.train.config import fields

_TYPES = {"int": int, "float": float, "str": str, "bool": bool}


class ListOf(click.ParamType):
    """ "1,2.5" -> [1.0, 2.5]"""

    def __init__(self, element: type) -> None:
        self.element = element
        self.name = f"{element.__name__},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list:
        if isinstance(value, list):
            return value
        try:
            return [self.element(v) for v in str(value).split(",") if v]
        except ValueError:
            self.fail(f"{value!r} is not a comma-separated list of {self.element.__name__}", param, ctx)


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def config_options(command: Callable) -> Callable:
    """One option for each field of TrainConfig, absent unless given (file and defaults decide then)."""
    for f in reversed(fields()):
        kind = str(f.type)
        is_list = kind.startswith("list")
        element = _TYPES[kind[5:-1] if is_list else kind]
        default = f.default_factory() if callable(f.default_factory) else f.default
        text = f.metadata["help"] + (f"  [default: {_show(default)}]" if default not in ("", []) else "")
        command = click.option(
            f"--{f.name.replace('_', '-')}",
            f.name,
            type=ListOf(element) if is_list else element,
            default=None,
            help=text,
        )(command)
    return command


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}
