"""Texts written side by side: requests join a running batch and leave it (continuous batching).

Every step feeds one byte to each request that runs, takes in the prompts of those that join, and chooses the next byte
of all of them with one wait for the device. A request's text depends on its own prompt, settings and seed; neighbours
change its logits by rounding only.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from hnet.config import BOS, EOS
from hnet.errors import UserError
from hnet.model.cache import HNetCache, upload
from hnet.model.causal_lm import CausalLMOutput, HNetForCausalLM

from .config import SamplingConfig
from .request import Request, checked_options
from .sampling import NOT_FINITE, Choice, Sampler


class Engine:
    """Decodes up to `slots` requests at once.

        engine = Engine(model)
        request = engine.submit("def f(", SamplingConfig(temperature=0.8), max_new_bytes=100, seed=1)
        while engine.busy:
            for r in engine.step():
                print(r.take(), r.finish)

    `step` belongs to one thread; `submit` and `cancel` may be called from any.

    Args:
        model: on any device, any dtype, in evaluation mode.
        slots: requests that run at the same time; others wait in the order they came.
        max_length: bytes of prompt, BOS and new text that a request may have.
        prefill_bytes: bytes of prompts that a step takes in at most, so that those who run do not wait for long; one
            prompt at least, however long. Default: no limit.
        chunks: record where chunks begin (Request.depths). Of a prompt this costs the host a wait for each stage.
        graphs: as in `HNetForCausalLM.allocate_cache`.

    Raises:
        ValueError: slots, max_length or prefill_bytes < 1.
    """

    def __init__(
        self, model: HNetForCausalLM, *, slots: int = 16, max_length: int = 8192, prefill_bytes: int | None = None,
        chunks: bool = False, graphs: bool | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("slots", slots), ("max_length", max_length), ("prefill_bytes", prefill_bytes)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.model, self.slots, self.max_length = model, slots, max_length
        self.prefill_bytes, self.chunks = prefill_bytes, chunks
        self.running: list[Request] = []  # by slot: those in use are 0, 1, ..., where a step gathers nothing
        self.waiting: deque[Request] = deque()
        self.lock = threading.Lock()  # of `waiting`
        self._graphs = graphs
        self._cache: HNetCache | None = None
        self._sampler: Sampler | None = None

    @property
    def busy(self) -> bool:
        """A request runs or waits."""
        return bool(self.waiting) or any(r.finish is None for r in self.running)

    def submit(
        self, prompt: str | bytes, config: SamplingConfig | None = None, *, max_new_bytes: int = 256,
        seed: int | None = None, stop: str | bytes | Sequence[str | bytes] = (), stop_at_eos: bool = True,
    ) -> Request:  # fmt: skip
        """Ask for a text; it begins with a later `step`.

        Args:
            prompt: text (as UTF-8) or any bytes, also none; BOS is put before it.
            config: how to sample. Default: SamplingConfig().
            max_new_bytes: at most this many.
            seed: makes the text repeatable. Default: drawn from PyTorch's global generator.
            stop: texts or bytes that end it; they are not part of the result.
            stop_at_eos: end it at EOS, which is not part of the result.

        Raises:
            ValueError: an option out of range; prompt and max_new_bytes are more than max_length.
        """
        data, config = as_bytes(prompt), config or SamplingConfig()
        seed, stops = checked_options(config, max_new_bytes, seed, stop, stop_at_eos)
        if 1 + len(data) + max_new_bytes > self.max_length:
            raise UserError(
                f"a prompt of {len(data)} bytes (and BOS) with max_new_bytes {max_new_bytes} does not fit max_length "
                f"{self.max_length}"
            )
        request = Request(data, config, max_new_bytes, seed, stops, stop_at_eos)
        if request.finish is None:
            with self.lock:
                self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request, wherever it is; its slot is free from the next step on. One that has ended stays as it is."""
        with self.lock:
            request.end("cancelled")
            if request in self.waiting:
                self.waiting.remove(request)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """A byte more for every request that runs, and the first for those that join. Returns the requests that were
        asked; those that ended have a `finish`. With nothing to do: [].

        Logits that are not finite end their request with finish "error"; an exception of the model ends all that run,
        and is raised.
        """
        new = self._admit()
        if not self.running:
            return []
        try:
            old = [slot for slot in range(len(self.running)) if slot not in set(new)]
            rows = old + new
            parts = [self._decode(old)] if old else []
            parts += [self._prefill(new)] if new else []
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)
            choices = self._choose(logits, rows)
            if len(new) > 1:  # what is no number in one prompt may have spread to those packed beside it
                for row, slot in enumerate(rows):
                    if row >= len(old) and choices[row].byte < 0:
                        self.cache.clear(slot)
                        choices[row] = self._choose(self._prefill([slot]), [slot])[0]
        except BaseException as e:
            for request in self.running:
                request.end("error", f"{type(e).__name__}: {e}")
            raise
        asked = [self.running[slot] for slot in rows]
        with self.lock:
            for request, choice in zip(asked, choices, strict=True):
                if choice.byte < 0:
                    request.end("error", NOT_FINITE)
                else:
                    request.accept(choice, EOS)
        return asked

    # --- slots --------------------------------------------------------------------------------------------------------

    def _admit(self) -> list[int]:
        """Free the slots of requests that ended, give them to those that wait, and close what gaps are left. Returns
        the slots of newcomers."""
        gaps = [slot for slot, request in enumerate(self.running) if request.finish is not None]
        for slot in gaps:
            if self.running[slot].finish == "error":
                self.cache.clear(slot)
        new: list[int] = []
        with self.lock:
            size = 0
            while self.waiting and (gaps or len(self.running) < self.slots):
                size += 1 + len(self.waiting[0].prompt)
                if new and self.prefill_bytes is not None and size > self.prefill_bytes:
                    break
                request = self.waiting.popleft()
                if gaps:
                    new.append(gaps.pop(0))
                    self.running[new[-1]] = request
                else:
                    new.append(len(self.running))
                    self.running.append(request)
        for gap in reversed(gaps):
            last = self.running.pop()
            if gap < len(self.running):
                self.cache.move(len(self.running), gap)
                self.running[gap] = last
        return new

    @property
    def cache(self) -> HNetCache:
        if self._cache is None:
            options = {} if self._graphs is None else {"graphs": self._graphs}
            self._cache = self.model.allocate_cache(self.slots, self.max_length, **options)
        return self._cache

    def _decode(self, slots: list[int]) -> Tensor:
        """(n, vocab) logits after the last byte of each."""
        ids = upload([self.running[slot].last for slot in slots], self._device)
        logits, masks = self.model.step(ids, self.cache, slots)
        if self.chunks:
            depths, rows = [0] * len(slots), list(range(len(slots)))
            for mask in masks:
                rows = [row for row, fired in zip(rows, mask.tolist(), strict=True) if fired]
                for row in rows:
                    depths[row] += 1
            for slot, depth in zip(slots, depths, strict=True):
                self.running[slot].depths.append(depth)
        return logits

    def _prefill(self, slots: list[int]) -> Tensor:
        """(n, vocab) logits after the prompts of newcomers."""
        texts = [bytes([BOS]) + self.running[slot].prompt for slot in slots]
        packed = upload(list(b"".join(texts)), self._device)
        cu = upload([0, *map(len, texts)], self._device).cumsum(0).to(torch.int32)
        out = self.model.prefill(packed, cu, self.cache, slots)
        if self.chunks:
            depths, end = prompt_depths(out, packed.shape[0]), 0
            for slot, text in zip(slots, texts, strict=True):
                self.running[slot].prompt_depths = depths[end + 1 : end + len(text)]
                end += len(text)
        return out.logits[cu[1:].long() - 1]

    def _choose(self, logits: Tensor, slots: list[int]) -> list[Choice]:
        if self._sampler is None:
            self._sampler = Sampler(logits.shape[-1], logits.device)
        return self._sampler(logits, [self.running[slot].history for slot in slots])

    @property
    def _device(self) -> torch.device:
        return self.model.embeddings.weight.device


def prompt_depths(out: CausalLMOutput, positions: int) -> list[int]:
    """Of how many stages a chunk begins at each position."""
    depths, at = [0] * positions, list(range(positions))
    for routing in out.routing:
        at = [p for p, starts in zip(at, routing.boundary_mask.tolist(), strict=True) if starts]
        for p in at:
            depths[p] += 1
    return depths


def as_bytes(prompt: str | bytes) -> bytes:
    """Text as UTF-8; what was no UTF-8 on a command line comes back as the bytes it was."""
    return prompt.encode("utf-8", "surrogateescape") if isinstance(prompt, str) else bytes(prompt)
