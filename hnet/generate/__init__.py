"""Sampling text from a model; gives both models their `generate`."""

from hnet.chunk_lm.model import ChunkLM
from hnet.model.causal_lm import HNetForCausalLM

from . import chunk_lm
from .engine import generate, stream
from .sampling import SamplingConfig

HNetForCausalLM.generate = generate
ChunkLM.generate = chunk_lm.generate_bytes

__all__ = ["SamplingConfig", "generate", "stream"]
