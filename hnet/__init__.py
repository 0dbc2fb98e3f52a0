"""A slim H-Net (arXiv 2507.07955) to run, train and diagnose, on `hnet_kernels`."""

from . import generate as _generate  # noqa: F401  gives the models their `generate`
from .config import BOS, EOS, HNetConfig
from .model.causal_lm import HNetForCausalLM

__all__ = ["BOS", "EOS", "HNetConfig", "HNetForCausalLM"]
