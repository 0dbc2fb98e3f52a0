"""add_rms_norm, gated_conv, swiglu, attention and cross_entropy as the laptop model has them: 16,384 positions in
sequences of 512.

Counted bytes: what each must read and write once (docs/kernels.md); of attention no bytes, it is bound by arithmetic.
"""

import pytest
import torch

import hnet_kernels as hk
from hnet.model.pack import Pack

from . import plain_layers
from .harness import copy_of
from .test_route import DIRECTIONS, DTYPES

D, K, HEADS, WINDOW, EPS = 128, 4, 4, 127, 1e-5


def inputs(dtype, *shape):
    return [torch.randn(*shape).to(dtype) for _ in range(2)]


def norm_of(T, dtype, cu):
    """inputs, parameters, ours, plain, bytes forward and backward"""
    residual, weight = torch.randn(T, D).requires_grad_(), torch.ones(D).requires_grad_()
    size = dtype.itemsize * T * D
    return (
        inputs(dtype, T, D), (residual, weight),
        lambda x: hk.add_rms_norm(x, residual, weight, EPS, backend="cpu"),
        lambda x: plain_layers.add_rms_norm(x, residual, weight, EPS), (2 * size + 8 * T * D, 2 * size + 12 * T * D),
    )  # fmt: skip


def conv_of(T, dtype, cu):
    weight, bias = torch.randn(D, K).requires_grad_(), torch.randn(D).requires_grad_()
    size = dtype.itemsize * T * D
    return (
        inputs(dtype, T, 2 * D), (weight, bias), lambda x: (hk.gated_conv(x, weight, bias, cu, backend="cpu"),),
        lambda x: (plain_layers.gated_conv(x, weight, bias, cu),), (3 * size, 5 * size),
    )  # fmt: skip


def swiglu_of(T, dtype, cu):
    size = dtype.itemsize * T * 3 * D
    return (
        inputs(dtype, T, 6 * D), (), lambda x: (hk.swiglu(x, backend="cpu"),), lambda x: (plain_layers.swiglu(x),),
        (3 * size, 5 * size),
    )  # fmt: skip


def attention_of(T, dtype, cu):
    width, pack = D // HEADS, Pack(cu, T)
    cos, sin = (t.flatten(1) for t in pack.rotary(width))
    return (
        inputs(dtype, T, 3, HEADS, width), (),
        lambda x: (hk.attention(x, cu, WINDOW, (cos, sin), backend="cpu"),),
        lambda x: (plain_layers.attention(x, pack, WINDOW, width),), (0, 0),
    )  # fmt: skip


def cross_entropy_of(T, dtype, cu):
    targets, size = torch.randint(256, (T,)), dtype.itemsize * T * 256
    return (
        inputs(dtype, T, 256), (), lambda x: (hk.cross_entropy(x, targets, backend="cpu").loss,),
        lambda x: (torch.nn.functional.cross_entropy(x.float(), targets, reduction="none"),), (size, 2 * size),
    )  # fmt: skip


OPS = {
    "add_rms_norm": norm_of,
    "gated_conv": conv_of,
    "swiglu": swiglu_of,
    "attention": attention_of,
    "cross_entropy": cross_entropy_of,
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_layer_op(race, smoke, op, dtype, direction):
    T, L = (512, 128) if smoke else (16384, 512)
    cu = torch.arange(0, T + 1, L, dtype=torch.int32)
    grad = direction != "forward"
    sets, parameters, ours, plain, (forward, backward) = OPS[op](T, dtype, cu)
    sets = [x.requires_grad_(grad) for x in sets]
    want, got = plain(sets[0]), ours(sets[0])
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4 if dtype == torch.float32 else 0.1, rtol=2e-2)
    dout = [torch.randn_like(o) for o in want]

    def run(f):
        def once(i):
            with torch.set_grad_enabled(grad):
                out = f(sets[i % 2])
            return torch.autograd.grad(out, (sets[i % 2], *parameters), dout) if grad else out

        return once

    contenders = {"ours": run(ours), "eager plain": run(plain)}
    if op != "attention":  # its grouping by length is no graph
        contenders["compile plain"] = run(torch.compile(plain))
    contenders["copy"], copy_bytes = copy_of(T, D)
    race(
        contenders, ours="ours", bytes=forward + (backward if grad else 0) or None, copy_bytes=copy_bytes,
        op=op, dtype=str(dtype)[6:], direction=direction, T=T, D=D, N=len(cu) - 1,
    )  # fmt: skip
