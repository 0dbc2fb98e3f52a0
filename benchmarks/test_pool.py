"""Pooling. Counted bytes: the rows kept read and written once; backward: dz read, dx written."""

import pytest
import torch

import hnet_kernels as hk

from . import baselines
from .harness import copy_of
from .shapes import qk, ragged
from .test_route import DIRECTIONS, DTYPES


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_pool(race, request, smoke, dtype, direction):
    T, D, N = (512, 64, 4) if smoke else (16384, 1024, 8)
    grad = direction != "forward"
    r = hk.route(*qk(T, D, 5, torch.float32), ragged(T, N))
    M, start = r.chunk_start.shape[0], r.chunk_start.long()
    sets = [torch.randn(T, D).to(dtype).requires_grad_(grad) for _ in range(2)]
    dz = [torch.randn(M, D).to(dtype) for _ in sets]

    def run(f):
        def once(i):
            z = f(sets[i % 2])
            return torch.autograd.grad(z, sets[i % 2], dz[i % 2]) if grad else z

        return once

    contenders = {"ours": run(lambda x: hk.pool(x, r, backend="cpu"))}
    for name, f in baselines.POOL.items():
        assert torch.equal(f(sets[0], start), hk.pool(sets[0], r)), name
        contenders[f"eager {name}"] = run(lambda x, f=f: f(x, start))
        compiled = torch.compile(f)
        if name in baselines.compiled(request.config, baselines.POOL):
            contenders[f"compile {name}"] = run(lambda x, f=compiled: f(x, start))
    contenders["copy"], copy_bytes = copy_of(T, D)
    size = torch.finfo(dtype).bits // 8 * D
    race(
        contenders, ours="ours", bytes=size * (2 * M + (M + T if grad else 0)), copy_bytes=copy_bytes,
        op="pool", dtype=str(dtype)[6:], direction=direction, T=T, D=D, N=N, M=M,
    )  # fmt: skip
