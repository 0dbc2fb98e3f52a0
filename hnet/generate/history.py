"""What sampling has to remember of one text: on the host, brought up to date by every byte."""

from __future__ import annotations

import numpy as np

from hnet.config import BOS, EOS

from . import utf8
from .config import SamplingConfig
from .noise import Noise

MOST_DRY = 1e4  # a penalty grows no further
ANY, NO_BOS = 0, 1  # rows of `allowed_table` of texts that need not be UTF-8


def allowed_table(vocab: int) -> np.ndarray:
    """(rows, vocab) bool: bytes that can come, in every situation a `History.situation` names."""
    rows = [np.ones(256, dtype=bool), np.arange(256) != BOS]
    for eos in (False, True):
        for state in range(utf8.STATES):
            for left in range(1, utf8.LONGEST + 1):
                row = utf8.allowed(state, left)
                row[EOS] = eos and state == utf8.START
                rows.append(row)
    table = np.zeros((len(rows), vocab), dtype=bool)
    table[:, : min(vocab, 256)] = np.stack(rows)[:, :vocab]
    return table


class History:
    """One text and its settings.

    Args:
        text: the prompt, which penalties for repetition look at too; without BOS.
        config: how to sample.
        seed: of this text's own random numbers.
        limit: at most so many new bytes; None: no limit.
        bos: BOS may be generated.  eos: EOS ends the text, so it may also come where text must be UTF-8.
    """

    def __init__(
        self, text: bytes, config: SamplingConfig, *, seed: int, limit: int | None = None, bos: bool = False,
        eos: bool = True,
    ) -> None:  # fmt: skip
        self.config, self.limit, self.bos, self.eos = config, limit, bos, eos
        self.noise = Noise(seed)
        self.text = bytearray(text)
        self.new = 0  # bytes generated
        self.state = utf8.state_after(text) if config.valid_utf8 else utf8.START
        self.made = np.zeros(256, dtype=np.float32) if config.counts_new else None
        self._seen = self._window(text) if config.repetition_penalty > 1 else None
        self._followers: dict[bytes, set[int]] | None = {} if config.no_repeat_ngram else None
        for end in range(config.no_repeat_ngram, len(text) + 1 if config.no_repeat_ngram else 0):
            self._remember_ngram(end)
        self._matches = np.zeros(0, dtype=np.int64) if config.dry_multiplier else None
        if self._matches is not None:
            self._matches = self._all_matches(text)

    def append(self, byte: int) -> None:
        """A byte was generated."""
        config, text = self.config, self.text
        if self._matches is not None:
            old = np.frombuffer(bytes(text[-len(self._matches) :]) if len(self._matches) else b"", dtype=np.uint8)
            longer = np.where(old == byte, self._matches + 1, 0)
            self._matches = np.concatenate([[0], longer])[-config.dry_window :]
        text.append(byte)
        self.new += 1
        if self.made is not None:
            self.made[byte] += 1
        if self._seen is not None and config.repetition_window:
            self._seen[byte] += 1
            if len(text) > config.repetition_window:
                self._seen[text[-config.repetition_window - 1]] -= 1
        if self._followers is not None and len(text) >= config.no_repeat_ngram:
            self._remember_ngram(len(text))
        if config.valid_utf8:
            self.state = utf8.advance(self.state, byte)

    # --- what the sampler asks for ------------------------------------------------------------------------------------

    @property
    def situation(self) -> int:
        """The row of `allowed_table` for the next byte."""
        if not self.config.valid_utf8:
            return ANY if self.bos else NO_BOS
        left = utf8.LONGEST if self.limit is None else min(self.limit - self.new, utf8.LONGEST)
        return 2 + (self.eos * utf8.STATES + self.state) * utf8.LONGEST + max(left, 1) - 1

    @property
    def stuck(self) -> bool:
        """The prompt ends inside a character that the limit leaves no room for."""
        return self.limit is not None and self.limit - self.new < utf8.MISSING[self.state]

    def fill_noise(self, row: np.ndarray) -> None:
        """Write the random numbers of the next byte into row (256,) fp64."""
        row[:] = self.noise.of(self.new)

    def mark_seen(self, row: np.ndarray) -> None:
        """Set in row (256,) bool the bytes among the last `repetition_window`."""
        assert self._seen is not None
        row |= self._seen > 0

    def mark_banned(self, row: np.ndarray) -> None:
        """Set in row (256,) bool the bytes that would repeat an n-gram of the text."""
        n = self.config.no_repeat_ngram
        if self._followers is not None and len(self.text) >= n - 1:
            row[list(self._followers.get(bytes(self.text[len(self.text) - n + 1 :]), ()))] = True

    def adjust(self, row: np.ndarray) -> None:
        """Add to row (256,) fp32 what presence, frequency, DRY and logit_bias change."""
        config = self.config
        if self.made is not None:
            row -= config.frequency_penalty * self.made + config.presence_penalty * (self.made > 0)
        for byte, bias in config.logit_bias.items():
            row[byte] += bias
        if self._matches is not None:
            (where,) = np.nonzero(self._matches >= config.dry_allowed)
            if len(where):
                longest = np.zeros(256, dtype=np.int64)
                follower = np.frombuffer(bytes(self.text[-len(self._matches) :]), dtype=np.uint8)
                np.maximum.at(longest, follower[where], self._matches[where])
                hit = longest >= config.dry_allowed
                # in logarithms: a long match would overflow
                power = np.log(config.dry_multiplier) + (longest[hit] - config.dry_allowed) * np.log(config.dry_base)
                row[hit] -= np.exp(np.minimum(power, np.log(MOST_DRY)))

    # --- taking in the prompt -----------------------------------------------------------------------------------------

    def _window(self, text: bytes) -> np.ndarray:
        window = text[-self.config.repetition_window :] if self.config.repetition_window else b""
        return np.bincount(np.frombuffer(window, dtype=np.uint8), minlength=256)

    def _remember_ngram(self, end: int) -> None:
        assert self._followers is not None
        before = bytes(self.text[end - self.config.no_repeat_ngram : end - 1])
        self._followers.setdefault(before, set()).add(self.text[end - 1])

    def _all_matches(self, text: bytes) -> np.ndarray:
        """(positions,) of the last `dry_window` bytes: how many bytes before each equal those at the end."""
        data, matches = np.frombuffer(text, dtype=np.uint8), []
        for at in range(max(0, len(data) - self.config.dry_window), len(data)):
            differ = np.flatnonzero(data[:at][::-1] != data[len(data) - at :][::-1])
            matches.append(int(differ[0]) if len(differ) else at)
        return np.array(matches, dtype=np.int64)
