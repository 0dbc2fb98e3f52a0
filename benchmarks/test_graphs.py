"""Ours alone as replays of CUDA graphs, forward and backward apart: what the kernels take without the host.

Every op, also where it is another kernel or another amount of work: both routes, a budget that drops half of the
boundaries, a residual in fp32 (the model's), one chunk of half of all positions. The smoke run takes the same cases
over a tiny shape on the CPU, without graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import hnet_kernels as hk
from hnet_kernels import dispatch

from . import launches, stage
from .harness import Pass
from .shapes import GRAPHS, SMOKE, Shape, qk, ragged, rows

CASES = [
    pytest.param("cpu", SMOKE, id="cpu"),
    *(pytest.param("cuda", s, id=f"gpu-{s}", marks=pytest.mark.gpu) for s in GRAPHS),
]
DTYPE = torch.bfloat16
Case = tuple[dict[str, Pass], int, int, int]  # contenders; M; bytes of the forward, of the backward


def route(shape: Shape, device: str, drop: bool = False) -> Case:
    T, D, chunk, N = shape
    cu = ragged(T, N).to(device)
    q, k = (x.requires_grad_() for x in qk(T, D, chunk, DTYPE, 0, device))
    M = hk.route(q, k, cu).chunk_start.shape[0]
    budget = M // 2 if drop else stage.rounded_budget(M)
    grads = (torch.rand(T, device=device) - 0.5, torch.rand(T, device=device) - 0.5)

    def passes(backend: str) -> Pass:
        return Pass(
            lambda i: hk.route(q, k, cu, max_chunks=budget, backend=backend),
            lambda i, r: torch.autograd.grad((r.boundary_prob, r.selected_prob), (q, k), grads),
        )

    usable = [b for b in ("triton", "cuda") if device == "cuda" and dispatch.why_not(b, "route", device, DTYPE) is None]
    contenders = {"ours": passes("auto"), **{b: passes(b) for b in usable}}
    return contenders, M, *stage.bytes_of(T, min(M, budget), D, 2)["route"]


def pool(shape: Shape, device: str) -> Case:
    r, (x,) = routed(shape, device), leaves(device, (shape.T, shape.D, DTYPE))
    M = r.chunk_start.shape[0]
    dz = rows(M, shape.D, DTYPE, device)
    ours = Pass(lambda i: hk.pool(x, r), lambda i, z: torch.autograd.grad(z, x, dz))
    return {"ours": ours}, M, *stage.bytes_of(shape.T, M, shape.D, 2)["pool"]


def dechunk(shape: Shape, device: str, residual: torch.dtype = DTYPE, long: bool = False) -> Case:
    T, D, *_ = shape
    r = routed(shape, device, long)
    M = r.chunk_start.shape[0]
    p, c = (x.detach().requires_grad_() for x in (r.boundary_prob, r.selected_prob))
    r = r._replace(boundary_prob=p, selected_prob=c)
    z, res = leaves(device, (M, D, DTYPE), (T, D, residual))
    dout = rows(T, D, DTYPE, device)
    ours = Pass(lambda i: hk.dechunk(z, r, res), lambda i, out: torch.autograd.grad(out, (z, res, p, c), dout))
    return {"ours": ours}, M, *stage.bytes_of(T, M, D, 2, residual.itemsize)["dechunk"]


def round_trip(shape: Shape, device: str) -> Case:
    """As in the model: the residual in fp32."""
    T, D, chunk, N = shape
    cu = ragged(T, N).to(device)
    q, k = (x.requires_grad_() for x in qk(T, D, chunk, DTYPE, 0, device))
    x, residual = leaves(device, (T, D, DTYPE), (T, D, torch.float32))
    M = hk.route(q, k, cu).chunk_start.shape[0]
    budget, grads = stage.rounded_budget(M), (rows(T, D, DTYPE, device), torch.tensor(0.03, device=device))
    ours = Pass(
        lambda i: stage.ours(q, k, x, residual, cu, budget),
        lambda i, out: torch.autograd.grad(out, (q, k, x, residual), grads),
    )
    return {"ours": ours}, M, *stage.bytes_of(T, M, D, 2, residual=4)["round trip"]


def routed(shape: Shape, device: str, long: bool = False) -> hk.Routing:
    """Exactly as many rows as chunks. long: one sequence, in whose middle half no chunk begins."""
    T, D, chunk, N = shape
    candidates = torch.ones(T, dtype=torch.bool, device=device)
    if long:
        candidates[T // 4 : 3 * T // 4] = False
    q, k = qk(T, D, chunk, DTYPE, 0, device)
    return hk.route(q, k, ragged(T, 1 if long else N).to(device), candidates=candidates)


def leaves(device: str, *sizes: tuple[int, int, torch.dtype]) -> list[torch.Tensor]:
    return [rows(n, D, dtype, device, True) for n, D, dtype in sizes]


def mamba2(shape: Shape, device: str) -> Case:
    """A layer of width D between its projections, expanded twice, heads of 64 channels, 128 states."""
    T, D, _, N = shape
    inner, states, heads = 2 * D, 128, 2 * D // 64
    channels = inner + 2 * states
    width = inner + channels + heads
    cu, (zxbcdt,), dout = ragged(T, N).to(device), leaves(device, (T, width, DTYPE)), rows(T, inner, DTYPE, device)
    sizes = (channels, 4), (channels,), (heads,), (heads,), (heads,), (inner,)
    parameters = [(torch.randn(size, device=device) / 4).requires_grad_() for size in sizes]
    ours = Pass(
        lambda i: hk.mamba2(zxbcdt, *parameters, cu),
        lambda i, out: torch.autograd.grad(out, (zxbcdt, *parameters), dout),
    )
    return {"ours": ours}, T, 2 * T * (width + inner), 2 * T * (2 * width + inner)


FORMS: dict[str, Callable[[Shape, str], Case]] = {
    "route": route,
    "route, dropping half": lambda s, device: route(s, device, drop=True),
    "pool": pool,
    "dechunk": dechunk,
    "dechunk, fp32 residual": lambda s, device: dechunk(s, device, torch.float32),
    "dechunk, one long chunk": lambda s, device: dechunk(s, device, torch.float32, long=True),
    "round trip": round_trip,
    "mamba2": mamba2,
}


@pytest.mark.parametrize(("device", "shape"), CASES)
@pytest.mark.parametrize("op", FORMS)
def test_replay(race_passes, smoke, op, device, shape):
    if device == "cpu" and not smoke:
        pytest.skip("there are no graphs on a CPU; --smoke runs this to see that it does")
    shape = SMOKE if smoke else shape
    contenders, M, forward_bytes, backward_bytes = FORMS[op](shape, device)
    if device == "cuda":
        contenders = {name: launches.replayed(run) for name, run in contenders.items()}
    race_passes(
        contenders, device, forward_bytes=forward_bytes, backward_bytes=backward_bytes, op=f"{op}, replayed",
        dtype="bfloat16", **shape._asdict(), M=M,
    )  # fmt: skip
