"""The CUDA C++ kernels: the op tests again on a GPU, and on the CPU by cuda_emulator.h, which runs the same source.

The emulator proves what the kernels compute and where they wait, for any order of the threads between two barriers. It
proves nothing about speed or the GPU's memory model; for those there are the tests marked gpu.
"""

import pytest
import torch

import hnet_kernels as hk
from hnet_kernels import dispatch, reference

from .cases import LONG, PACKS, assert_close, cu_of, qk_with_rate, rand
from .test_entropy import (  # noqa: F401
    test_certain_positions_have_none_and_no_gradient,
    test_is_exact_however_sure_the_router_is,
)
from .test_route import (  # noqa: F401
    DTYPES,
    test_budget,
    test_budget_breaks_ties_towards_the_earlier_position,
    test_candidates,
    test_extremes,
    test_forward,
    test_forward_long,
    test_gradients_with_budget,
    test_large_norms_and_long_rows_keep_precision,
    test_logit_bias,
    test_padded_rows_are_ignored,
    test_rows_of_a_wider_matrix,
    test_split_equals_whole,
    test_step_equals_full,
    test_tie_is_no_boundary_and_opposite_is_one,
    test_zero_rows_do_not_divide_by_zero,
)
from .test_torch_integration import test_opcheck_route, test_opcheck_steps  # noqa: F401


@pytest.fixture(params=[pytest.param("cpu", id="emulated"), pytest.param("cuda", id="cuda-gpu", marks=pytest.mark.gpu)])
def on(request):
    """(backend, device) of the tests above"""
    if request.param == "cpu":
        request.getfixturevalue("on_emulator")
    elif (reason := dispatch.why_not("cuda", "route", "cuda", torch.float32)) is not None:
        pytest.skip(reason)
    return "cuda", request.param


@pytest.fixture(name="native")
def _native(on):
    return on


def check_layout(r: hk.Routing, candidates=None):
    """Everything that follows from the probabilities, worked out from those of r itself: exact, however they round."""
    r = hk.Routing(*(x.cpu() for x in r))
    T, M, p = r.chunk_index.shape[0], r.chunk_start.shape[0], r.boundary_prob
    first = reference.starts(r.cu_seqlens, T)
    valid = torch.arange(T) < r.cu_seqlens[-1]
    wanted = first | ((p > 0.5) & valid & (True if candidates is None else candidates))
    kept = reference.drop_past_budget(wanted, p, first, M)
    assert torch.equal(r.boundary_mask, kept)
    assert torch.equal(r.selected_prob, torch.where(kept, p, 1 - p))
    assert torch.equal(r.chunk_index, kept.cumsum(0).int() - 1)
    chunks = int(kept.sum())
    assert torch.equal(r.chunk_start[:chunks], kept.nonzero().flatten().int())
    assert (r.chunk_start[chunks:] == r.cu_seqlens[-1]).all()
    before = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
    assert torch.equal(r.cu_chunks, before[r.cu_seqlens.long()].int())
    assert int(r.num_dropped) == int(wanted.sum()) - chunks
    for name, each in (("prob_sum", p.double()), ("entropy_sum", reference.entropy(p.double()))):
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), each.cumsum(0)])[r.cu_seqlens.long()].diff()
        assert_close(getattr(r, name), sums, 1e-6, name)


