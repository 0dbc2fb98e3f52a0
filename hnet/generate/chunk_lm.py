"""Text from a ChunkLM: a chunk at a time from the chunk head, a byte at a time from the next-byte head.

The work for a new byte never depends on the length of the text. The chunk head reads the last `seq_len` bytes afresh
for every chunk, because its filters look both ways inside a window. *Stateful*, its spectral state has accumulated over
the whole text instead of the window. The next-byte head reads the last `seq_len` bytes afresh for every byte; stateful,
it takes in the prompt in pieces by overlap-save, then one byte a step, and its memory is the whole text: the last
kernel_len - 1 activations and the running mean of every block give exactly what `forward` gives on all of it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hnet.chunk_lm.model import ChunkLM
from hnet.errors import RunFailed, UserError

from .config import SamplingConfig
from .engine import as_bytes
from .history import History
from .request import checked_seed
from .sampling import NOT_FINITE, Sampler
from .stops import StopStrings, checked


def generate(
    model: ChunkLM,
    prompt: str | bytes,
    *,
    max_new_bytes: int = 256,
    seed: int | None = None,
    stateful: bool = False,
    stop: str | bytes | Sequence[str | bytes] = (),
    **sampling: Any,
) -> Iterator[bytes]:
    """Continue a prompt, yielding new bytes as they come: up to `chunk` of them, or one from the next-byte head.

    Args:
        model: on any device, any dtype, in training or not; its cutoff is used.
        prompt: text (as UTF-8) or bytes, at least one byte.
        max_new_bytes: exactly this many are generated, unless a stop string or an unfinished character ends the text
            before; the last chunk is cut.
        seed: makes the run repeatable. Default: PyTorch's global generator.
        stateful: remember the text beyond the window, see above.
        stop: texts or bytes that end the text and are no part of it.
        **sampling: fields of SamplingConfig: temperature, top_p, repetition_penalty, ...; not logprobs.

    Raises:
        ValueError: an empty prompt, max_new_bytes < 0, a sampling option out of range.
        RuntimeError: while generating: the model's logits are not finite.
    """
    text = as_bytes(prompt)
    if not text:
        raise UserError("prompt must hold at least one byte")
    if max_new_bytes < 0:
        raise UserError(f"max_new_bytes must be >= 0, got {max_new_bytes}")
    config = SamplingConfig(**sampling)
    history = History(text, config, seed=checked_seed(seed), limit=max_new_bytes, bos=True, eos=False)
    return _generate(model, history, max_new_bytes, StopStrings(checked(stop, config.valid_utf8)), stateful)


def _generate(model: ChunkLM, history: History, limit: int, stops: StopStrings, stateful: bool) -> Iterator[bytes]:
    reader = (CausalReader if model.config.causal else ChunkReader)(model, stateful)
    sampler = Sampler(256, model.head.weight.device)
    read = 0
    while history.new < limit and not history.stuck:
        new = bytes(history.text[read:])
        read = len(history.text)
        with torch.inference_mode(), evaluating(model):
            logits = reader.read(new)[: limit - history.new]
        shown, stopped = b"", False
        for row in logits:  # what looks at the past sees the bytes of this very chunk
            (choice,) = sampler(row[None], [history])
            if choice.byte < 0:
                raise RunFailed(NOT_FINITE)
            history.append(choice.byte)
            piece, stopped = stops.push(choice.byte)
            shown += piece
            if stopped:
                break
        if not stopped and history.new == limit:
            shown += stops.flush()
        if shown:
            yield shown
        if stopped:
            return


@contextmanager
def evaluating(model: ChunkLM) -> Iterator[None]:
    """Evaluation mode for a moment: a model that is sampled while it trains goes on training."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def generate_bytes(model: ChunkLM, prompt: str | bytes, **options: Any) -> bytes:
    """The new bytes; options as in `generate`."""
    return b"".join(generate(model, prompt, **options))


def generate_text(model: ChunkLM, prompt: str | bytes, **options: Any) -> Iterator[str]:
    """Pieces of text as they become whole: a UTF-8 character is never cut, bytes that are none become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for new in generate(model, prompt, **options):
        if piece := decoder.decode(new):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


class ChunkReader:
    """Reads a text piece by piece; logits of the chunk after it."""

    def __init__(self, model: ChunkLM, stateful: bool) -> None:
        self.model, self.stateful = model, stateful
        self.window = torch.empty(1, 0, dtype=torch.long, device=model.head.weight.device)
        self.memory: Tensor | None = None

    def read(self, new: bytes) -> Tensor:
        """(chunk, 256)"""
        ids = torch.tensor([list(new)], device=self.window.device)
        self.window = torch.cat([self.window, ids], 1)[:, -self.model.config.seq_len :]
        if not self.stateful:
            return self.model(self.window)[0]
        logits, self.memory = self.model.predict(self.window, ids, self.memory)
        return logits[0]


class CausalReader:
    """Reads a text piece by piece; logits of the byte after it."""

    def __init__(self, model: ChunkLM, stateful: bool) -> None:
        self.model, self.state = model, model.causal_state() if stateful else None
        self.window = torch.empty(1, 0, dtype=torch.long, device=model.head.weight.device)

    def read(self, new: bytes) -> Tensor:
        """(1, 256)"""
        ids, size = torch.tensor([list(new)], device=self.window.device), self.model.config.seq_len
        if self.state is None:
            self.window = torch.cat([self.window, ids], 1)[:, -size:]
            return self.model(self.window)[0, -1:]
        for piece in ids.split(size, 1):
            logits = self.model.extend(piece, self.state)
        return logits[0, -1:]
