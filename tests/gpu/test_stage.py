"""The stage's round trip under max_chunks: graphs, no waiting, the same bits, few launches."""

import pytest
import torch

import hnet_kernels as hk
from benchmarks.launches import captured, kernels_of

from ..kernels.cases import cu_of, leaf, rand
from .stage import LENGTHS, assert_same, make_stage, round_trip

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FITS, DROPS = 1600, 400  # of 2500 positions about 750 are boundaries


@pytest.mark.parametrize("budget", [FITS, DROPS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_replayed_on_new_inputs(dtype, budget):
    static = make_stage("cuda", dtype)
    graph = captured(lambda: round_trip(static, budget))
    for seed, lengths in ((1, LENGTHS), (2, [5, 1200, 0, 1290, 5])):
        new = make_stage("cuda", dtype, lengths=lengths, seed=seed)
        static.take(new)
        for result in graph.kept:
            result.detach().fill_(0)  # a replay that wrote nothing must not pass
        static.take(new)  # the residual's gradient is dout itself
        graph.replay()
        torch.cuda.synchronize()
        want = round_trip(new, budget)
        assert_same(graph.kept, want)
        assert (want[10].item() > 0) == (budget == DROPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_host_never_waits(without_sync, dtype):
    s = make_stage("cuda", dtype)
    candidates = torch.rand(len(s.q), device="cuda") < 0.8
    settings = [{}, {"logit_bias": 0.3}, {"logit_bias": torch.tensor(0.3, device="cuda")}, {"candidates": candidates}]
    for budget in (FITS, DROPS):
        for kw in settings:
            want = round_trip(s, budget, **kw)
            assert_same(without_sync(lambda b=budget, kw=kw: round_trip(s, b, **kw)), want)


@pytest.mark.parametrize("mode", ["boundary", "mean", "max", "last"])
def test_no_op_waits(without_sync, mode):
    """Every other op and reduction, with a Routing of static shape."""
    s = make_stage("cuda", torch.bfloat16)
    T, D = s.x.shape
    p, z = leaf(torch.rand(T, device="cuda")), leaf(rand(T, D).to("cuda"))
    is_first, state = torch.rand(T, device="cuda") < 0.1, torch.zeros(T, D, device="cuda")

    def work():
        r = hk.route(s.q, s.k, s.cu, max_chunks=FITS)
        inner = hk.route(hk.pool(s.q, r), hk.pool(s.k, r), r.cu_chunks, max_chunks=300, padded=True)
        pooled = hk.pool(s.x, r, mode)
        y, final = hk.ema(z, p, s.cu, return_final_state=True)
        losses = [hk.ratio_loss(r, 3.0, reduction=how) for how in ("batch", "sequence")]
        total = pooled.float().sum() + y.sum() + final.sum() + sum(losses) + inner.boundary_prob.sum()
        prob, mask, _ = hk.route_step(s.q, s.k, is_first=is_first)
        stepped = hk.dechunk_step(s.x.detach(), prob.detach(), mask, state)
        return [*torch.autograd.grad(total, (s.q, s.k, s.x, z, p)), *stepped]

    want = work()
    assert_same(without_sync(work), want)


def test_exact_shapes_wait_once():
    """Without max_chunks the count must be read: one wait a call, and the debug mode sees it (or the tests above could
    not fail)."""
    s = make_stage("cuda", torch.float32)
    hk.route(s.q, s.k, s.cu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            hk.route(s.q, s.k, s.cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("budget", [None, FITS, DROPS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype, budget):
    """Three times alone, then beside other work that keeps the multiprocessors busy."""
    s = make_stage("cuda", dtype, D=1024)
    want = round_trip(s, budget)
    for _ in range(2):
        assert_same(round_trip(s, budget), want)
    side, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(8):
            a = (a @ a) * 1e-3
    assert_same(round_trip(s, budget), want)
    torch.cuda.synchronize()


@pytest.mark.parametrize("stream_of_its_own", [False, True])
def test_runs_on_the_current_stream(stream_of_its_own):
    """Inputs that a slow stream is still writing: the kernels must queue behind it."""
    new, s = make_stage("cuda", torch.float32, seed=3), make_stage("cuda", torch.float32)
    want = round_trip(new, FITS)
    stream = torch.cuda.Stream() if stream_of_its_own else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        s.take(new)
        got = round_trip(s, FITS)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(got, want)


def test_launches():
    """T = 8192, one graph: at most 12 kernels for the forward and backward of the whole round trip."""
    s = make_stage("cuda", torch.bfloat16, D=1024, lengths=[3000, 1, 4000, 1191])
    graph = captured(lambda: round_trip(s, 3072))
    names = kernels_of(graph.replay)
    assert 0 < len(names) <= 12, f"{len(names)} kernels: {names}"


def test_empty_and_lone_positions():
    """The smallest packs, inside a graph as well."""
    for lengths in ([1], [1, 0, 1]):
        s = make_stage("cuda", torch.bfloat16, lengths=lengths)
        want = round_trip(s, 4)
        graph = captured(lambda s=s: round_trip(s, 4))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(graph.kept, want)
    cu = cu_of([0, 0], "cuda")
    q = torch.zeros(0, 64, device="cuda")
    assert hk.dechunk(hk.pool(q, r := hk.route(q, q, cu, max_chunks=2)), r).shape == (0, 64)
