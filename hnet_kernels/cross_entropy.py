"""Cross entropy of logits with targets, and how unsure the logits are.

    loss    = log sum_v e^x_v - x_target
    entropy = -sum_v p_v log p_v    p = softmax(x)

Public function `cross_entropy`; below it the autograd formula and the schema of the op. Plain PyTorch in
`reference.py`, which also runs on a GPU; kernel in `csrc/cpu/cross_entropy.cpp`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, reference
from .library import define, kernels
from .validation import check_matrix, check_vector


class CrossEntropy(NamedTuple):
    loss: Tensor  # (T,) fp32, nats
    entropy: Tensor | None  # (T,) fp32, nats, of what is predicted; no gradient flows through it. None: not asked for


def cross_entropy(
    logits: Tensor, targets: Tensor, *, with_entropy: bool = False, backend: str | None = None
) -> CrossEntropy:
    """Cross entropy of each row of logits with its target, without an fp32 copy of the logits.

    Args:
        logits: (T, V) fp32|bf16|fp16 (fp64 with the reference), computed in fp32.
        targets: (T,) int64 in [0, V), or -100: a row without a loss, which is 0 and has no gradient.
        with_entropy: also the entropy of the softmax of each row, the loss to be expected: a constant.
        backend: as in `route`; the op has kernels for a CPU, elsewhere the reference runs.

    Returns:
        (loss, entropy), both (T,) fp32 in nats; the gradient of logits has their dtype.

    Raises:
        TypeError, ValueError: logits are not (T, V) floating point; targets are not (T,) int64 on their device, or,
            on a CPU, one is neither in [0, V) nor -100.
        RuntimeError: the backend named cannot run here.

    Equivalent to:
        torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    """
    check_matrix("logits", logits)
    check_vector("targets", targets, logits.shape[0], torch.int64, "logits", logits)
    chosen = dispatch.resolve(backend, "cross_entropy", logits)
    if chosen == "reference":
        return CrossEntropy(*reference.cross_entropy(logits, targets, with_entropy))
    loss, entropy, _ = _cross_entropy(logits, targets, chosen)
    return CrossEntropy(loss, entropy if with_entropy else None)


# --- autograd -----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    logits, targets, ctx.chosen = inputs
    _, entropy, norm = output
    ctx.mark_non_differentiable(entropy, norm)
    ctx.save_for_backward(logits, targets, norm)


def _backward(ctx, dloss, *_):
    return _cross_entropy_bwd(dloss, *ctx.saved_tensors, ctx.chosen), None, None


# --- schema and shapes --------------------------------------------------------------------------------------------

_cross_entropy = define(
    "cross_entropy(Tensor logits, Tensor targets, str backend) -> (Tensor, Tensor, Tensor)",
    lambda logits, targets, backend: kernels(backend, "cross_entropy").cross_entropy(logits, targets),
    lambda logits, *_: tuple(logits.new_empty(logits.shape[0], *n, dtype=torch.float32) for n in ((), (), (2,))),
    _setup_context,
    _backward,
)
_cross_entropy_bwd = define(
    "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor norm, str backend) -> Tensor",
    lambda dloss, logits, targets, norm, backend: kernels(backend, "cross_entropy").cross_entropy_bwd(
        dloss, logits, targets, norm
    ),
    lambda dloss, logits, *_: logits.new_empty(logits.shape),
)
