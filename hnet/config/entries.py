"""The entries of `data`: paths and streams, or tables that give each its share of a mixture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hnet.errors import UserError

_KEYS = ("path", "weight", "text_key")


@dataclass(frozen=True)
class Entry:
    """One of `data`: files or folders, or a stream, with its share (before shares are made to sum to 1)."""

    path: str
    weight: float | None = None
    text_key: str | None = None


def parse_data(data: list[Any], name: str = "data") -> list[Entry]:
    """Entries of a configuration: paths and hf: streams, or tables {path, weight} (text_key if it differs).

    Raises:
        ValueError: a table has an unknown key, no path or no positive weight; some have weights and some not.
    """
    entries = [_entry(e, f"{name}[{i}]") for i, e in enumerate(data)]
    weighted = [e for e in entries if e.weight is not None]
    if weighted and len(weighted) < len(entries):
        plain = next(e.path for e in entries if e.weight is None)
        raise UserError(f"{name}: every entry must have a weight or none, got {plain!r} without one")
    paths = [e.path for e in weighted]
    twice = next((p for p in paths if paths.count(p) > 1), None)
    if twice is not None:
        raise UserError(f"{name}: {twice!r} is named twice: add up its weights")
    return entries


def _entry(value: Any, where: str) -> Entry:
    if isinstance(value, str):
        if not value:
            raise UserError(f"{where} must be a path or an hf: stream, got ''")
        return Entry(value)
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a path or a table {{path, weight}}, got {value!r}")
    unknown = [k for k in value if k not in _KEYS]
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    path, weight, text_key = (value.get(k) for k in _KEYS)
    if not isinstance(path, str) or not path:
        raise UserError(f"{where}: path must be a file, a folder or an hf: stream, got {path!r}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UserError(f"{where}: weight of {path!r} must be a positive number, got {weight!r}")
    if text_key is not None and (not isinstance(text_key, str) or not text_key):
        raise UserError(f"{where}: text_key of {path!r} must be a name, got {text_key!r}")
    return Entry(path, float(weight), text_key)
