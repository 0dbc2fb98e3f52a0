"""Routing: T x D rows of q and k to boundaries. Counted bytes: q and k read once; backward: both read, both written."""

import pytest
import torch

import hnet_kernels as hk

from . import baselines
from .harness import copy_of
from .shapes import qk, ragged

DTYPES = [torch.float32, torch.bfloat16]
DIRECTIONS = ["forward", "forward+backward"]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_route(race, request, smoke, dtype, direction):
    T, D, N = (512, 64, 4) if smoke else (16384, 1024, 8)
    grad = direction != "forward"
    cu = ragged(T, N)
    sets = [[x.requires_grad_(grad) for x in qk(T, D, 5, dtype, seed)] for seed in (0, 1)]
    weights = [(torch.rand(T) - 0.5, torch.rand(T) - 0.5) for _ in sets]

    def run(f):
        def once(i):
            (q, k), (w_prob, w_selected) = sets[i % 2], weights[i % 2]
            out = f(q, k, cu)
            if grad:
                loss = out[0] @ w_prob + out[2] @ w_selected
                return torch.autograd.grad(loss, (q, k))
            return out

        return once

    want = hk.route(*sets[0], cu, backend="cpu")
    contenders = {"ours": run(lambda q, k, cu: hk.route(q, k, cu, backend="cpu"))}
    for name, f in baselines.ROUTE.items():
        if dtype == torch.float32:  # a contender must be right before it is raced
            assert torch.allclose(f(*sets[0], cu)[0], want.boundary_prob, atol=1e-5), name
        contenders[f"eager {name}"] = run(f)
        if name in baselines.compiled(request.config, baselines.ROUTE):
            contenders[f"compile {name}"] = run(torch.compile(f))
    contenders["copy"], copy_bytes = copy_of(T, D)
    size = torch.finfo(dtype).bits // 8 * T * D
    race(
        contenders, ours="ours", bytes=size * (2 + (4 if grad else 0)), copy_bytes=copy_bytes,
        op="route", dtype=str(dtype)[6:], direction=direction, T=T, D=D, N=N,
    )  # fmt: skip
