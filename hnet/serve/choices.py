"""From bytes to the choices of an answer: whole characters only, where chunks begin, log-probabilities."""

from __future__ import annotations

import codecs
from typing import Any

from hnet.generate.sampling import Choice

from .task import Task
from .worker import Piece

REASONS = {"eos": "stop", "stop": "stop", "length": "length", "time": "length", "shutdown": "length"}
LEAST = -9999.0  # of log-probabilities


class Writer:
    """One text of an answer. Offsets count characters (code points) of what this text shows, an echoed prompt included.

    Bytes that are no UTF-8 are shown as U+FFFD, as bytes.decode(errors="replace") does.
    """

    def __init__(self, task: Task, index: int) -> None:
        self.task, self.index = task, index
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.prompt = task.prompts[index // task.n] if task.echo else b""
        self.locates = task.chunks or task.config.logprobs is not None
        self.length = 0  # characters shown
        self.offsets: list[int] = []  # of the character that each byte is of, where anybody asks
        self.depths: list[int] = []
        self.told = 0  # of depths
        self.scored = 0  # bytes whose log-probabilities are told

    def choice(self, piece: Piece) -> dict[str, Any] | None:
        """What is new; None: nothing to show yet."""
        new, self.prompt = self.prompt + piece.new, b""
        text = self._decode(new)
        if piece.finish is not None:
            text += self.decoder.decode(b"", final=True)
        found: dict[str, Any] = {"index": self.index, "text": text, "logprobs": None, "finish_reason": None}
        if self.task.chunks:
            found["chunks"] = self._chunks(piece.depths)
        if self.task.config.logprobs is not None:
            found["logprobs"] = self._logprobs(piece.logprobs)
        if piece.finish is not None:
            found |= {"finish_reason": REASONS[piece.finish], "stop_reason": piece.finish}
        elif not text and not found.get("chunks") and not piece.logprobs:
            return None
        return found

    def _decode(self, new: bytes) -> str:
        if not self.locates:
            return self.decoder.decode(new)
        text = ""
        for byte in new:
            whole = self.decoder.decode(bytes([byte]))
            open_character = bool(self.decoder.getstate()[0])
            self.offsets.append(self.length + (len(whole) if open_character else max(len(whole) - 1, 0)))
            self.length += len(whole)
            text += whole
        return text

    def _chunks(self, depths: list[int]) -> list[list[int]]:
        """[offset, of how many stages a chunk begins there] of what is known since; it lags the text by a byte."""
        self.depths += depths
        known = min(len(self.depths), len(self.offsets))
        new = [[self.offsets[at], self.depths[at]] for at in range(self.told, known) if self.depths[at]]
        self.told = max(self.told, known)
        return new

    def _logprobs(self, choices: list[Choice]) -> dict[str, Any]:
        start, self.scored = self.scored, self.scored + len(choices)
        return {
            "tokens": [token(c.byte) for c in choices],
            "token_logprobs": [finite(c.logprob) for c in choices],
            "top_logprobs": [{token(byte): finite(p) for byte, p in c.top} for c in choices],
            "text_offset": self.offsets[start : self.scored],
        }


def token(byte: int) -> str:
    """A byte as a token of OpenAI's: ASCII as itself, others as bytes:\\xNN."""
    return chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}"


def finite(logprob: float | None) -> float | None:
    """JSON has no infinity."""
    return None if logprob is None else max(logprob, LEAST)
