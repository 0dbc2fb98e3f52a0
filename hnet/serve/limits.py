"""What a server lets its clients ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hnet.errors import UserError


@dataclass(frozen=True)
class Limits:
    """
    slots: texts written at the same time.
    queue: texts that wait for a slot; a request that does not fit is answered 429.
    max_prompt_bytes: of every prompt.
    max_tokens: new bytes of every text.
    seconds: from a request to its last byte, waiting included; a text is cut there.

    Raises:
        UserError: slots, max_prompt_bytes or max_tokens < 1, queue < 0, seconds not a positive number.
    """

    slots: int = 16
    queue: int = 64
    max_prompt_bytes: int = 8192
    max_tokens: int = 4096
    seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("queue", 0), ("max_prompt_bytes", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise UserError(f"seconds must be a positive number, got {self.seconds}")

    @property
    def texts(self) -> int:
        """At once, running or waiting."""
        return self.slots + self.queue

    @property
    def body(self) -> int:
        """Bytes of a request: 16 of the longest prompts with every byte as \\u00xx, and the options."""
        return 16 * 6 * self.max_prompt_bytes + (1 << 16)
