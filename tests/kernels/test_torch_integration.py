"""opcheck, torch.compile, autocast, determinism: the ops as PyTorch sees them."""

import pytest
import torch

import hnet_kernels as hk

from .cases import INTERPRETED, LONG, PACKS, assert_close, cu_of, leaf, qk_with_rate, rand, routing_with
from .test_pool import on_device

OPS = torch.ops.hnet_kernels


def routed(device, max_chunks=None):
    r = on_device(routing_with("random", PACKS["ragged"], max_chunks), device)
    return r, r.chunk_start.shape[0]


@pytest.mark.parametrize("budget", [None, 60])
def test_opcheck_route(native, budget):
    backend, device = native
    q, k = (x.to(device).requires_grad_() for x in qk_with_rate(254, 33, 0.3))
    cu = cu_of(PACKS["ragged"], device)
    bias = torch.tensor(0.1, device=device, requires_grad=True)
    torch.library.opcheck(OPS.route, (q, k, cu, bias, None, budget, False, backend))


@pytest.mark.parametrize("mode", ["boundary", "mean", "max", "last"])
def test_opcheck_pool(native, mode):
    backend, device = native
    r, _ = routed(device)
    x = leaf(rand(254, 33).to(device))
    torch.library.opcheck(OPS.pool, (x, r.chunk_start, r.chunk_index, r.cu_chunks, r.cu_seqlens, mode, backend))


@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck_dechunk(native, with_residual):
    backend, device = native
    r, M = routed(device)
    z, residual = leaf(rand(M, 33).to(device)), leaf(rand(254, 33).to(device)) if with_residual else None
    p, c = leaf(r.boundary_prob), leaf(r.selected_prob)
    args = (z, p, c, r.chunk_start, r.chunk_index, r.cu_chunks, r.cu_seqlens, residual, backend == "triton", backend)
    torch.library.opcheck(OPS.dechunk, args)


@pytest.mark.parametrize("with_state", [False, True])
def test_opcheck_ema(native, with_state):
    backend, device = native
    cu = cu_of(PACKS["ragged"], device)
    state = leaf(rand(7, 33).to(device)) if with_state else None
    torch.library.opcheck(
        OPS.ema, (leaf(rand(254, 33).to(device)), leaf(torch.rand(254, device=device)), cu, state, backend)
    )


def test_opcheck_steps(native):
    backend, device = native
    q, k = (x.to(device) for x in qk_with_rate(8, 33, 0.3))
    torch.library.opcheck(OPS.route_step, (q, k, None, None, None, backend))
    mask = torch.rand(8, device=device) > 0.5
    torch.library.opcheck(OPS.dechunk_step, (q, torch.rand(8, device=device), mask, k, None, backend))


def round_trip(q, k, x, residual, cu, budget, backend):
    with hk.backend(backend):
        r = hk.route(q, k, cu, max_chunks=budget)
        z = hk.pool(x, r)
        out = hk.dechunk(z * 2, r, residual)
        loss = out.float().square().mean() + hk.ratio_loss(r, 3.0) + r.entropy_sum.sum() / q.shape[0]
    return loss, out, r.chunk_start


def check_compiled(backend, device, budget, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(round_trip, fullgraph=True, backend=compiler)
    for lengths in (PACKS["ragged"], [90, 164]):  # another layout must not need another graph kind
        q, k = (leaf(x.to(device)) for x in qk_with_rate(254, 32, 0.3))
        x, residual = leaf(rand(254, 32).to(device)), leaf(rand(254, 32, seed=1).to(device))
        cu = cu_of(lengths, device)
        want = round_trip(q, k, x, residual, cu, budget, backend)
        dwant = torch.autograd.grad(want[0], (q, k, x, residual))
        got = compiled(q, k, x, residual, cu, budget, backend)
        dgot = torch.autograd.grad(got[0], (q, k, x, residual))
        assert torch.equal(got[2], want[2])
        for g, w in zip((*got[:2], *dgot), (*want[:2], *dwant), strict=True):
            assert_close(g.detach(), w.detach(), 2e-5)


@pytest.mark.parametrize("budget", [None, 100])
def test_compile_fullgraph(on, budget):
    backend, device = on
    check_compiled(backend, device, budget, "aot_eager" if on == ("reference", "cpu") else "inductor")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="no kernel of ours is in it")
