"""What the tests in tests/gpu stand on, exercised on the CPU: a check that cannot run here must at least be able to."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import hnet_kernels as hk
from benchmarks import launches
from benchmarks.harness import Pass

from .gpu import model_checks, small_run, test_compile, test_large
from .gpu.stage import LENGTHS, assert_same, make_stage, round_trip
from .kernels.cases import assert_close
from .model.test_golden import FOLDER, Golden

SPLIT = [0, 900, 901, 2290, 2300]


@pytest.mark.parametrize("budget", [None, 1600, 400])
def test_stage(budget):
    s, other = make_stage("cpu", torch.float32), make_stage("cpu", torch.float32, lengths=[5, 1200, 0, 1290, 5], seed=2)
    got, want = round_trip(s, budget, "cpu"), round_trip(s, budget, "reference")
    for g, w in zip(got, want, strict=True):
        assert_close(g.detach().float(), w.detach().float(), 2e-5)
    assert (got[11].item() > 0) == (budget == 400)
    with pytest.raises(AssertionError, match="differs in"):
        assert_same(round_trip(other, 1600), round_trip(s, 1600))
    s.take(other)
    assert s.cu.tolist() == [0, 5, 1205, 1205, 2495, 2500]
    assert_same(round_trip(s, budget), round_trip(other, budget))


@pytest.mark.parametrize("op", test_compile.OPS)
def test_compiled_functions_run(op):
    s = make_stage("cpu", torch.bfloat16, lengths=LENGTHS)
    outs = test_compile.OPS[op](s)
    assert all(not g.isnan().any() for g in (*outs, *test_compile.gradients(outs, s)))


@pytest.fixture
def routing():
    cu = torch.tensor(SPLIT, dtype=torch.int32)
    return cu, *test_large.large_routing(2300, 64, cu)


def noise(rows, seed):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_()


def test_spot_checks_pass_on_right_results(routing):
    cu, q, k, r = routing
    M = r.chunk_start.shape[0]
    assert 0.94 < M / 2300 < 0.98
    test_large.check_route(q, k, r, cu)
    for mode in ("boundary", "mean", "max", "last"):
        test_large.check_pool(noise(2300, 1), noise(M, 2).detach(), r, mode)
    test_large.check_dechunk(noise(M, 1), noise(2300, 2), noise(2300, 3).detach(), r)
    p = (0.5 + 0.49 * torch.rand(2300)).requires_grad_()
    test_large.check_ema(noise(2300, 1), p, noise(2300, 2).detach(), cu)


@pytest.mark.parametrize("where", [0, 2299])
def test_spot_checks_fail_on_a_wrong_row(routing, monkeypatch, where):
    """As an overflowing offset would make it: one row of the output was written elsewhere."""
    _, _, _, r = routing
    M = r.chunk_start.shape[0]
    right = hk.dechunk

    def wrong(z, r, residual):
        out = right(z, r, residual)
        return torch.where((torch.arange(2300) == where)[:, None], out.detach() * 0, out)

    monkeypatch.setattr(hk, "dechunk", wrong)
    with pytest.raises(AssertionError, match="error"):
        test_large.check_dechunk(noise(M, 1), noise(2300, 2), noise(2300, 3).detach(), r)


class Event:
    def __init__(self, name, kind, start, annotation=False):
        self.name, self.device_type, self.is_user_annotation = name, kind, annotation
        self.time_range = type("Range", (), {"start": start})


def test_kernels_are_told_from_host_events():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [Event("b", cuda, 2), Event("launch", cpu, 0), Event("a", cuda, 1), Event("range", cuda, 0, True)]
    assert launches.kernel_names(events) == ["a", "b"]


def test_a_pass_as_two_graphs(monkeypatch):
    """torch.cuda recorded in its place: what runs inside of which graph, and what a replay starts."""
    ran, open_graph, made = [], [None], iter(["forward graph", "backward graph"])

    class Graph:
        def __init__(self):
            self.name = next(made)

        def pool(self):
            return f"memory of {self.name}"

        def replay(self):
            ran.append(("replay", self.name))

    @contextlib.contextmanager
    def graph(into, pool=None):
        open_graph[0] = (into.name, pool)
        yield
        open_graph[0] = None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    run = Pass(lambda i: ran.append(("forward", open_graph[0])), lambda i, out: ran.append(("backward", open_graph[0])))
    replays = launches.replayed(run, warmup=1)
    captured = [("forward", ("forward graph", None)), ("backward", ("backward graph", "memory of forward graph"))]
    assert ran == [("forward", None), ("backward", None), *captured]
    ran.clear()
    replays.backward(0, replays.forward(0))
    assert ran == [("replay", "forward graph"), ("replay", "backward graph")]


def test_small_run():
    assert small_run.main("cpu") == 0


def test_model_checks():
    path = sorted(FOLDER.glob("*.safetensors"))[0]
    model_checks.check_golden(Golden(path), "cpu")
    model_checks.check_decode(Golden(path), "cpu")
    model = model_checks.seeded_model("tiny")
    exact = model_checks.training_step(model, "cpu", torch.float32)
    plain = model_checks.training_step(model, "cpu", torch.bfloat16, "reference")
    ours = model_checks.training_step(model, "cpu", torch.bfloat16)
    model_checks.check_low_precision(ours, plain, exact)
    off = ours._replace(gradient=ours.gradient + exact.gradient)
    with pytest.raises(AssertionError, match="gradient off by"):
        model_checks.check_low_precision(off, plain, exact)
