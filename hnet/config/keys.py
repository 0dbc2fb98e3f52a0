"""Configuration as flat dataclasses: each field is a TOML key and a command-line flag, with its help beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

from hnet.errors import MissingPath, UserError, user_path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

T = TypeVar("T")


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
    for v in value if isinstance(value, list) else [value]:
        if isinstance(v, int | float) and not abs(v) < 2**63:  # infinite, or no number
            raise UserError(f"{f.name} must be a finite number below 2**63, got {value!r}")
    choices, low, high = f.metadata["choices"], f.metadata["low"], f.metadata["high"]
    if choices and value not in choices:
        raise UserError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
    if low is not None:
        what = f"at least {low}" if high is None else f"in [{low}, {high}]"
        for v in value if isinstance(value, list) else [value]:
            if not (low <= v and (high is None or v <= high)):
                raise UserError(f"{f.name} must be {what}, got {value!r}")


# Keys that every run of 0.1.0 had and wrote down, set or not, with what they were unless set; a ChunkLM still has them.
RETIRED = {"plateau_window": 50, "plateau_threshold": 0.005}


def fields(cls: Any) -> list[dataclasses.Field]:
    return list(dataclasses.fields(cls))


def read_toml(path: str | Path, cls: Any) -> dict[str, Any]:
    """The keys of a config file for the dataclass `cls`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, an unknown key, or a value of the wrong type.
    """
    path = Path(path)
    known = {f.name for f in fields(cls)}
    values = {k: v for k, v in parse_toml(path).items() if k in known or v != RETIRED.get(k)}
    return {name: _typed(cls, name, value, str(path)) for name, value in values.items()}


def parse_toml(path: Path) -> dict[str, Any]:
    """
    Raises:
        FileNotFoundError, OSError: no such file, or it cannot be read.
        UserError: not TOML.
    """
    text = _read(path)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise UserError(f"{path} is not TOML: {e}") from None


def from_json(path: str | Path, make: Callable[[Any], T]) -> T:
    """`make` of what a JSON file holds; a mistake in it names the file.

    Raises:
        FileNotFoundError, OSError, UserError: as `read_json`.
    """
    value = read_json(path)
    try:
        return make(value)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def read_json(path: str | Path) -> Any:
    """
    Raises:
        FileNotFoundError, OSError: no such file, or it cannot be read.
        UserError: not JSON.
    """
    text = _read(Path(path))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON: {e}") from None


def _read(path: Path) -> str:
    with user_path(path):
        if not path.exists():
            raise MissingPath(f"config file {path} does not exist")
        data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not text: {e}") from None


def override(values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The values of a file with those of flags above them. A flag for one of steps and epochs, which say the same,
    replaces both: a run's config.toml has the steps that its epochs made."""
    lengths = ("steps", "epochs")
    if any(name in flags for name in lengths):
        values = {name: v for name, v in values.items() if name not in lengths}
    return {**values, **flags}


def _typed(cls: Any, name: str, value: Any, where: str) -> Any:
    known = {f.name: f for f in fields(cls)}
    if name not in known:
        raise UserError(f"{where}: unknown key {name!r}; known are {', '.join(known)}")
    return parse(f"{where}: {name}", value, str(known[name].type))


def parse(where: str, value: Any, kind: str) -> Any:
    """`value` as `kind` ("int", "list[float]", "float | str", "list[str | dict]"), or an error."""
    if " | " in kind and not kind.endswith("]") and not isinstance(value, str):
        kind = kind.split(" | ")[0]
    elif " | " in kind and not kind.endswith("]"):
        kind = "str"
    if kind.startswith("list"):
        return [_scalar(where, v, kind[5:-1]) for v in (value if isinstance(value, list) else [value])]
    return _scalar(where, value, kind)


def _scalar(where: str, value: Any, kind: str) -> Any:
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value).__name__ not in kind.split(" | "):
        raise UserError(f"{where} must be {kind}, got {value!r}")
    return value
