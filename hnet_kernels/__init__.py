"""Fused ops for the dynamic chunking of H-Nets (arXiv 2507.07955): route, pool, dechunk, ema, ratio loss;
and for a CPU what stands between the matrix products of a layer: add_rms_norm, attention, gated_conv,
swiglu, and after the last cross_entropy; and for a GPU mamba2, the same for a Mamba-2 layer.

Layout is packed: N sequences end to end in (T, D) rows, `cu_seqlens` int32 (N+1,) from 0 to T. Sequences never see each
other. `python -m hnet_kernels.info` says which backends work here.
"""

from .attention import attention
from .cross_entropy import cross_entropy
from .dechunk import dechunk, dechunk_step
from .dispatch import backend
from .ema import ema
from .gated_conv import gated_conv
from .mamba2 import mamba2
from .native import keep_memory
from .pool import pool
from .ratio_loss import boundary_fractions, ratio_loss
from .rms_norm import add_rms_norm
from .routing import route, route_step
from .swiglu import swiglu
from .types import Routing

__version__ = "0.1.0"
__all__ = [
    "Routing",
    "add_rms_norm",
    "attention",
    "backend",
    "boundary_fractions",
    "cross_entropy",
    "dechunk",
    "dechunk_step",
    "ema",
    "gated_conv",
    "keep_memory",
    "mamba2",
    "pool",
    "ratio_loss",
    "route",
    "route_step",
    "swiglu",
]
