"""The activation of a SwiGLU feed-forward layer.

    out = silu(gate) * y    y, gate = x.chunk(2, dim=1)

Public function `swiglu`; below it the autograd formula and the schema of the op. Plain PyTorch in `reference.py`, which
also runs on a GPU; kernel in `csrc/cpu/swiglu.cpp`.
"""

from __future__ import annotations

from torch import Tensor

from . import dispatch, reference
from .library import define, kernels
from .validation import check_matrix


def swiglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * y with y, gate = x.chunk(2, dim=1) (SwiGLU, arXiv 2002.05202).

    Args:
        x: (T, 2 D) fp32|bf16|fp16 (fp64 with the reference): y, then its gate.
        backend: as in `route`; the op has kernels for a CPU, elsewhere the reference runs.

    Returns:
        (T, D), dtype of x, computed in fp32.

    Raises:
        TypeError, ValueError: x is not (T, 2 D) floating point.
        RuntimeError: the backend named cannot run here.

    Equivalent to:
        torch.nn.functional.silu(gate) * y
    """
    check_matrix("x", x)
    if x.shape[1] % 2:
        raise ValueError(f"x must be y and its gate side by side, (T, 2 D), got shape {tuple(x.shape)}")
    chosen = dispatch.resolve(backend, "swiglu", x)
    if chosen == "reference":
        return reference.swiglu(x)
    return _swiglu(x, chosen)


# --- autograd -----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.chosen = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dout):
    return _swiglu_bwd(dout, *ctx.saved_tensors, ctx.chosen), None


# --- schema and shapes --------------------------------------------------------------------------------------------

_swiglu = define(
    "swiglu(Tensor x, str backend) -> Tensor",
    lambda x, backend: kernels(backend, "swiglu").swiglu(x),
    lambda x, _: x.new_empty(x.shape[0], x.shape[1] // 2),
    _setup_context,
    _backward,
)
_swiglu_bwd = define(
    "swiglu_bwd(Tensor dout, Tensor x, str backend) -> Tensor",
    lambda dout, x, backend: kernels(backend, "swiglu").swiglu_bwd(dout, x),
    lambda dout, x, _: x.new_empty(x.shape),
)
