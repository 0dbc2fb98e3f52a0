"""How the next byte is chosen, and that the numbers make sense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hnet.errors import UserError

MOST_LOGPROBS = 256
MOST = 1e9  # that is added to a logit: fp32 still tells numbers from overflow


def _in(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise unless low <= value <= high, a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if number and (low < value if open_low else low <= value) and value <= high:
        return
    if math.isfinite(high):
        wanted = f"in {'(' if open_low else '['}{low:g}, {high:g}]"
    else:
        wanted = f"{'>' if open_low else '>='} {low:g}"
    raise UserError(f"{name} must be {wanted}, got {value}")


def _whole(name: str, value: int, low: int, high: float = math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{name} must be a whole number, got {value!r}")
    _in(name, value, low, high)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next byte is chosen; the defaults change nothing. In this order:

    repetition_penalty r > 1: positive logits of bytes among the last `repetition_window` are divided by r, others
        multiplied. It punishes "e" and the space; against loops no_repeat_ngram and dry are meant.
    presence_penalty, frequency_penalty: taken off the logit of every byte generated so far, once or each time.
    logit_bias: {byte: number} added to logits.
    dry_multiplier m > 0: where the last n >= dry_allowed bytes were in the text before, followed by one of its last
        `dry_window` bytes, that byte's logit falls by m * dry_base^(n - dry_allowed) (n the longest; at most 1e4).
    no_repeat_ngram n > 0: no n bytes of the text come twice, prompt included, if any other byte can come.
    valid_utf8: only bytes that can continue a character, and no character that the limit would cut.
    temperature: 0 is greedy, and then nothing below matters.
    top_k > 0: the k most probable bytes.  top_p: of those, the fewest whose share reaches it.
    min_p: bytes at least so probable, relative to the most probable.

    logprobs: record the log-probability of every byte as the model gave it, before all of this, and of so many of the
        most probable; None: do not.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.15
    dry_allowed: int = 12
    dry_window: int = 1024
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    valid_utf8: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _in("temperature", self.temperature, 0)
        _in("top_p", self.top_p, 0, 1, open_low=True)
        _in("repetition_penalty", self.repetition_penalty, 1)
        _in("min_p", self.min_p, 0, 1)
        _in("presence_penalty", self.presence_penalty, -MOST, MOST)
        _in("frequency_penalty", self.frequency_penalty, -MOST, MOST)
        _in("dry_multiplier", self.dry_multiplier, 0)
        _in("dry_base", self.dry_base, 1)
        for name in ("repetition_window", "top_k", "no_repeat_ngram"):
            _whole(name, getattr(self, name), 0)
        for name in ("dry_allowed", "dry_window"):
            _whole(name, getattr(self, name), 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if not isinstance(self.valid_utf8, bool):
            raise UserError(f"valid_utf8 must be true or false, got {self.valid_utf8!r}")
        for byte, bias in self.logit_bias.items():
            _whole("a byte of logit_bias", byte, 0, 255)
            _in(f"logit_bias of byte {byte}", bias, -MOST, MOST)

    @property
    def counts_new(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty)

    @property
    def adjusts(self) -> bool:
        """Something is added to logits."""
        return self.counts_new or bool(self.logit_bias) or self.dry_multiplier > 0
