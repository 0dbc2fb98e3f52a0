"""The shape of a ChunkLM and its checks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from hnet.config.keys import from_json
from hnet.errors import UserError

from .spectral import fft_length

MODEL_TYPE = "chunk_lm"


@dataclass
class ChunkLMConfig:
    """Architecture of a ChunkLM.

    seq_len: longest window, bytes; with kernel_len it sets the length of the transform. chunk: bytes predicted at once.
    causal: a next-byte head at every position instead of the chunk head (chunk is then not used by the model).
    spectral_state: add the leaky rotating accumulator over chunks, state_dim channels wide (chunk head only).
    cutoff: number of frequency bins passed, None: all of them.
    """

    d_model: int = 512
    n_layers: int = 6
    seq_len: int = 1024
    kernel_len: int = 128
    chunk: int = 16
    expand: int = 2  # FFN width over d_model
    dropout: float = 0.1
    vocab_size: int = 256
    causal: bool = False
    spectral_state: bool = False
    state_dim: int = 64
    cutoff: int | None = None
    tie_embeddings: ClassVar[bool] = False  # which hnet.model.checkpoint_format asks

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "seq_len", "kernel_len", "chunk", "expand", "state_dim"):
            _integer(name, getattr(self, name), 1)
        if self.vocab_size != 256:
            raise UserError(f"vocab_size must be 256, one symbol for every byte, got {self.vocab_size!r}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout!r}")
        for name in ("causal", "spectral_state"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.kernel_len > self.seq_len:
            raise UserError(f"kernel_len must be at most seq_len ({self.seq_len}), got {self.kernel_len}")
        if self.chunk > self.seq_len:
            raise UserError(f"chunk must be at most seq_len ({self.seq_len}), got {self.chunk}")
        if self.spectral_state and self.causal:
            raise UserError("spectral_state belongs to the chunk head: it must be false when causal is true")
        if self.cutoff is not None:
            _integer("cutoff", self.cutoff, 1, self.bins)

    @property
    def n_fft(self) -> int:
        """Length of the transform."""
        return fft_length(self.seq_len, self.kernel_len)

    @property
    def bins(self) -> int:
        """Frequency bins; a cutoff of `bins` is full bandwidth."""
        return self.n_fft // 2 + 1

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": MODEL_TYPE, **asdict(self)}

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @staticmethod
    def from_dict(d: dict[str, Any]) -> ChunkLMConfig:
        """A config from `to_dict`'s form; what is left out has its default.

        Raises:
            ValueError: not a ChunkLM's config, an unknown key, a value out of range.
        """
        if not isinstance(d, dict):
            raise UserError(f"config must be a JSON object, got {type(d).__name__}")
        d = dict(d)
        if (kind := d.pop("model_type", MODEL_TYPE)) != MODEL_TYPE:
            raise UserError(f"config: model_type must be {MODEL_TYPE!r}, got {kind!r}")
        known = [f.name for f in fields(ChunkLMConfig)]
        for key in d:
            if key not in known:
                raise UserError(f"config: unknown key {key!r}; known are {', '.join(known)}")
        return ChunkLMConfig(**d)

    @staticmethod
    def from_json(path: str | Path) -> ChunkLMConfig:
        return from_json(path, ChunkLMConfig.from_dict)


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        wanted = f">= {low}" if high is None else f"from {low} to {high}"
        raise UserError(f"{name} must be an integer {wanted}, got {value!r}")
