"""ChunkLM: a byte model whose positions mix through one learnt filter a block.

A block, with u = LayerNorm(x):

    y = irfft(rfft(pad(u)) * rfft(k) * gain_c * sigmoid(g_f) * sigmoid(W mean_t(u)) * mask_cutoff)[:T]
    x = x + dropout(y);   x = x + dropout(FFN(LayerNorm(x)))

gain_c and the content gate sigmoid(W mean_t(u)) do not depend on frequency, so they are applied after the filter.

Two heads. The *chunk head* reads the last hidden state and predicts the next `chunk` bytes at once. With `causal=True`
a *next-byte head* reads every position: all gains over frequency act on the kernel before it is cut to its causal taps,
and the content gate sees a running mean. Hidden states are time-major, (T, B, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hnet.errors import UserError
from hnet.model.checkpoint_format import load_state, save_pretrained

from . import spectral
from .causal import causal_filter, running_mean
from .checkpoint import read_checkpoint
from .config import ChunkLMConfig
from .dropout import add_dropped
from .state import SpectralState


@dataclass
class CausalState:
    """What a causal ChunkLM remembers of a text: its size does not depend on the text's length.

    count: positions seen. Of each block: histories (kernel_len - 1, B D), means (B D,), taps (kernel_len,).
    """

    taps: list[Tensor]
    count: int = 0
    histories: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)


class Block(nn.Module):
    def __init__(self, c: ChunkLMConfig) -> None:
        super().__init__()
        d = c.d_model
        self.n_fft, self.memory, self.dropout = c.n_fft, c.seq_len, c.dropout
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        decay = torch.exp(-8 / c.kernel_len * torch.arange(c.kernel_len))  # recent bytes first; unit energy
        self.kernel = nn.Parameter(torch.randn(c.kernel_len) * decay / decay.norm())
        self.gain = nn.Parameter(torch.ones(d))
        self.freq_gate = nn.Parameter(torch.full((c.bins,), 2.0))  # logits
        self.content_gate = nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, c.expand * d), nn.Linear(c.expand * d, d)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return add_dropped(x, y, self.dropout if self.training else 0.0)

    def _ffn(self, x: Tensor) -> Tensor:
        return self._add(x, self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def _gate(self, mean: Tensor) -> Tensor:
        """gain_c sigmoid(W mean + b)"""
        return self.gain * torch.sigmoid(self.content_gate(mean))

    def response(self, cutoff: int) -> Tensor:
        return spectral.response(self.kernel, self.freq_gate, cutoff, self.n_fft)

    def taps(self, cutoff: int) -> Tensor:
        return spectral.causal_taps(self.kernel, self.freq_gate, cutoff, self.n_fft)

    def forward(self, x: Tensor, cutoff: int) -> Tensor:
        """(T, B, D) -> (T, B, D)"""
        u = self.norm1(x)
        y = spectral.spectral_filter(u.flatten(1), self.response(cutoff), self.n_fft).view(x.shape)
        return self._ffn(self._add(x, y * self._gate(u.mean(0))))

    def last(self, x: Tensor, cutoff: int) -> Tensor:
        """(T, B, D) -> (B, D): the last position of `forward`, nothing else computed."""
        u = self.norm1(x)
        y = spectral.filter_last(u.flatten(1), self.response(cutoff), self.n_fft).view(x.shape[1:])
        return self._ffn(self._add(x[-1], y * self._gate(u.mean(0))))

    def causal(self, x: Tensor, taps: Tensor, state: CausalState | None, index: int) -> Tensor:
        """(T, B, D) -> (T, B, D), no output before the input it depends on; the state moves on."""
        u = self.norm1(x)
        flat, kept = u.flatten(1), len(taps) - 1
        history = mean = None
        if state is not None and state.count:
            history, mean = state.histories[index], state.means[index]
        y = causal_filter(flat, taps, history).view(x.shape)
        means = running_mean(flat, self.memory, mean, state.count if state else 0)
        if state is not None:
            before = flat.new_zeros(kept, flat.shape[1]) if history is None else history
            state.histories[index], state.means[index] = torch.cat([before, flat])[len(flat) :], means[-1]
        return self._ffn(self._add(x, y * self._gate(means.view(x.shape).to(u.dtype))))


class ChunkLM(nn.Module):
    """The model. Its cutoff is a plain integer, kept in `config.cutoff`: set it with `set_cutoff` or for one call."""

    generate: Callable[..., bytes]  # `hnet.generate.chunk_lm.generate_bytes`, put here by `hnet.generate`

    def __init__(self, config: ChunkLMConfig, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config = replace(config)  # set_cutoff writes into it
        d = config.d_model
        self.embeddings = nn.Embedding(config.vocab_size, d)
        self.blocks = cast(list[Block], nn.ModuleList(Block(config) for _ in range(config.n_layers)))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.vocab_size * (1 if config.causal else config.chunk))
        self.state: SpectralState | None = None
        if config.spectral_state:
            self.state = SpectralState(config.chunk, config.state_dim, d)
        nn.init.normal_(self.embeddings.weight)  # as large as what a block adds: the last byte must stay legible
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        if dtype is not None:
            self.to(dtype)

    @property
    def bins(self) -> int:
        return self.config.bins

    @property
    def cutoff(self) -> int:
        return self.config.cutoff or self.bins

    def set_cutoff(self, cutoff: int | None) -> None:
        """Pass the lowest `cutoff` bins whole; None: all.

        Raises:
            ValueError: cutoff outside 1 .. bins.
        """
        self.config.cutoff = None if cutoff is None else self._cutoff(cutoff)

    def _cutoff(self, cutoff: int | None) -> int:
        if cutoff is None:
            return self.cutoff
        if isinstance(cutoff, bool) or not isinstance(cutoff, int) or not 1 <= cutoff <= self.bins:
            raise UserError(f"cutoff must be an integer from 1 to {self.bins}, the bins of this model, got {cutoff!r}")
        return cutoff

    def forward(self, input_ids: Tensor, cutoff: int | None = None) -> Tensor:
        """Logits of what follows.

        Args:
            input_ids: (B, T) integers 0 .. 255; T from 1 to seq_len, and any T >= 1 with the causal head.
            cutoff: for this call. Default: the model's.

        Returns:
            chunk head: (B, chunk, 256), of the `chunk` bytes after the window.
            causal head: (B, T, 256), of the byte after each position.

        Raises:
            ValueError: input_ids of the wrong shape, cutoff out of range.
        """
        if self.config.causal:
            return self._causal(input_ids, self._cutoff(cutoff), None)
        memory = None
        if self.state is not None:
            memory = self.state.states(self._check(input_ids))[:, -1]
        return self._chunk(input_ids, self._cutoff(cutoff), memory)

    # --- chunk head -----------------------------------------------------------------------------------------------

    def _chunk(self, input_ids: Tensor, cutoff: int, memory: Tensor | None) -> Tensor:
        x = self.embeddings(self._check(input_ids).mT)
        for block in self.blocks[:-1]:
            x = block(x, cutoff)
        x = self.norm(self.blocks[-1].last(x, cutoff))
        if self.state is not None and memory is not None:
            x = x + self.state(memory)
        return self.head(x).unflatten(-1, (self.config.chunk, self.config.vocab_size))

    def predict(self, window: Tensor, new_ids: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Chunk head with a spectral state that outlives the window.

        Args:
            window: (B, T), the last bytes of the text. new_ids: (B, N), those the state has not seen, N >= 0.
            memory: state before new_ids, None at the start of a text.

        Returns:
            logits (B, chunk, 256), state after new_ids (None without spectral state)
        """
        if self.state is not None and new_ids.shape[1]:
            memory = self.state.states(new_ids, memory)[:, -1]
        return self._chunk(window, self.cutoff, memory), memory

    # --- next-byte head -------------------------------------------------------------------------------------------

    def causal_state(self) -> CausalState:
        """The state at the start of a text, for `extend`, at the model's present weights and cutoff."""
        if not self.config.causal:
            raise ValueError("causal_state needs a model with causal=True: the chunk head reads whole windows")
        empty = [torch.empty(0)] * len(self.blocks)
        return CausalState([b.taps(self.cutoff).detach() for b in self.blocks], 0, [*empty], [*empty])

    def extend(self, input_ids: Tensor, state: CausalState) -> Tensor:
        """Logits (B, T, 256) for the next T bytes of a text, equal to those `forward` gives on the text as a whole.

        The state moves on; time and memory depend on T, not on what went before.
        """
        return self._causal(input_ids, self.cutoff, state)

    def _causal(self, input_ids: Tensor, cutoff: int, state: CausalState | None) -> Tensor:
        x = self.embeddings(self._check(input_ids).mT)
        for i, block in enumerate(self.blocks):
            x = block.causal(x, state.taps[i] if state else block.taps(cutoff), state, i)
        if state is not None:
            state.count += x.shape[0]
        return self.head(self.norm(x)).transpose(0, 1)

    def _check(self, input_ids: Tensor) -> Tensor:
        limit = None if self.config.causal else self.config.seq_len
        shape = tuple(input_ids.shape)
        if len(shape) != 2 or shape[1] < 1 or (limit and shape[1] > limit):
            raise ValueError(f"input_ids must be (batch, 1 .. {limit or 'any'}), got {shape}")
        return input_ids.long()

    def current_config(self) -> ChunkLMConfig:
        """The config with the cutoff as it is now."""
        return self.config

    # --- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json (with the cutoff) and model.safetensors into `directory`."""
        save_pretrained(self, directory)

    @staticmethod
    def from_pretrained(
        path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
    ) -> ChunkLM:
        """A model from a directory with config.json and model.safetensors, from that .safetensors file, or from the
        one file of `hnet train-chunk-lm --ckpt`.

        Raises:
            FileNotFoundError: no such path, or a file of the two is not there.
            ValueError: a damaged file, the config of another model; a missing, unknown or misshapen tensor (named).
        """
        config, state = read_checkpoint(Path(path))
        model = ChunkLM(config, dtype=dtype)
        load_state(model, state, str(path))
        return model.to(device)
