"""Sampling text from a model; gives both models their `generate`."""

from hnet.chunk_lm.model import ChunkLM
from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.int8 import quantize

from . import chunk_lm
from .config import SamplingConfig
from .engine import Engine
from .request import Request
from .texts import generate, stream

HNetForCausalLM.generate = generate
ChunkLM.generate = chunk_lm.generate_bytes

__all__ = ["Engine", "Request", "SamplingConfig", "generate", "quantize", "stream"]
