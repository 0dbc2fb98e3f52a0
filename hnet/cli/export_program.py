"""`hnet export --format pt2`: the forward pass as one program of torch.export, which needs nothing of hnet to run.

Its shapes are static: one text of `length` bytes, and with a budget of as many chunks as bytes (`max_chunks`) no chunk
is ever dropped, so that it computes what the model does.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import hnet_kernels as hk
from hnet.errors import RunFailed
from hnet.model.causal_lm import HNetForCausalLM

PROGRAM = "model.pt2"


class Forward(nn.Module):
    """(1, length) int64 -> logits (1, length, vocab) and of each stage with routing, outermost first, p of a boundary
    (length,); of an inner stage as many as the stage outside it has chunks, then zeros or rubbish."""

    def __init__(self, model: HNetForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        budget = [input_ids.shape[1]] * (self.model.config.num_stages - 1)
        out = self.model(input_ids, max_chunks=budget)
        return out.logits, *(r.boundary_prob for r in out.routing)


@torch.no_grad()
def write_program(model: HNetForCausalLM, out: Path, length: int) -> Path:
    """`out`/model.pt2, made of PyTorch's own operators.

    Raises:
        RunFailed: read again it computes something else, be it in one bit.
    """
    forward, path = Forward(model).eval(), out / PROGRAM
    with hk.backend("reference"):
        program = torch.export.export(forward, (torch.zeros(1, length, dtype=torch.int64),))
        torch.export.save(program, path)
        again = torch.export.load(path).module()
        for seed in range(3):
            ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))
            ids %= model.config.vocab_size
            pairs = zip(again(ids), forward(ids), strict=True)
            if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
                raise RunFailed(f"{path} does not compute what the model does: do not use it, and report this")
    return path
