"""The dynamic chunking of a stage, forward and backward: route, pool, dechunk and ratio loss in a row.

Ours runs with a budget (`max_chunks`), so the host never waits for the device; the plain forms run with and without.
"""

import pytest
import torch

import hnet_kernels as hk

from . import baselines, harness, launches, published, shapes, stage
from .harness import Pass
from .shapes import GPU, SMOKE, Shape, qk, raced_compiled, ragged, rows

CASES = [
    pytest.param("cpu", Shape(16384, 1024, 5), torch.float32, id="cpu-fp32"),
    pytest.param("cpu", Shape(16384, 1024, 5), torch.bfloat16, id="cpu-bf16"),
    *(pytest.param("cuda", s, torch.bfloat16, id=f"gpu-{s}", marks=pytest.mark.gpu) for s in GPU),
]


class Inputs:
    """Two input sets of one shape on one device, and a budget that holds the chunks of both."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        T, D, chunk, N = shape
        self.cu = ragged(T, N).to(device)
        self.sets = []
        for seed in (0, 1):
            q, k = (x.requires_grad_() for x in qk(T, D, chunk, dtype, seed, device))
            self.sets.append((q, k, rows(T, D, dtype, device, True), rows(T, D, dtype, device, True)))
        self.dout = rows(T, D, dtype, device)
        self.dratio = torch.tensor(0.03, device=device)
        self.M = max(hk.route(q, k, self.cu).chunk_start.shape[0] for q, k, *_ in self.sets)
        self.budget = stage.rounded_budget(self.M)

    def passes(self, form) -> Pass:
        def forward(i):
            return form(*self.sets[i % 2], self.cu)

        def backward(i, out):
            return torch.autograd.grad(out, self.sets[i % 2], (self.dout, self.dratio))

        return Pass(forward, backward)


def contenders(inputs: Inputs, compiled: list[str]) -> dict[str, Pass]:
    found = {"ours": lambda *a: stage.ours(*a, max_chunks=inputs.budget)}
    forms = dict(stage.PLAIN)
    if (scan := published.ssd_scan()) is not None and inputs.dout.is_cuda:
        forms["published"] = (baselines.route_normalize, published.dechunk_ssd(scan))
    for name, (route, dechunk) in forms.items():
        found[f"eager {name}"] = stage.plain(route, dechunk)
        if name == "published":
            continue
        found[f"eager static {name}"] = stage.plain(route, dechunk, inputs.budget)
        if name in compiled:
            found[f"compile {name}"] = torch.compile(stage.plain(route, dechunk, inputs.budget), fullgraph=True)
    return {name: inputs.passes(form) for name, form in found.items()}


def agrees(inputs: Inputs, form, want, name: str) -> None:
    """A contender must be right before it is raced."""
    out, ratio = form(*inputs.sets[0], inputs.cu)
    exact = want[0].dtype == torch.float32
    assert torch.allclose(ratio.float(), want[1], atol=1e-4 if exact else 1e-2), name
    # a bf16 probability near 1/2 may fall on the other side, so rows may differ: most must not
    close = torch.isclose(out.float(), want[0].float(), atol=1e-4 if exact else 0.15, rtol=0.02).float().mean()
    assert close > (0.999 if exact else 0.98), f"{name}: only {close:.4f} of the elements agree"


@pytest.mark.parametrize(("device", "shape", "dtype"), CASES)
def test_round_trip(race_passes, request, smoke, device, shape, dtype):
    shape = SMOKE if smoke else shape
    inputs = Inputs(shape, dtype, device)
    compiled = list(stage.PLAIN) if raced_compiled(request.config, shape) else []
    if device == "cpu":
        compiled = baselines.compiled(request.config, stage.PLAIN)
    racers = contenders(inputs, [] if smoke else compiled)
    want = racers["ours"].forward(0)
    for name, racer in racers.items():
        agrees(inputs, lambda *a, racer=racer: racer.forward(0), want, name)
    if device == "cuda":
        racers["graph"] = launches.replayed(racers["ours"])
    forward_bytes, backward_bytes = stage.bytes_of(shape.T, inputs.M, shape.D, dtype.itemsize)["round trip"]
    race_passes(
        racers, device, forward_bytes=forward_bytes, backward_bytes=backward_bytes,
        op="round trip", dtype=str(dtype)[6:], **shape._asdict(), M=inputs.M,
    )  # fmt: skip


@pytest.mark.gpu
def test_round_trip_in_a_cuda_graph(benchmark, rounds, keep_row, smoke):
    """T = 8192: launches of one forward and backward, and the time of its replay."""
    shape = SMOKE if smoke else Shape(8192, 1024, 6)
    inputs = Inputs(shape, torch.bfloat16, "cuda")
    ours = inputs.passes(lambda *a: stage.ours(*a, max_chunks=inputs.budget))
    graph = launches.captured(lambda: ours.backward(0, ours.forward(0)))
    count = launches.kernels_of(graph.replay)
    seconds = harness.race({"ours": lambda i: graph.replay()}, rounds, "cuda")
    forward_bytes, backward_bytes = stage.bytes_of(shape.T, inputs.M, shape.D, 2)["round trip"]
    keep_row(
        seconds, ours="ours", bytes=forward_bytes + backward_bytes, device="cuda", op="round trip in a CUDA graph",
        dtype="bfloat16", **shape._asdict(), M=inputs.M, kernels=len(count), kernel_names=sorted(set(count)),
    )  # fmt: skip
    benchmark.pedantic(lambda: (graph.replay(), harness.synchronize("cuda")), rounds=2)


def test_bytes_are_those_of_the_tensors():
    """The byte counts against the sizes of what the ops take and give."""
    shape = shapes.SMOKE
    inputs = Inputs(shape, torch.bfloat16, "cpu")
    q, k, x, residual = inputs.sets[0]
    r = hk.route(q, k, inputs.cu)
    z = hk.pool(x, r)
    out = hk.dechunk(z, r, residual)
    M = z.shape[0]
    count = stage.bytes_of(shape.T, M, shape.D, 2)
    layout = (r.boundary_prob, r.selected_prob, r.boundary_mask, r.chunk_index, r.chunk_start)
    assert count["route"][0] == sum(t.nbytes for t in (q, k, *layout))
    assert count["pool"] == (2 * z.nbytes + r.chunk_start.nbytes, x.nbytes + z.nbytes + r.chunk_index.nbytes)
    assert count["dechunk"][0] == z.nbytes + residual.nbytes + out.nbytes + r.chunk_index.nbytes + 4 * M
    wide = stage.bytes_of(shape.T, M, shape.D, 2, residual=4)["dechunk"]
    assert wide[0] == count["dechunk"][0] + residual.nbytes
    assert wide[1] == count["dechunk"][1] + 2 * residual.nbytes  # the residual's gradient, fp32
    assert count["round trip"][1] == sum(count[op][1] for op in ("route", "pool", "dechunk"))
