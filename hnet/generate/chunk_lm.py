"""Text from a ChunkLM: a chunk at a time from the chunk head, a byte at a time from the next-byte head.

The work for a new byte never depends on the length of the text. The chunk head reads the last `seq_len` bytes afresh
for every chunk, because its filters look both ways inside a window. *Stateful*, its spectral state has accumulated over
the whole text instead of the window. The next-byte head reads the last `seq_len` bytes afresh for every byte; stateful,
it takes in the prompt in pieces by overlap-save, then one byte a step, and its memory is the whole text: the last
kernel_len - 1 activations and the running mean of every block give exactly what `forward` gives on all of it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hnet.chunk_lm.model import ChunkLM
from hnet.errors import UserError
from hnet.generate.sampling import SamplingConfig, read_bytes, sample


def generate(
    model: ChunkLM,
    prompt: str | bytes,
    *,
    max_new_bytes: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    repetition_window: int = 64,
    seed: int | None = None,
    stateful: bool = False,
) -> Iterator[bytes]:
    """Continue a prompt, yielding new bytes as they come: up to `chunk` of them, or one from the next-byte head.

    Args:
        model: on any device, any dtype, in training or not; its cutoff is used.
        prompt: text (as UTF-8) or bytes, at least one byte.
        max_new_bytes: exactly this many are generated; the last chunk is cut.
        temperature, top_p, repetition_penalty, repetition_window: see SamplingConfig.
        seed: makes the run repeatable. Default: PyTorch's global generator.
        stateful: remember the text beyond the window, see above.

    Raises:
        ValueError: an empty prompt, max_new_bytes < 0, a sampling option out of range.
    """
    text = prompt.encode() if isinstance(prompt, str) else bytes(prompt)
    if not text:
        raise UserError("prompt must hold at least one byte")
    if max_new_bytes < 0:
        raise UserError(f"max_new_bytes must be >= 0, got {max_new_bytes}")
    config = SamplingConfig(temperature, top_p, repetition_penalty, repetition_window)
    generator = None if seed is None else torch.Generator(model.head.weight.device).manual_seed(seed)
    return _generate(model, text, max_new_bytes, config, generator, stateful)


def _generate(
    model: ChunkLM,
    text: bytes,
    left: int,
    config: SamplingConfig,
    generator: torch.Generator | None,
    stateful: bool,
) -> Iterator[bytes]:
    reader = (CausalReader if model.config.causal else ChunkReader)(model, stateful)
    new = recent = text
    while left:
        with torch.inference_mode(), evaluating(model):
            logits = reader.read(new)[:left]
        new = b""
        for row in logits:  # the penalty sees the bytes of this very chunk
            new += bytes(read_bytes(sample(row[None], config, [recent + new], generator)))
        recent = (recent + new)[-max(config.repetition_window, 1) :]
        left -= len(new)
        yield new


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
