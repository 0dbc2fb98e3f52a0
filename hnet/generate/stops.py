"""Strings that end a text: found in bytes that come one at a time, and never shown, not even their beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hnet.errors import UserError


def checked(stop: str | bytes | Sequence[str | bytes], valid_utf8: bool = False) -> tuple[bytes, ...]:
    """Stop strings as bytes, the longest first.

    Raises:
        UserError: one is no text, empty, or, of a text that must be UTF-8, not UTF-8 itself.
    """
    given: list[Any] = list(stop) if isinstance(stop, Sequence) and not isinstance(stop, str | bytes) else [stop]
    for s in given:
        if not isinstance(s, str | bytes) or not s:
            raise UserError(f"stop must be texts or bytes, none of them empty, got {s!r}")
    strings = {s.encode("utf-8", "surrogateescape") if isinstance(s, str) else s for s in given}
    if valid_utf8:
        for s in strings:
            try:
                s.decode()
            except UnicodeDecodeError:
                raise UserError(f"stop must be UTF-8 where valid_utf8 is asked for, got {s!r}") from None
    return tuple(sorted(strings, key=lambda s: (-len(s), s)))


class StopStrings:
    """The string whose last byte comes first ends the text; of several that end there, the longest."""

    def __init__(self, strings: tuple[bytes, ...]) -> None:
        self.strings = strings
        self.held = b""  # the end of the text that may yet become one of them

    def push(self, new: int) -> tuple[bytes, bool]:
        """Take in a byte: what may be shown now, and whether the text has ended."""
        if not self.strings:
            return bytes([new]), False
        held = self.held + bytes([new])
        for s in self.strings:
            if held.endswith(s):
                self.held = b""
                return held[: -len(s)], True
        for at in range(len(held)):
            if any(s.startswith(held[at:]) for s in self.strings):
                self.held = held[at:]
                return held[:at], False
        self.held = b""
        return held, False

    def flush(self) -> bytes:
        """What was held back, when the text ends otherwise."""
        held, self.held = self.held, b""
        return held
