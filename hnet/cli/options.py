"""Command-line flags made from a config dataclass: --learning-rate for learning_rate, lists as 2.0,1.5 or repeated."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hnet.config.keys import fields


def path_or_weighted(text: str) -> str | dict:
    """ "a:0.7" -> {"path": "a", "weight": 0.7}, unless there is a file of that whole name."""
    weighted = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", text)
    if weighted is None or Path(text).exists():
        return text
    return {"path": weighted[1], "weight": float(weighted[2])}


_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "str | dict": path_or_weighted}


class ListOf(click.ParamType):
    """ "1,2.5" -> [1.0, 2.5]; "auto" stays where that is allowed"""

    def __init__(self, element: Callable[[str], Any], or_auto: bool = False) -> None:
        self.element, self.or_auto = element, or_auto
        self.name = "path,..." if element is path_or_weighted else f"{element.__name__},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list | str:
        if isinstance(value, list) or (self.or_auto and value == "auto"):
            return value
        try:
            return [self.element(v) for v in str(value).split(",") if v]
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.element.__name__}", param, ctx)


class NumberOrAuto(click.ParamType):
    name = "float|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        try:
            return value if value == "auto" else float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)


def _click_type(kind: str) -> Any:
    if kind.endswith("]"):
        return ListOf(_TYPES[kind[5:-1]])
    first, _, alternative = kind.partition(" | ")
    if first.startswith("list"):
        return ListOf(_TYPES[first[5:-1]], or_auto=bool(alternative))
    return NumberOrAuto() if alternative else _TYPES[first]


class ManyValues(click.Command):
    """Lists may also be given as words: --d-model 256 512 is --d-model 256,512. (Text lists end at the next option.)"""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        lists = {o: p.type for p in self.params if isinstance(p.type, ListOf) for o in p.opts}
        merged: list[str] = []
        i = 0
        while i < len(args):
            merged.append(args[i])
            i += 1
            kind = lists.get(merged[-1])
            if kind is None:
                continue
            values = []
            while i < len(args) and _belongs(args[i], kind):
                values.append(args[i])
                i += 1
            if values:
                merged.append(",".join(values))
        return super().parse_args(ctx, merged)


def _belongs(word: str, kind: ListOf) -> bool:
    if kind.element in (str, path_or_weighted):
        return not word.startswith("--")
    return re.fullmatch(r"(-?[\d.]+(e-?\d+)?,?)+|auto", word) is not None


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def device_options(command: Callable) -> Callable:
    """--device and --dtype of the commands that run a model."""
    dtype = click.option(
        "--dtype", type=click.Choice(["auto", "fp32", "bf16", "int8"]), default="auto", show_default=True,
        help="Of weights. auto: bf16 on a GPU, fp32 on a CPU. int8: projections of an H-Net on a CPU.",
    )  # fmt: skip
    device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
    return device(dtype(command))


def config_options(cls: Any, aliases: dict[str, list[str]] | None = None) -> Callable:
    """One option for each field of the dataclass, absent unless given (file and defaults decide then). `aliases` are
    more flags for a field."""

    def decorate(command: Callable) -> Callable:
        for option in reversed([_option(f, (aliases or {}).get(f.name, [])) for f in fields(cls)]):
            command = option(command)
        return command

    return decorate


def _option(f: Any, aliases: list[str]) -> Callable:
    kind = str(f.type)
    default = f.default_factory() if callable(f.default_factory) else f.default
    name = f"--{f.name.replace('_', '-')}"
    text = f.metadata["help"] + (f"  [default: {_show(default)}]" if default not in ("", []) else "")
    if kind in ("bool", "bool | str"):  # the latter: auto unless given
        return click.option(f"{name}/--no-{name[2:]}", f.name, default=None, help=text)
    choices = f.metadata["choices"]
    wanted = click.Choice(choices) if choices else _click_type(kind)
    return click.option(name, *aliases, f.name, type=wanted, default=None, help=text)


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}
