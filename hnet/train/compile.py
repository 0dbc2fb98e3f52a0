"""torch.compile of every Block: the dense parts, for any number of positions and sequences, so that nothing recompiles
once every kind of block has run. What goes by the lengths of the sequences stays eager: attention's padding to groups
and the hand-over of Mamba-2's states, whose loops would unroll anew for every pack."""

from __future__ import annotations

from torch import nn

from hnet.model import attention, mamba2
from hnet.model.isotropic import Block

VARIANTS = 64  # of one function: letters x widths x (training, evaluation); PyTorch gives up at 8


def compile_blocks(model: nn.Module) -> None:
    """In place; parameters and their names stay what they are."""
    import torch

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    torch._dynamo.config.optimize_ddp = False  # graphs of one block are small: nothing to cut at DDP's buckets
    for module, name in ((attention, "attention"), (mamba2, "ssd")):
        function = getattr(module, name)
        if not hasattr(function, "_torchdynamo_orig_callable"):
            setattr(module, name, torch.compiler.disable(function))
    for m in model.modules():
        if isinstance(m, Block):
            m.forward = _forward(torch.compile(m.forward, dynamic=True))


def _forward(compiled):
    def forward(x, residual, pack, cache=None, slots=None):
        _ = pack.position, pack.seq_idx  # shared by all blocks: made here, not in each graph
        return compiled(x, residual, pack, cache, slots)

    return forward
