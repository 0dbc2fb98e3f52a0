"""Sampling text from a model."""

from .engine import generate, stream
from .sampling import SamplingConfig

__all__ = ["SamplingConfig", "generate", "stream"]
