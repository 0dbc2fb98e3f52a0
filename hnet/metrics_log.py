"""Reading metrics.jsonl, which `hnet.train.metrics` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hnet.errors import user_path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a last line cut short by a crash is left out, and so is what is no JSON object."""
    rows = []
    with user_path(path):
        text = path.read_bytes().decode("utf-8", "replace")
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
