"""torch.compile of every Block: the dense parts, for any number of positions and sequences, so that nothing recompiles
once every kind of block has run. Blocks that call mamba-ssm stay eager, which nobody has compiled, and two parts of the
others. Attention pads sequences to groups by their lengths, which would be traced anew for every pack. And of Mamba-2's
chunked scan, PyTorch 2.13 makes CPU code that writes past its buffers (heap corruption in the backward, dynamic
shapes)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import nn

from hnet.device import World
from hnet.model import attention, mamba2
from hnet.model.isotropic import Block
from hnet_kernels.dispatch import triton_error

from .config import TrainConfig

VARIANTS = 64  # of one function: letters x widths x (training, evaluation); PyTorch gives up at 8


def compile_wanted(config: TrainConfig, device: torch.device, world: World) -> bool:
    """Whether to. "auto": on a GPU where Triton is, which the compiler's kernels are written in; not where fsdp would
    have to send compiled blocks in fp32."""
    if config.compile == "auto":
        spread = config.parallel == "fsdp" and world.size > 1
        return device.type == "cuda" and triton_error() is None and not spread
    return bool(config.compile)


def compile_blocks(model: nn.Module) -> None:
    """In place; parameters and their names stay what they are. Decoding with a cache stays eager."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
    dynamo.optimize_ddp = False  # graphs of one block are small: nothing to cut at DDP's buckets
    for module, name in ((attention, "attention"), (attention, "fused"), (mamba2, "ssd")):
        function = getattr(module, name)
        if not hasattr(function, "_torchdynamo_orig_callable"):
            setattr(module, name, torch.compiler.disable(function))
    foreign = importlib.util.find_spec("mamba_ssm") is not None
    blocks: list[nn.Module] = [m for m in model.modules() if isinstance(m, Block)]
    for block in blocks:
        if foreign and isinstance(block.mixer, mamba2.Mamba2):
            continue
        rotary_dim = getattr(block.mixer, "rotary_dim", 0)
        block.forward = _forward(block.forward, rotary_dim)


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
