"""What a run reports beside its numbers: a line on the console and one in metrics.jsonl."""

from __future__ import annotations

from typing import NamedTuple


class Event(NamedTuple):
    name: str
    message: str
    action: str = ""  # "", "rollback" or "abort"
    line: str = ""  # how the console says it; default: the step and the message
    quiet: bool = False  # for metrics.jsonl only
