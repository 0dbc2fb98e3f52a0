"""Configuration as flat dataclasses: each field is a TOML key and a command-line flag, with its help beside it."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


def key(
    default: Any, help: str, *, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None
) -> Any:
    """A field with its help and what it may be: one of `choices`, or numbers from `low` to `high`."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check(f: dataclasses.Field, value: Any) -> None:
    """Raises ValueError unless `value` is one that the field may have."""
    choices, low, high = f.metadata["choices"], f.metadata["low"], f.metadata["high"]
    if choices and value not in choices:
        raise ValueError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
    if low is not None:
        what = f"at least {low}" if high is None else f"in [{low}, {high}]"
        for v in value if isinstance(value, list) else [value]:
            if not (low <= v and (high is None or v <= high)):
                raise ValueError(f"{f.name} must be {what}, got {value!r}")


def fields(cls: Any) -> list[dataclasses.Field]:
    return list(dataclasses.fields(cls))


def read_toml(path: str | Path, cls: Any) -> dict[str, Any]:
    """The keys of a config file for the dataclass `cls`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, an unknown key, or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path} is not TOML: {e}") from None
    return {name: _typed(cls, name, value, str(path)) for name, value in values.items()}


def _typed(cls: Any, name: str, value: Any, where: str) -> Any:
    known = {f.name: f for f in fields(cls)}
    if name not in known:
        raise ValueError(f"{where}: unknown key {name!r}; known are {', '.join(known)}")
    return parse(f"{where}: {name}", value, str(known[name].type))


def parse(where: str, value: Any, kind: str) -> Any:
    """`value` as `kind` ("int", "list[float]", "float | str"), or an error."""
    if " | " in kind and not isinstance(value, str):
        kind = kind.split(" | ")[0]
    elif " | " in kind:
        kind = "str"
    if kind.startswith("list"):
        return [_scalar(where, v, kind[5:-1]) for v in (value if isinstance(value, list) else [value])]
    return _scalar(where, value, kind)


def _scalar(where: str, value: Any, kind: str) -> Any:
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value).__name__ != kind:
        raise ValueError(f"{where} must be {kind}, got {value!r}")
    return value
