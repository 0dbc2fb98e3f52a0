"""add_rms_norm, gated_conv, swiglu and attention at the laptop model's shapes: 16,384 positions in sequences of 512.

Counted bytes: what each must read and write once (docs/kernels.md); of attention no bytes, it is bound by arithmetic.
"""

import pytest
import torch
import torch.nn.functional as F

import hnet_kernels as hk
from hnet.model.attention import attention as dense_attention
from hnet.model.attention import rotate
from hnet.model.conv import DepthwiseConv1d
from hnet.model.pack import Pack

from .harness import copy_of
from .test_route import DIRECTIONS, DTYPES

D, K, HEADS, WINDOW = 128, 4, 4, 127


def norm_of(T, dtype, cu):
    x, weight = [torch.randn(T, D).to(dtype) for _ in range(2)], torch.ones(D).requires_grad_()
    residual = torch.randn(T, D).requires_grad_()

    def plain(x):
        s = residual + x
        return F.rms_norm(s, (D,), weight, 1e-5).to(x.dtype), s

    size = torch.finfo(dtype).bits // 8 * T * D
    return x, (residual, weight), lambda x: hk.add_rms_norm(x, residual, weight, backend="cpu"), plain, (
        2 * size + 8 * T * D, 2 * size + 12 * T * D
    )  # fmt: skip


def conv_of(T, dtype, cu):
    x, conv, pack = [torch.randn(T, 2 * D).to(dtype) for _ in range(2)], DepthwiseConv1d(D, K), Pack(cu, T)
    weight = conv.weight

    def plain(x):
        u, g = x.chunk(2, 1)
        return (conv(u, pack) * F.silu(g),)

    size = torch.finfo(dtype).bits // 8 * T * D
    return x, (weight, conv.bias), lambda x: (hk.gated_conv(x, weight[:, 0], conv.bias, cu, backend="cpu"),), plain, (
        3 * size, 5 * size
    )  # fmt: skip


def swiglu_of(T, dtype, cu):
    x = [torch.randn(T, 2 * 3 * D).to(dtype) for _ in range(2)]

    def plain(x):
        y, gate = x.chunk(2, 1)
        return (F.silu(gate) * y,)

    size = torch.finfo(dtype).bits // 8 * T * 3 * D
    return x, (), lambda x: (hk.swiglu(x, backend="cpu"),), plain, (3 * size, 5 * size)


def attention_of(T, dtype, cu):
    width, pack = D // HEADS, Pack(cu, T)
    x = [torch.randn(T, 3, HEADS, width).to(dtype) for _ in range(2)]
    table = tuple(t.flatten(1) for t in pack.rotary(width))

    def plain(x):
        qk, v = x.split([2, 1], dim=1)
        return (dense_attention(rotate(qk, *pack.rotary(width)), v[:, 0], pack, WINDOW),)

    return x, (), lambda x: (hk.attention(x, cu, WINDOW, table, backend="cpu"),), plain, (0, 0)


OPS = {"add_rms_norm": norm_of, "gated_conv": conv_of, "swiglu": swiglu_of, "attention": attention_of}


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