def test_inductor_compiles_the_reference():
    """Its C++ takes a minute to compile."""
    check_compiled("reference", "cpu", None, "inductor")


def test_compile_ema(on):
    backend, device = on
    torch._dynamo.reset()

    def f(z, p, cu):
        return hk.ema(z, p, cu, backend=backend)

    z, p, cu = leaf(rand(254, 32).to(device)), leaf(torch.rand(254, device=device)), cu_of(PACKS["ragged"], device)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(z, p, cu).square().sum(), (z, p))
    want = torch.autograd.grad(f(z, p, cu).square().sum(), (z, p))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, 2e-5)


def test_autocast(on):
    """Inside autocast the ops take what the projections give, mixed dtypes included, and still compute in fp32."""
    backend, device = on
    q, k = (x.to(device) for x in qk_with_rate(254, 32, 0.3))
    cu = cu_of(PACKS["ragged"], device)
    with pytest.raises(TypeError, match="dtype of q"):
        hk.route(q, k.bfloat16(), cu, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        r = hk.route(q, k.bfloat16(), cu, backend=backend)
        z = hk.pool(q, r, backend=backend)
        out = hk.dechunk(z.bfloat16(), r, q, backend=backend)
    want = hk.route(q.bfloat16(), k.bfloat16(), cu, backend=backend)
    assert torch.equal(r.boundary_prob, want.boundary_prob)
    assert r.boundary_prob.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = hk.route(q, k, cu, backend=backend)
    assert torch.equal(inside.boundary_prob, hk.route(q, k, cu, backend=backend).boundary_prob)


def all_results(on, threads):
    backend, device = on
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lengths = LONG["ragged long"]
        cu, T = cu_of(lengths, device), sum(lengths)
        q, k = (leaf(x.to(device)) for x in qk_with_rate(T, 96, 0.3))
        x, residual = leaf(rand(T, 96).to(device)), leaf(rand(T, 96, seed=1).to(device))
        bias, p = (
            leaf(torch.tensor(0.1, device=device)),
            leaf(torch.rand(T, generator=torch.Generator().manual_seed(0)).to(device)),
        )
        with hk.backend(backend):
            r = hk.route(q, k, cu, logit_bias=bias)
            outs = [hk.dechunk(hk.pool(x, r, mode), r, residual) for mode in ("boundary", "mean", "max", "last")]
            y, final = hk.ema(x, p, cu, return_final_state=True)
        loss = sum(o.square().sum() for o in outs) + (y * residual).sum() + final.sum() + r.prob_sum.square().sum()
        loss = loss + r.entropy_sum.square().sum()
        grads = torch.autograd.grad(loss, (q, k, x, residual, bias, p))
        return [*r, *outs, y, final, *grads]
    finally:
        torch.set_num_threads(before)


def test_same_bits_every_time_and_for_any_thread_count(native):
    once, again, alone, many = (all_results(native, n) for n in (2, 2, 1, 5))
    for other in (again, alone, many):
        for a, b in zip(once, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("N", [0, 1, 3])
def test_no_positions(on, N):
    backend, device = on
    cu = torch.zeros(N + 1, dtype=torch.int32, device=device)
    q, k, x = (torch.zeros(0, 8, device=device, requires_grad=True) for _ in range(3))
    for budget in (None, 4):
        with hk.backend(backend):
            r = hk.route(q, k, cu, max_chunks=budget)
            assert r.chunk_start.shape == (budget or 0,)
            assert r.cu_chunks.tolist() == [0] * (N + 1)
            for mode in ("boundary", "mean", "max", "last"):
                z = hk.pool(x, r, mode)
                assert z.shape == (budget or 0, 8)
                assert (z == 0).all()
            out = hk.dechunk(z, r, x)
            y, final = hk.ema(x, torch.zeros(0, device=device), cu, return_final_state=True)
            loss = out.sum() + y.sum() + hk.ratio_loss(r, 2.0) + r.boundary_prob.sum()
        assert out.shape == (0, 8)
        assert final.shape == (N, 8)
        loss.backward()
