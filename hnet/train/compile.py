"""torch.compile of every Block: the dense parts, for any number of positions and sequences, so that nothing recompiles
once every kind of block has run. Two parts stay eager. Attention pads sequences to groups by their lengths, which would
be traced anew for every pack. And of Mamba-2's chunked scan, PyTorch 2.13 makes CPU code that writes past its buffers
(heap corruption in the backward, dynamic shapes)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hnet.model import attention, mamba2
from hnet.model.isotropic import Block
from hnet_kernels.dispatch import triton_error

VARIANTS = 64  # of one function: letters x widths x (training, evaluation); PyTorch gives up at 8


def compile_wanted(setting: bool | str, device: torch.device) -> bool:
    """Whether to, for true, false or "auto": on a GPU where Triton is, which the compiler's kernels are written in."""
    if setting == "auto":
        return device.type == "cuda" and triton_error() is None
    return bool(setting)


def compile_blocks(model: nn.Module) -> None:
    """In place; parameters and their names stay what they are. Decoding with a cache stays eager."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
    dynamo.optimize_ddp = False  # graphs of one block are small: nothing to cut at DDP's buckets
    for module, name in ((attention, "attention"), (mamba2, "ssd")):
        function = getattr(module, name)
        if not hasattr(function, "_torchdynamo_orig_callable"):
            setattr(module, name, torch.compiler.disable(function))
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        rotary_dim = getattr(block.mixer, "rotary_dim", 0)
        block.forward = _forward(block.forward, rotary_dim)  # type: ignore[method-assign]


def _forward(eager: Callable, rotary_dim: int) -> Callable:
    compiled = torch.compile(eager, dynamic=True)

    def forward(x, residual, pack, cache=None, slots=None):
        if cache is not None:
            return eager(x, residual, pack, cache, slots)
        _ = pack.position, pack.seq_idx  # shared by all blocks of a stage: made here, not within a graph
        if rotary_dim:
            pack.rotary(rotary_dim)
        return compiled(x, residual, pack)

    return forward