def same(a: hk.Routing, b: hk.Routing) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_any_number_of_blocks_and_sequences(on_emulator, seed):
    """Random packs (many sequences empty), budgets, padding and ties; every number of blocks gives the same layout."""
    g = torch.Generator().manual_seed(seed)

    def draw(high):
        return int(torch.randint(high, (), generator=g))

    N = [1, 3, 20, 400][seed % 4]
    lengths = [draw(1 + [500, 120, 40, 4][seed % 4]) * (draw(3) > 0) for _ in range(N)]
    T = sum(lengths) + (17 if seed % 3 == 0 else 0)
    q, k = qk_with_rate(T, 4, 0.5, seed=seed)
    if seed % 2:  # few different probabilities
        q, k = q.sign(), k.sign()
    candidates = torch.rand(T, generator=g) < 0.8 if draw(2) else None
    cu = cu_of(lengths)
    for budget in (max(N, 1), max(N, T // 4), max(N, T + 5)):
        results = []
        for blocks in (1, 2, 5, 13, 13):
            on_emulator.set_resident_blocks(blocks)
            r = hk.route(q, k, cu, candidates=candidates, max_chunks=budget, padded=True, backend="cuda")
            check_layout(r, candidates)
            results.append(r)
        for r in results[1:]:
            rounded = {name: getattr(results[0], name) for name in ("prob_sum", "entropy_sum")}
            assert same(r._replace(**rounded), results[0])
        assert same(results[-1], results[-2])
    r = hk.route(q, k, cu, candidates=candidates, padded=True, backend="cuda")
    assert r.chunk_start.shape[0] == int(r.num_chunks)
    check_layout(r, candidates)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_no_positions(on, lengths):
    backend, device = on
    q = torch.zeros(0, 8, device=device)
    for budget in (None, 4):
        r = hk.route(q, q, cu_of(lengths, device), max_chunks=budget, backend=backend)
        assert r.chunk_start.tolist() == [0] * (budget or 0)
        assert r.cu_chunks.tolist() == [0] * (len(lengths) + 1)
        assert r.prob_sum.tolist() == r.entropy_sum.tolist() == [0] * len(lengths)
        assert r.num_dropped.item() == 0
    assert hk.route_step(q, q, backend=backend)[0].shape == (0,)
    assert hk.dechunk_step(q, torch.zeros(0, device=device), q.new_zeros(0, dtype=torch.bool), q, backend=backend)[
        0
    ].shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 33, 1024])
def test_rows_of_any_alignment_give_the_same_bits(on, D, dtype):
    backend, device = on
    q, k = (x.to(device) for x in qk_with_rate(20, D, 0.4, dtype))
    want = hk.route(q, k, cu_of([20], device), backend=backend)
    for at in (1, 3):
        wide = torch.zeros(20, 2 * D + 8, dtype=dtype, device=device)
        wide[:, at : at + D], wide[:, at + D : at + 2 * D] = q, k
        got = hk.route(wide[:, at : at + D], wide[:, at + D : at + 2 * D], cu_of([20], device), backend=backend)
        assert same(got, want)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_route_step(on, dtype, first):
    backend, device = on
    q, k = qk_with_rate(9, 40, 0.5, dtype)
    is_first = torch.arange(9) % 3 == 0 if first else None
    candidates = torch.arange(9) % 2 == 0
    bias = torch.tensor(0.3)
    want = reference.route_step(q, k, is_first, bias, candidates)
    args = {"is_first": is_first, "candidates": candidates, "logit_bias": bias}
    args = {n: x if x is None else x.to(device) for n, x in args.items()}
    got = hk.route_step(q.to(device), k.to(device), **args, backend=backend)
    for name, g, w in zip(("prob", "mask", "selected"), got, want, strict=True):
        assert g.dtype == w.dtype
        assert_close(g.cpu(), w, 2e-6, name)


