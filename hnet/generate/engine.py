"""Prefill once, then one byte a step for every unfinished sequence of the batch."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hnet.config import BOS, EOS
from hnet.errors import UserError
from hnet.model.cache import upload
from hnet.model.causal_lm import HNetForCausalLM

from .sampling import SamplingConfig, read_bytes, sample


def encode(prompt: str | bytes) -> bytes:
    """BOS and the prompt's bytes (text as UTF-8)."""
    return bytes([BOS]) + (prompt.encode() if isinstance(prompt, str) else bytes(prompt))


def without_bos(logits: Tensor) -> Tensor:
    """(n, vocab) logits, a copy in which BOS is impossible."""
    logits = logits.clone()
    logits[:, BOS] = float("-inf")
    return logits


def stream(
    model: HNetForCausalLM,
    prompts: list[str | bytes],
    *,
    max_new_bytes: int = 256,
    seed: int | None = None,
    stop_at_eos: bool = True,
    **sampling: Any,
) -> Iterator[dict[int, int]]:
    """Generate for a batch of prompts of any lengths, yielding {prompt index: new byte} after every step.

    BOS, which only ever begins a text, is never generated, whatever probability the model gives it.

    Args:
        model: on any device, any dtype.
        prompts: text or bytes; BOS is put before each.
        max_new_bytes: at most this many each.
        seed: makes the run repeatable. Default: PyTorch's global generator.
        stop_at_eos: end a sequence at EOS (which is not yielded).
        **sampling: fields of SamplingConfig: temperature, top_p, repetition_penalty, repetition_window.

    Raises:
        ValueError: no prompts, max_new_bytes < 0, a sampling option out of range.
    """
    if not prompts:
        raise UserError("prompts must not be empty")
    if max_new_bytes < 0:
        raise UserError(f"max_new_bytes must be >= 0, got {max_new_bytes}")
    config = SamplingConfig(**sampling)
    if max_new_bytes == 0:
        return
    device = model.embeddings.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    texts = [encode(p) for p in prompts]
    cache = model.allocate_cache(len(texts), max(map(len, texts)) + max_new_bytes)
    packed = upload(list(b"".join(texts)), device)
    cu = upload([0, *map(len, texts)], device).cumsum(0).to(torch.int32)
    logits = model.prefill(packed, cu, cache).logits[cu[1:].long() - 1]
    active = list(range(len(texts)))
    for i in range(max_new_bytes):
        chosen = read_bytes(sample(without_bos(logits), config, [texts[n] for n in active], generator))
        if min(chosen) < 0:
            raise RuntimeError("the model's logits are not finite: it cannot be sampled")
        keep = [row for row, byte in enumerate(chosen) if not (stop_at_eos and byte == EOS)]
        active, chosen = [active[row] for row in keep], [chosen[row] for row in keep]
        for n, byte in zip(active, chosen, strict=True):
            texts[n] += bytes([byte])
        if active:
            yield dict(zip(active, chosen, strict=True))
        if not active or i == max_new_bytes - 1:
            return
        logits, _ = model.step(upload(chosen, device), cache, active)


def generate(
    model: HNetForCausalLM, prompts: str | bytes | list[str | bytes], max_new_bytes: int = 256, **options: Any
) -> list[bytes]:
    """The new bytes of each prompt; options as in `stream`."""
    prompts = [prompts] if isinstance(prompts, str | bytes) else prompts
    new = [bytearray() for _ in prompts]
    for step in stream(model, prompts, max_new_bytes=max_new_bytes, **options):
        for n, byte in step.items():
            new[n].append(byte)
    return [bytes(b) for b in new]


def stream_text(
    model: HNetForCausalLM, prompt: str | bytes, *, max_new_bytes: int = 256, **options: Any
) -> Iterator[str]:
    """Pieces of text as they become whole: a UTF-8 character is never cut, bytes that are none become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for step in stream(model, [prompt], max_new_bytes=max_new_bytes, **options):
        if piece := decoder.decode(bytes([step[0]])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
