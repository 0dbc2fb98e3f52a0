"""A text that an `Engine` is to write, and what has become of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hnet.errors import UserError

from .config import SamplingConfig
from .history import History
from .sampling import Choice
from .stops import StopStrings, checked

SEEDS = 1 << 63  # seeds lie below


@dataclass(eq=False)
class Request:
    """Made by `Engine.submit`; read it from the thread that calls `Engine.step`.

    text: the new bytes so far that may be shown: no part of a stop string, not EOS.
    finish: None while it goes on; "eos", "stop" (a stop string), "length" (max_new_bytes), "cancelled", or "error".
    error: why, where finish is "error".
    logprobs: one `Choice` for every byte of `text`, where SamplingConfig.logprobs asked for them.
    prompt_depths, depths: where the Engine records chunks, of how many stages a chunk begins at each byte of the prompt
        and at each new byte; the last new byte may be missing.
    """

    prompt: bytes
    config: SamplingConfig
    max_new_bytes: int
    seed: int
    stop: tuple[bytes, ...]
    stop_at_eos: bool
    text: bytearray = field(default_factory=bytearray)
    finish: str | None = None
    error: str = ""
    logprobs: list[Choice] = field(default_factory=list)
    prompt_depths: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    taken: int = 0
    last: int = 0  # the byte to feed next
    history: History = field(init=False)
    stops: StopStrings = field(init=False)

    def __post_init__(self) -> None:
        self.history = History(self.prompt, self.config, seed=self.seed, limit=self.max_new_bytes, eos=self.stop_at_eos)
        self.stops = StopStrings(self.stop)
        if self.max_new_bytes == 0 or self.history.stuck:
            self.finish = "length"

    def take(self) -> bytes:
        """What has become of `text` since the last call."""
        new = bytes(self.text[self.taken :])
        self.taken += len(new)
        return new

    def accept(self, choice: Choice, eos: int) -> None:
        """Take in a sampled byte, unless the request has ended meanwhile."""
        if self.finish is not None:
            return
        if self.stop_at_eos and choice.byte == eos:
            return self.end("eos")
        self.last = choice.byte
        self.history.append(choice.byte)
        if self.config.logprobs is not None:
            self.logprobs.append(choice)
        shown, stopped = self.stops.push(choice.byte)
        self.text += shown
        if stopped:
            self.end("stop")
        elif self.history.new == self.max_new_bytes:
            self.end("length")

    def end(self, finish: str, error: str = "") -> None:
        """No byte more; what was held back for a stop string is shown after all."""
        if self.finish is None:
            self.text += self.stops.flush()
            del self.logprobs[len(self.text) :]
            self.finish, self.error = finish, error


def checked_options(
    config: SamplingConfig, max_new_bytes: int, seed: int | None, stop: str | bytes | Sequence[str | bytes],
    stop_at_eos: bool,
) -> tuple[int, tuple[bytes, ...]]:  # fmt: skip
    """The seed and the stop strings of a request.

    Raises:
        UserError: an option is not what it must be.
    """
    if not isinstance(max_new_bytes, int) or isinstance(max_new_bytes, bool) or max_new_bytes < 0:
        raise UserError(f"max_new_bytes must be >= 0, got {max_new_bytes!r}")
    if not isinstance(stop_at_eos, bool):
        raise UserError(f"stop_at_eos must be true or false, got {stop_at_eos!r}")
    return checked_seed(seed), checked(stop, config.valid_utf8)


def checked_seed(seed: int | None) -> int:
    """The seed, or one from PyTorch's generator.

    Raises:
        UserError: it is negative or has more than 63 bits.
    """
    if seed is None:
        return int(torch.randint(SEEDS - 1, (1,), dtype=torch.int64))
    if not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise UserError(f"seed must be a whole number from 0 to 2^63 - 1, got {seed!r}")
    return seed
