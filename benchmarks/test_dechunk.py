"""Dechunk with residual. Counted bytes: z and residual read, out written; backward: dout and z read, dz written."""

import pytest
import torch

import hnet_kernels as hk
from hnet_kernels import reference

from . import baselines
from .harness import copy_of
from .shapes import qk, ragged
from .test_route import DIRECTIONS, DTYPES


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_dechunk(race, request, smoke, dtype, direction):
    T, D, N = (512, 64, 4) if smoke else (16384, 1024, 8)
    grad = direction != "forward"
    r = hk.route(*qk(T, D, 5, torch.float32), ragged(T, N))
    M = r.chunk_start.shape[0]
    p, c = (x.detach().requires_grad_(grad) for x in (r.boundary_prob, r.selected_prob))
    r = r._replace(boundary_prob=p, selected_prob=c)
    first, start, index = reference.starts(r.cu_chunks, M), r.chunk_start.long(), r.chunk_index.long()
    sets = [[torch.randn(n, D).to(dtype).requires_grad_(grad) for n in (M, T)] for _ in range(2)]
    douts = [torch.randn(T, D).to(dtype) for _ in sets]

    def run(f):
        def once(i):
            z, residual = sets[i % 2]
            out = f(z, residual)
            return torch.autograd.grad(out, (z, residual, p, c), douts[i % 2]) if grad else out

        return once

    def plain(f):
        return lambda z, residual: f(z, p, c, first, start, index, residual)

    contenders = {"ours": run(lambda z, residual: hk.dechunk(z, r, residual, backend="cpu"))}
    want = hk.dechunk(sets[0][0], r, sets[0][1], backend="cpu")
    for name, f in baselines.DECHUNK.items():
        assert torch.allclose(plain(f)(*sets[0]).float(), want.float(), atol=1e-4 if dtype == torch.float32 else 0.1), (
            name
        )
        contenders[f"eager {name}"] = run(plain(f))
        if name in baselines.compiled(request.config, baselines.DECHUNK):
            contenders[f"compile {name}"] = run(plain(torch.compile(f)))
    contenders["copy"], copy_bytes = copy_of(T, D)
    size = torch.finfo(dtype).bits // 8 * D
    race(
        contenders, ours="ours", bytes=size * (2 * T + M + (T + 2 * M if grad else 0)), copy_bytes=copy_bytes,
        op="dechunk", dtype=str(dtype)[6:], direction=direction, T=T, D=D, N=N, M=M,
    )  # fmt: skip
