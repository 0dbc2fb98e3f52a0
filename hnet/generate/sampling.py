"""From logits to bytes, for rows with settings of their own (`SamplingConfig` says which, and in which order).

What a text's past asks for is kept on the host by its `History` and uploaded; the rest happens on the device for all
rows at once, and the host waits once, for what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hnet_kernels import dispatch, eager, native

from .config import SamplingConfig
from .history import History, allowed_table

COLD = 1e-30  # a temperature below it would be 0 in fp32
NOT_FINITE = "the model's logits are not finite: there is nothing to sample"


class Choice(NamedTuple):
    byte: int  # -1: the row's logits are no numbers
    logprob: float | None = None  # natural logarithm, as the model gave it
    top: tuple[tuple[int, float], ...] = ()  # (byte, logprob) of the most probable, where asked for


class Sampler:
    """Chooses a byte for each row of logits (n, vocab) on a device."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self.vocab, self.device = vocab, device
        self.allowed = torch.from_numpy(allowed_table(vocab)).to(device)
        self.configs: list[SamplingConfig] = []
        self.settings: dict[str, Tensor] = {}
        self.fused = device.type == "cpu" and dispatch.native_error() is None
        self.columns: list[Tensor] = []  # the settings of all rows for the extension

    def __call__(self, logits: Tensor, rows: Sequence[History]) -> list[Choice]:
        """The next byte of every text. The one wait for the device."""
        chosen = self.sample(logits, rows)
        wanted = [row.config.logprobs for row in rows]
        if all(count is None for count in wanted):
            return [Choice(byte) for byte in chosen.tolist()]
        count = min(max(c or 0 for c in wanted), self.vocab)
        logprobs = torch.log_softmax(logits.float(), -1)
        own = logprobs.gather(-1, chosen.clamp(min=0)[:, None])
        best, index = logprobs.topk(count, -1)
        read = torch.cat([chosen[:, None].double(), own.double(), index.double(), best.double()], -1).tolist()
        choices = []
        for c, (byte, p, *rest) in zip(wanted, read, strict=True):
            top = tuple((int(b), q) for b, q in zip(rest[:count], rest[count:], strict=True))
            choices.append(Choice(int(byte)) if c is None else Choice(int(byte), p, top[:c]))
        return choices

    def sample(self, logits: Tensor, rows: Sequence[History]) -> Tensor:
        """(n, vocab) -> (n,) int64, on the device, which the host does not wait for. -1 where a row is no numbers."""
        self._use([row.config for row in rows])
        if self.fused and dispatch.in_force() in ("auto", "cpu") and not eager.observed():
            return self._sample_fused(logits, rows)
        x = logits.float()
        highest = x.amax(-1)
        if "repetition_penalty" in self.settings:
            seen = self._bytes(rows, History.mark_seen, lambda c: c.repetition_penalty > 1, bool)
            x = penalise(x, self.settings["repetition_penalty"], seen)
        if any(c.adjusts for c in self.configs):
            x = x + self._bytes(rows, History.adjust, lambda c: c.adjusts, np.float32)
        allowed = self.allowed[upload(np.array([row.situation for row in rows]), self.device)]
        if any(c.no_repeat_ngram for c in self.configs):
            banned = self._bytes(rows, History.mark_banned, lambda c: c.no_repeat_ngram > 0, bool)
            free = allowed & ~banned
            allowed = torch.where(free.any(-1, keepdim=True), free, allowed)
        x = x.masked_fill(~allowed, -torch.inf)
        best, chosen = x.max(-1, keepdim=True)
        finite, chosen = (highest + best[:, 0]).isfinite(), chosen[:, 0]
        if "temperature" in self.settings:
            probs = torch.softmax((x - best) / self.settings["temperature"], -1)  # low ones would overflow without
            if "top_p" in self.settings:
                probs = truncate(probs, self.settings["top_k"], self.settings["top_p"], self.settings["min_p"])
            noise = self._bytes(rows, History.fill_noise, lambda c: c.temperature > 0, np.float64)
            chosen = torch.where(self.settings["greedy"], chosen, (probs / noise).argmax(-1))
        return torch.where(finite, chosen, -1)

    def _sample_fused(self, logits: Tensor, rows: Sequence[History]) -> Tensor:
        """The same in one call of the extension."""
        configs = self.configs
        seen = banned = adjust = noise = None
        if "repetition_penalty" in self.settings:
            seen = self._bytes(rows, History.mark_seen, lambda c: c.repetition_penalty > 1, bool)
        if any(c.adjusts for c in configs):
            adjust = self._bytes(rows, History.adjust, lambda c: c.adjusts, np.float32)
        if any(c.no_repeat_ngram for c in configs):
            banned = self._bytes(rows, History.mark_banned, lambda c: c.no_repeat_ngram > 0, bool)
        if "temperature" in self.settings:
            noise = self._bytes(rows, History.fill_noise, lambda c: c.temperature > 0, np.float64)
        situation = torch.tensor([row.situation for row in rows])
        return native.sample(logits.float(), self.allowed, situation, seen, banned, adjust, noise, *self.columns)

    def _use(self, configs: list[SamplingConfig]) -> None:
        """Upload settings, (n, 1) each, where they are not those of the step before."""
        if len(configs) == len(self.configs) and all(a is b for a, b in zip(configs, self.configs, strict=True)):
            return

        def column(values: Sequence[float], dtype: type) -> Tensor:
            return upload(np.array(values, dtype=dtype), self.device)[:, None]

        self.configs, self.settings = configs, {}
        if any(c.repetition_penalty > 1 for c in configs):
            self.settings["repetition_penalty"] = column([c.repetition_penalty for c in configs], np.float32)
        if any(c.temperature for c in configs):
            self.settings["temperature"] = column(
                [max(c.temperature, COLD) if c.temperature else 1 for c in configs], np.float32
            )
            self.settings["greedy"] = column([c.temperature == 0 for c in configs], np.bool_)[:, 0]
            if any(c.top_k or c.top_p < 1 or c.min_p for c in configs):
                self.settings["top_k"] = column([min(c.top_k or self.vocab, self.vocab) for c in configs], np.int64)
                self.settings["top_p"] = column([c.top_p for c in configs], np.float32)
                self.settings["min_p"] = column([c.min_p for c in configs], np.float32)
        if self.fused:
            self.columns = [
                column([c.repetition_penalty for c in configs], np.float32),
                column([max(c.temperature, COLD) if c.temperature else 0 for c in configs], np.float32),
                column([min(c.top_k or self.vocab, self.vocab) for c in configs], np.int64),
                column([c.top_p for c in configs], np.float32),
                column([c.min_p for c in configs], np.float32),
            ]

    def _bytes(
        self, rows: Sequence[History], fill: Callable[[History, np.ndarray], None],
        uses: Callable[[SamplingConfig], bool], dtype: type,
    ) -> Tensor:  # fmt: skip
        """(n, vocab) of zeros, each row filled by its text where its settings use it."""
        values: np.ndarray = np.zeros((len(rows), 256), dtype=dtype)
        for row, value in zip(rows, values, strict=True):
            if uses(row.config):
                fill(row, value)
        if self.vocab > 256:
            values = np.pad(values, ((0, 0), (0, self.vocab - 256)))
        return upload(np.ascontiguousarray(values[:, : self.vocab]), self.device)


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """On the device; the host does not wait until a GPU has it."""
    x = torch.from_numpy(values)
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def penalise(logits: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    """Divide positive and multiply negative logits of seen bytes (CTRL, arXiv 1909.05858, section 4.1). seen
    (n, vocab) bool, penalty (n, 1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero what top_k, top_p (of the share that top_k leaves) and min_p cut, each (n, 1); the most probable byte always
    stays. Not renormalised."""
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    keep = torch.arange(probs.shape[-1], device=probs.device) < top_k
    left = torch.where(keep, ordered, 0)
    before = left.cumsum(-1) - left
    keep &= (before < top_p * left.sum(-1, keepdim=True)) | (top_p >= 1)
    keep[:, 0] = True
    keep &= ordered >= min_p * ordered[:, :1]
    return torch.zeros_like(probs).scatter(-1, index, torch.where(keep, ordered, 0))
