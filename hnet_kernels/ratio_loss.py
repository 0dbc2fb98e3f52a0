"""The ratio loss, which pushes a stage towards one boundary in N positions.

    L = N/(N-1) ((N-1) F G + (1-F)(1-G))        F = mean(b)  (constant)        G = mean(p)

It equals 1 for every F when G = 1/N, so a loss near 1 does not prove that the target was reached: report F, G and
bytes per chunk next to it. `route` has already summed p over every sequence, so the loss reads nothing of length T.

Where Triton runs, "batch" and "sequence" are one kernel that also leaves dL/dprob_sum (`triton/ratio_loss.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .library import define, kernels
from .types import Routing
from .validation import check_flag, check_sequences, check_tensor, check_vector, probability_dtype

REDUCTIONS = ("batch", "sequence", "global")


def boundary_fractions(r: Routing, *, reduction: str = "batch", group: Any = None) -> tuple[Tensor, Tensor]:
    """F = mean(b) and G = mean(p): () for "batch" and "global", (N,) for "sequence". G carries a gradient."""
    lengths = (r.cu_seqlens[1:] - r.cu_seqlens[:-1]).to(r.prob_sum.dtype)
    counts = (r.cu_chunks[1:] - r.cu_chunks[:-1]).to(r.prob_sum.dtype)
    if reduction == "sequence":
        return counts / lengths.clamp(min=1), r.prob_sum / lengths.clamp(min=1)
    sums = torch.stack([counts.sum(), _sum(r.prob_sum), lengths.sum()])
    if reduction == "global":
        sums = _AllReduceSum.apply(sums, group)
    return sums[0] / sums[2].clamp(min=1), sums[1] / sums[2].clamp(min=1)


def ratio_loss(
    r: Routing,
    target_ratio: float,
    *,
    reduction: str = "batch",
    straight_through: bool = False,
    group: Any = None,
) -> Tensor:
    """Ratio loss of one stage (H-Net paper, eq. 10): L - 1 = N^2/(N-1) (F - 1/N)(G - 1/N).

    Args:
        r: Routing of the stage.
        target_ratio: N > 1, positions per chunk to aim at; need not be whole.
        reduction: "batch": F and G over all positions of the pack; "sequence": the mean of one loss a sequence;
            "global": F and G over the packs of all processes of `group`. The gradient of "global" is that of the
            *sum* of every process's (equal) loss, so that averaging gradients over processes, as DDP does, is right.
        straight_through: let F carry the gradient of G (b treated as p). Off in the paper.
        group: process group for "global". Default: all processes.

    Returns:
        () fp32.

    Raises:
        TypeError, ValueError: target_ratio <= 1 or an unknown reduction; sums or counts of r of other types or shapes.
        RuntimeError: "global" without torch.distributed being initialised.
    """
    if not isinstance(r, Routing):
        raise TypeError(f"r must be the Routing that hnet_kernels.route returned, got {type(r).__name__}")
    check_tensor("r.prob_sum", r.prob_sum)
    check_sequences(r, "r.prob_sum", r.prob_sum)
    check_vector("r.prob_sum", r.prob_sum, r.cu_seqlens.shape[0] - 1, probability_dtype(r.prob_sum), "r", r.cu_seqlens)
    n = _positions_per_chunk(target_ratio)
    check_flag("straight_through", straight_through)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if reduction == "global" and not torch.distributed.is_initialized():
        raise RuntimeError("reduction='global' needs an initialised torch.distributed process group")
    if reduction != "global" and dispatch.resolve(None, "ratio_loss", r.prob_sum) == "triton":
        sums = (r.prob_sum, r.cu_seqlens, r.cu_chunks)
        return _ratio_loss(*sums, n, reduction == "sequence", straight_through, "triton")[0]
    F, G = boundary_fractions(r, reduction=reduction, group=group)
    F = F.detach()
    if straight_through:
        F = F + (G - G.detach())
    loss = n / (n - 1) * ((n - 1) * F * G + (1 - F) * (1 - G))
    if reduction == "sequence":
        lengths = r.cu_seqlens[1:] - r.cu_seqlens[:-1]
        return _sum(torch.where(lengths > 0, loss, 0)) / (lengths > 0).sum().clamp(min=1)
    return loss


def _sum(x: Tensor) -> Tensor:
    """In fp64, so that empty sequences at the end, which add zeros but may change the order, do not change the bits."""
    return x.double().sum().to(x.dtype)


def _positions_per_chunk(target_ratio: float) -> float:
    try:
        n = float(target_ratio)
    except (TypeError, ValueError, RuntimeError) as e:
        raise TypeError(f"target_ratio must be a number above 1, got {target_ratio!r}") from e
    if not 1 < n < math.inf:
        raise ValueError(f"target_ratio must be above 1 (positions per chunk) and finite, got {target_ratio!r}")
    return n


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes, forward and backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.clone()
        torch.distributed.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


# --- autograd, schema and shapes of the fused form ----------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or the other output's would be zeros, made by a launch
    ctx.save_for_backward(output[1])


def _backward(ctx, dloss, _):
    return dloss * ctx.saved_tensors[0], None, None, None, None, None, None


_ratio_loss = define(
    "ratio_loss(Tensor prob_sum, Tensor cu_seqlens, Tensor cu_chunks, float target_ratio, bool by_sequence, "
    "bool straight_through, str backend) -> (Tensor, Tensor)",
    lambda *args: kernels(args[-1], "ratio_loss").ratio_loss(*args[:-1]),
    lambda prob_sum, *_: (prob_sum.new_empty(()), torch.empty_like(prob_sum)),
    _setup_context,
    _backward,
)
