"""Texts of a list of prompts, or one as it is written: thin callers of `Engine`."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

from hnet.errors import RunFailed, UserError
from hnet.model.causal_lm import HNetForCausalLM

from .config import SamplingConfig
from .engine import Engine, as_bytes
from .request import SEEDS, checked_seed


def stream(
    model: HNetForCausalLM,
    prompts: list[str | bytes],
    *,
    max_new_bytes: int = 256,
    seed: int | None = None,
    stop_at_eos: bool = True,
    stop: str | bytes | Sequence[str | bytes] = (),
    **sampling: Any,
) -> Iterator[dict[int, int]]:
    """Generate for a batch of prompts of any lengths, yielding {prompt index: new byte} after every step.

    BOS, which only ever begins a text, is never generated, whatever probability the model gives it. Bytes that could
    begin a stop string come once they cannot; several of one prompt then come one after the other.

    Args:
        model: on any device, any dtype.
        prompts: text or bytes; BOS is put before each.
        max_new_bytes: at most this many each.
        seed: makes the run repeatable: prompt n is given seed + n. Default: PyTorch's global generator.
        stop_at_eos: end a sequence at EOS (which is not yielded).
        stop: texts or bytes that end a sequence (and are not yielded).
        **sampling: fields of SamplingConfig: temperature, top_p, top_k, ...

    Raises:
        ValueError: no prompts, max_new_bytes < 0, a sampling option out of range.
        RuntimeError: the model's logits are not finite.
    """
    if not prompts:
        raise UserError("prompts must not be empty")
    config = SamplingConfig(**sampling)
    first = checked_seed(seed)
    texts = [as_bytes(p) for p in prompts]
    engine = Engine(model, slots=len(texts), max_length=1 + max(map(len, texts)) + max(max_new_bytes, 0))
    requests = [
        engine.submit(
            text, config, max_new_bytes=max_new_bytes, seed=(first + n) % SEEDS, stop=stop, stop_at_eos=stop_at_eos
        )
        for n, text in enumerate(texts)
    ]
    number = {id(request): n for n, request in enumerate(requests)}
    while engine.busy:
        new = {}
        for request in engine.step():
            if request.finish == "error":
                raise RunFailed(request.error)
            if taken := request.take():
                new[number[id(request)]] = taken
        for i in range(max(map(len, new.values()), default=0)):
            yield {n: text[i] for n, text in new.items() if i < len(text)}


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
