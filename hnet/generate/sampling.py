"""From logits to bytes: temperature, nucleus, repetition penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hnet.errors import UserError


@dataclass(frozen=True)
class SamplingConfig:
    """temperature 0 is greedy. top_p keeps the most probable bytes that sum to it. repetition_penalty > 1 lowers the
    logits of the bytes among the last `repetition_window`."""

    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if not (self.repetition_penalty >= 1 and math.isfinite(self.repetition_penalty)):
            raise UserError(f"repetition_penalty must be >= 1, got {self.repetition_penalty}")
        if self.repetition_window < 0:
            raise UserError(f"repetition_window must be >= 0, got {self.repetition_window}")


def sample(
    logits: Tensor, config: SamplingConfig, recent: list[bytes], generator: torch.Generator | None = None
) -> Tensor:
    """(n, vocab) logits -> (n,) int64. `recent` holds each row's last bytes, for the repetition penalty. Waits for no
    GPU: -1 where a row holds what is no number, for which torch.multinomial would look twice."""
    logits = logits.float()
    if config.repetition_penalty > 1:
        logits = penalise(logits, config, recent)
    if config.temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits / config.temperature, -1)
    if config.top_p < 1:
        probs = nucleus(probs, config.top_p)
    noise = torch.empty_like(probs).exponential_(1, generator=generator)  # as torch.multinomial draws one, bit for bit
    return torch.where(probs.isfinite().all(-1), (probs / noise).argmax(-1), -1)


def read_bytes(chosen: Tensor) -> list[int]:
    """What `sample` chose, on the host: the one wait for it.

    Raises:
        RuntimeError: the logits of a row were not finite.
    """
    values = chosen.tolist()
    if min(values, default=0) < 0:
        raise RuntimeError("the model's logits are not finite: there is nothing to sample")
    return values


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of bytes whose probability reaches top_p (at least one); not renormalised."""
    ordered, index = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probs).scatter(-1, index, torch.where(before < top_p, ordered, 0))


def penalise(logits: Tensor, config: SamplingConfig, recent: list[bytes]) -> Tensor:
    """Divide positive and multiply negative logits of recently seen bytes (CTRL, arXiv 1909.05858, section 4.1)."""
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for row, text in enumerate(recent):
        window = text[-config.repetition_window :] if config.repetition_window else b""
        seen[row, list(set(window))] = True
    if logits.is_cuda:
        seen = seen.pin_memory().to(logits.device, non_blocking=True)
    lowered = torch.where(logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty)
    return torch.where(seen, lowered, logits)
