"""ChunkLM: a spectral byte model (see `model`), its windows and loss, and its generation."""

from .config import ChunkLMConfig
from .generate import generate, generate_text
from .model import ChunkLM
from .windows import Windows, WindowStream, chunk_lm_loss, eval_windows

__all__ = [
    "ChunkLM",
    "ChunkLMConfig",
    "WindowStream",
    "Windows",
    "chunk_lm_loss",
    "eval_windows",
    "generate",
    "generate_text",
]
