"""Writing TOML, which Python only reads: the values that a config.toml has."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import Any


def dumps(values: dict[str, Any]) -> str:
    """One line a key.

    Raises:
        TypeError: a value that is no string, number, boolean or date, no list or dict of these.
    """
    return "".join(f"{_key(name)} = {_value(value)}\n" for name, value in values.items())


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _string(name)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's only other difference


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)  # inf and nan are TOML too
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(name)} = {_value(v)}' for name, v in value.items())}}}"
    if isinstance(value, date):
        return value.isoformat()
    raise TypeError(f"TOML has no {type(value).__name__}: {value!r}")
