"""General EMA (any weights). Counted bytes: z read, y written; backward: dy and z read, dz written."""

import pytest
import torch

import hnet_kernels as hk

from . import baselines
from .harness import copy_of
from .shapes import ragged
from .test_route import DIRECTIONS, DTYPES


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_ema(race, request, smoke, dtype, direction):
    T, D, N = (512, 64, 4) if smoke else (4096, 1024, 8)
    grad = direction != "forward"
    cu = ragged(T, N)
    first = torch.zeros(T, dtype=torch.bool)
    first[cu[:-1].long()] = True
    p = (0.01 + 0.98 * torch.rand(T)).requires_grad_(grad)
    sets = [torch.randn(T, D).to(dtype).requires_grad_(grad) for _ in range(2)]
    dy = [torch.randn(T, D).to(dtype) for _ in sets]

    def run(f):
        def once(i):
            y = f(sets[i % 2])
            return torch.autograd.grad(y, (sets[i % 2], p), dy[i % 2]) if grad else y

        return once

    contenders = {"ours": run(lambda z: hk.ema(z, p, cu, backend="cpu"))}
    want = hk.ema(sets[0], p, cu).float()
    for name, f in baselines.EMA.items():
        assert torch.allclose(f(sets[0], p, first).float(), want, atol=1e-4 if dtype == torch.float32 else 0.1), name
        contenders[f"eager {name}"] = run(lambda z, f=f: f(z, p, first))
        compiled = torch.compile(f)
        if name in baselines.compiled(request.config, baselines.EMA):
            contenders[f"compile {name}"] = run(lambda z, f=compiled: f(z, p, first))
    contenders["copy"], copy_bytes = copy_of(T, D)
    size = torch.finfo(dtype).bits // 8 * T * D
    race(
        contenders, ours="ours", bytes=size * (2 + (3 if grad else 0)), copy_bytes=copy_bytes,
        op="ema", dtype=str(dtype)[6:], direction=direction, T=T, D=D, N=N,
    )  # fmt: skip
