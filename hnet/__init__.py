"""A slim H-Net (arXiv 2507.07955) to run, train and diagnose, on `hnet_kernels`."""

from .config import HNetConfig
from .model.causal_lm import BOS, EOS, HNetForCausalLM

__all__ = ["BOS", "EOS", "HNetConfig", "HNetForCausalLM"]