@pytest.mark.parametrize("residual_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 33, 1024])
def test_dechunk_step(on, D, dtype, residual_dtype):
    backend, device = on
    B = 6
    z, state = rand(B, 2 * D, dtype=dtype)[:, ::2], rand(B, D, seed=1)
    residual = None if residual_dtype is None else rand(D, B, dtype=residual_dtype, seed=2).T
    p, mask = torch.tensor([1.0, 0.6, 0.0, 0.51, 0.9, 0.3]), torch.tensor([True, True, False, True, True, False])
    want = reference.dechunk_step(z, p, mask, state, residual)
    args = [None if x is None else x.to(device) for x in (z, p, mask, state, residual)]
    before = args[3].clone()
    out, new_state = hk.dechunk_step(*args, backend=backend)
    assert_close(new_state.cpu(), want[1], 1e-6, "state")
    assert_close(out.cpu(), want[0], {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype], "out")
    assert out.dtype == dtype
    assert torch.equal(args[3], before)


def test_same_bits_every_time(on):
    backend, device = on
    lengths = LONG["ragged long"]
    q, k = (x.to(device) for x in qk_with_rate(sum(lengths), 96, 0.4))
    for budget in (None, 300):
        once, again = (hk.route(q, k, cu_of(lengths, device), max_chunks=budget, backend=backend) for _ in range(2))
        assert same(once, again)


def test_ops_without_a_kernel_say_so():
    for op in ("pool", "dechunk", "ema"):
        reason = dispatch.why_not("cuda", op, "cuda", torch.float32)
        assert "triton" in reason or "without CUDA" in reason
    assert not dispatch.CUDA_PREFERRED  # until benchmarks/results shows one ahead


# --- on a GPU only ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    if (reason := dispatch.why_not("cuda", "route", "cuda", torch.float32)) is not None:
        pytest.skip(reason)
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [None, 20_000, 200_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_packs_fill_the_gpu(gpu, dtype, budget):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 3000, (173,), generator=g).tolist()
    q, k = torch.randn(2, sum(lengths), 256, device=gpu, generator=torch.Generator(gpu).manual_seed(0)).to(dtype)
    cu = cu_of(lengths, gpu)
    r = hk.route(q, k, cu, max_chunks=budget, backend="cuda")
    check_layout(r)
    assert same(r, hk.route(q, k, cu, max_chunks=budget, backend="cuda"))
    plain = reference.boundary_probability(q[:-1], k[1:], 0.0)
    inside = ~reference.starts(cu, q.shape[0])[1:]
    assert (r.boundary_prob[1:] - plain)[inside].abs().max() < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [[300_000], [1] * 200_000, [0] * 100_000 + [5] + [0] * 100_000], ids=["one", "single positions", "empty"]
)
def test_extreme_packs(gpu, lengths):
    q, k = torch.randn(2, sum(lengths), 16, device=gpu)
    for budget in (None, max(len(lengths), sum(lengths) // 10)):
        check_layout(hk.route(q, k, cu_of(lengths, gpu), max_chunks=budget, backend="cuda"))


@pytest.mark.gpu
def test_graph_capture_and_no_sync(gpu):
    lengths, budget = PACKS["ragged"], 60
    q, k = (x.to(gpu) for x in qk_with_rate(254, 64, 0.5))
    cu, other = cu_of(lengths, gpu), qk_with_rate(254, 64, 0.5, seed=1)
    z, state = torch.randn(2, 254, 64, device=gpu)

    def work():
        r = hk.route(q, k, cu, max_chunks=budget, backend="cuda")
        p, mask, _ = hk.route_step(q, k, backend="cuda")
        return *r, *hk.dechunk_step(z, p, mask, state, backend="cuda")

    work()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for new in (qk_with_rate(254, 64, 0.5), other):  # the second replay meets other numbers in the same scratch memory
        q.copy_(new[0])
        k.copy_(new[1])
        graph.replay()
        for a, b in zip(captured, work(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_rows_past_two_to_the_31(gpu):
    D = 4096
    T = 2**31 // D + 1000
    if torch.cuda.mem_get_info()[0] < 5 * T * D:
        pytest.skip("needs 11 GB of GPU memory")
    q = torch.randn(T, D, device=gpu, dtype=torch.bfloat16)
    r = hk.route(q, q, cu_of([T - 7, 7], gpu), max_chunks=T, backend="cuda")
    alone = hk.route(q[-500:-7], q[-500:-7], cu_of([493], gpu), max_chunks=T, backend="cuda")
    assert torch.equal(r.boundary_prob[-499:-7], alone.boundary_prob[1:])
    check_layout(r)


@pytest.mark.gpu
def test_a_stream_of_ones_own(gpu):
    """The kernels run where PyTorch's current stream says: behind the slow work that makes their input."""
    q, k = torch.randn(2, 4096, 64, device=gpu)
    want = hk.route(q * 3, k, cu_of([4096], gpu), max_chunks=4096, backend="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        torch.cuda._sleep(10_000_000)
        got = hk.route(q * 3, k, cu_of([4096], gpu), max_chunks=4096, backend="cuda")
    torch.cuda.synchronize()
    assert same(got, want)


@pytest.mark.gpu
def test_another_device_than_the_current_one(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k = qk_with_rate(254, 64, 0.5)
    here, there = (
        hk.route(q.to(d), k.to(d), cu_of(PACKS["ragged"], d), max_chunks=60, backend="cuda")
        for d in ("cuda:0", "cuda:1")
    )
    assert torch.cuda.current_device() == 0
    assert same(hk.Routing(*(x.cpu() for x in here)), hk.Routing(*(x.cpu() for x in there)))
