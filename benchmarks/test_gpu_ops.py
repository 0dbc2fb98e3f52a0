"""route, pool and dechunk on a GPU: forward and backward, each from a cold cache; `both` is their sum.

The counted bytes are `stage.bytes_of`. The smoke run takes them over tiny shapes on the CPU.
"""

from collections.abc import Callable

import pytest
import torch

import hnet_kernels as hk
from hnet_kernels import dispatch, reference

from . import baselines, harness, launches, published, stage
from .harness import Pass
from .shapes import GPU, SMOKE, Shape, qk, raced_compiled, ragged, rows

CASES = [
    pytest.param("cpu", SMOKE, id="cpu"),
    *(pytest.param("cuda", s, id=f"gpu-{s}", marks=pytest.mark.gpu) for s in GPU),
]
DTYPE = torch.bfloat16


@pytest.fixture
def shape(request, smoke):
    if smoke:
        return SMOKE
    if request.getfixturevalue("device") == "cpu":
        pytest.skip("the CPU's benchmarks are test_route.py, test_pool.py and test_dechunk.py")
    return request.getfixturevalue("case")


@pytest.fixture
def compiled(request, smoke, shape) -> bool:
    return not smoke and raced_compiled(request.config, shape)


def both_kinds(forms: dict, compiled: bool) -> dict:
    found = {f"eager {name}": f for name, f in forms.items()}
    if compiled:
        found |= {f"compile {name}": torch.compile(f) for name, f in forms.items()}
    return found


def gpu_backends(op: str, device: str) -> list[str]:
    """Where an op has more than one GPU backend, all of them race: `auto` may only prefer the one that wins."""
    if device == "cpu":
        return []
    usable = [b for b in ("triton", "cuda") if dispatch.why_not(b, op, device, DTYPE) is None]
    return usable if len(usable) > 1 else []


def racers(forms: dict, passes: Callable[..., Pass], device: str) -> dict[str, Pass]:
    """The passes of all forms, and on a GPU ours once more as replays of CUDA graphs: what is left without the host."""
    found = {name: passes(f) for name, f in forms.items()}
    return found | {"graph": launches.replayed(found["ours"])} if device == "cuda" else found


def mostly_close(got, want) -> bool:
    return bool(torch.isclose(got.float(), want.float(), atol=0.15, rtol=0.02).float().mean() > 0.999)


@pytest.mark.parametrize(("device", "case"), CASES)
def test_route(race_passes, shape, compiled, device, case):
    T, D, chunk, N = shape
    cu = ragged(T, N).to(device)
    sets = [[x.requires_grad_() for x in qk(T, D, chunk, DTYPE, seed, device)] for seed in (0, 1)]
    grads = (torch.rand(T, device=device) - 0.5, torch.rand(T, device=device) - 0.5)  # of prob and selected prob
    M = max(hk.route(q, k, cu).chunk_start.shape[0] for q, k in sets)
    budget = stage.rounded_budget(M)

    def passes(f) -> Pass:
        def backward(i, out):
            return torch.autograd.grad((out[0], out[2]), sets[i % 2], grads)

        return Pass(lambda i: f(*sets[i % 2], cu), backward)

    forms = {"ours": lambda q, k, cu: hk.route(q, k, cu, max_chunks=budget)}
    forms |= both_kinds({name: baselines.ROUTE[name] for name in ("sums", "normalize")}, compiled)
    for backend in gpu_backends("route", device):
        forms[backend] = lambda q, k, cu, b=backend: hk.route(q, k, cu, max_chunks=budget, backend=b)
    want = forms["ours"](*sets[0], cu).boundary_prob
    for name, f in forms.items():
        assert mostly_close(f(*sets[0], cu)[0], want), name
    forward_bytes, backward_bytes = stage.bytes_of(T, M, D, 2)["route"]
    race_passes(
        racers(forms, passes, device), device, forward_bytes=forward_bytes,
        backward_bytes=backward_bytes, op="route", dtype="bfloat16", **shape._asdict(), M=M,
    )  # fmt: skip


def routed(shape: Shape, device: str) -> hk.Routing:
    """Exactly as many rows as chunks: the plain forms below have no padding to deal with."""
    return hk.route(*qk(shape.T, shape.D, shape.chunk, DTYPE, 0, device), ragged(shape.T, shape.N).to(device))


@pytest.mark.parametrize(("device", "case"), CASES)
def test_pool(race_passes, shape, compiled, device, case):
    T, D, _, _ = shape
    r = routed(shape, device)
    M, start = r.chunk_start.shape[0], r.chunk_start.long()
    sets, dz = [rows(T, D, DTYPE, device, True) for _ in range(2)], rows(M, D, DTYPE, device)

    def passes(f) -> Pass:
        return Pass(lambda i: f(sets[i % 2]), lambda i, z: torch.autograd.grad(z, sets[i % 2], dz))

    plain = {name: lambda x, f=f: f(x, start) for name, f in baselines.POOL.items()}
    forms = {"ours": lambda x: hk.pool(x, r), **both_kinds(plain, compiled)}
    want = hk.pool(sets[0], r)
    for name, f in forms.items():
        assert torch.equal(f(sets[0]), want), name
    forward_bytes, backward_bytes = stage.bytes_of(T, M, D, 2)["pool"]
    race_passes(
        racers(forms, passes, device), device, forward_bytes=forward_bytes,
        backward_bytes=backward_bytes, op="pool", dtype="bfloat16", **shape._asdict(), M=M,
    )  # fmt: skip


