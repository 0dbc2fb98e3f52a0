"""ChunkLM: a spectral byte model (see `model`), its windows and loss. Generation is in `hnet.generate.chunk_lm`."""

from .config import ChunkLMConfig
from .model import ChunkLM
from .windows import Windows, WindowStream, chunk_lm_loss, eval_windows

__all__ = ["ChunkLM", "ChunkLMConfig", "WindowStream", "Windows", "chunk_lm_loss", "eval_windows"]