@pytest.mark.parametrize(("device", "case"), CASES)
def test_dechunk(race_passes, shape, compiled, device, case):
    T, D, _, _ = shape
    r = routed(shape, device)
    M = r.chunk_start.shape[0]
    p, c = (x.detach().requires_grad_() for x in (r.boundary_prob, r.selected_prob))
    r = r._replace(boundary_prob=p, selected_prob=c)
    layout = (reference.starts(r.cu_chunks, M), r.chunk_start.long(), r.chunk_index.long())
    sets = [[rows(n, D, DTYPE, device, True) for n in (M, T)] for _ in range(2)]
    dout = rows(T, D, DTYPE, device)

    def passes(f) -> Pass:
        return Pass(
            lambda i: f(*sets[i % 2]), lambda i, out: torch.autograd.grad(out, (*sets[i % 2], p, c), dout)
        )  # fmt: skip

    plain = {name: lambda z, res, f=f: f(z, p, c, *layout, res) for name, f in baselines.DECHUNK.items()}
    forms = {"ours": lambda z, res: hk.dechunk(z, r, res), **both_kinds(plain, compiled)}
    if device == "cuda" and (scan := published.ssd_scan()) is not None:
        ssd = published.dechunk_ssd(scan)
        forms["published"] = lambda z, res: ssd(z, p, c, *layout, res)
    want = forms["ours"](*sets[0])
    for name, f in forms.items():
        assert mostly_close(f(*sets[0]), want), name
    forward_bytes, backward_bytes = stage.bytes_of(T, M, D, 2)["dechunk"]
    race_passes(
        racers(forms, passes, device), device, forward_bytes=forward_bytes,
        backward_bytes=backward_bytes, op="dechunk", dtype="bfloat16", **shape._asdict(), M=M,
    )  # fmt: skip


STEPS = [
    pytest.param("cpu", 8, id="cpu"),
    *(pytest.param("cuda", B, id=f"gpu-B{B}", marks=pytest.mark.gpu) for B in (1, 32, 512)),
]


@pytest.mark.parametrize(("device", "B"), STEPS)
def test_decode_step(benchmark, keep_row, rounds, smoke, device, B):
    """route_step and dechunk_step for B sequences, D = 1024: launches, not bytes, are what it costs."""
    if device == "cpu" and not smoke:
        pytest.skip("only to see that the benchmark runs")
    D = 64 if smoke else 1024
    q, k, z, residual = (rows(B, D, DTYPE, device) for _ in range(4))
    state = rows(B, D, torch.float32, device)

    def step(backend):
        def run(i):
            prob, mask, _ = hk.route_step(q, k, backend=backend)
            return hk.dechunk_step(z, prob, mask, state, residual, backend=backend)

        return run

    backends = [*gpu_backends("route_step", device), "reference"]
    contenders = {"ours": step("auto")} | {f"eager {b}" if b == "reference" else b: step(b) for b in backends}
    if device == "cuda" and "cuda" in backends:
        assert dispatch.why_not("cuda", "dechunk_step", device, DTYPE) is None
    for name, run in contenders.items():
        for got, want in zip(run(0), step("reference")(0), strict=True):
            assert mostly_close(got, want), name
    seconds = harness.race(contenders, rounds, device)
    keep_row(seconds, ours="ours", op="decode step", dtype="bfloat16", device=device, B=B, D=D)
    benchmark.pedantic(contenders["ours"], args=(0,), rounds=2)


def slow_scan(x, dt, A, B, C, *, chunk_size, seq_idx):
    """What mamba_chunk_scan_combined computes, one position at a time."""
    h, out = x.new_zeros(x.shape[2:], dtype=torch.float32), []
    for t in range(x.shape[1]):
        if t and seq_idx[0, t] != seq_idx[0, t - 1]:
            h = torch.zeros_like(h)
        step = dt[0, t, :, None].float()
        h = torch.exp(step * A[:, None]) * h + step * B[0, t, 0] * x[0, t].float()
        out.append(C[0, t, 0] * h)
    return torch.stack(out)[None].to(x.dtype)


def test_the_published_form_computes_the_same():
    """Against a scan of ours, so that it is known to be right before it is raced on a GPU."""
    T, D, chunk, N = Shape(256, 128, 4, 3)
    r = hk.route(*qk(T, D, chunk, torch.float32), ragged(T, N))
    M = r.chunk_start.shape[0]
    z, residual = (rows(n, D, torch.float32, "cpu") for n in (M, T))
    layout = (reference.starts(r.cu_chunks, M), r.chunk_start.long(), r.chunk_index.long())
    got = published.dechunk_ssd(slow_scan)(z, r.boundary_prob, r.selected_prob, *layout, residual)
    assert torch.allclose(got, hk.dechunk(z, r, residual), atol=1e-4)
