"""torch.compile(fullgraph=True) of every op on the card, forward and backward, against eager; static shapes also as one
CUDA graph (mode "reduce-overhead")."""

import pytest
import torch

import hnet_kernels as hk

from ..kernels.cases import assert_close, leaf, rand
from .stage import make_stage, round_trip

pytestmark = pytest.mark.gpu


def ema(s):
    p = torch.sigmoid(s.x[:, 0].float())
    y, final = hk.ema(s.x, p, s.cu, return_final_state=True)
    return y, final


def route(s, **kw):
    r = hk.route(s.q, s.k, s.cu, max_chunks=1600, **kw)
    return r.boundary_prob, r.selected_prob, r.prob_sum, r.entropy_sum, hk.ratio_loss(r, 3.0)


def exact_route(s):
    r = hk.route(s.q, s.k, s.cu)
    return r.boundary_prob, r.selected_prob, hk.pool(s.x, r), hk.dechunk(hk.pool(s.x, r), r, s.residual)


def dechunk(s):
    r = hk.route(s.q, s.k, s.cu, max_chunks=1600)
    z = hk.pool(s.x, r)
    return hk.dechunk(z, r), hk.dechunk(z * 2, r, s.residual)


def pool(mode):
    return lambda s: (hk.pool(s.x, hk.route(s.q, s.k, s.cu, max_chunks=1600), mode),)


OPS = {
    "route": route,
    "route with a bias": lambda s: route(s, logit_bias=0.3),
    "route with candidates": lambda s: route(s, candidates=s.x[:, 0] > -1),
    "exact shapes": exact_route,
    "dechunk": dechunk,
    "ema": ema,
    **{f"pool {mode}": pool(mode) for mode in ("boundary", "mean", "max", "last")},
}


def gradients(outs, s):
    """Of whatever the outputs depend on."""
    total = sum((o.float() * rand(o.numel()).to(o.device).view_as(o)).sum() for o in outs if o.requires_grad)
    grads = torch.autograd.grad(total, (s.q, s.k, s.x, s.residual), allow_unused=True)
    return [g for g in grads if g is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_fullgraph(op, dtype):
    torch._dynamo.reset()
    compiled = torch.compile(OPS[op], fullgraph=True)
    for lengths in ([700, 1, 1500, 0, 299], [90, 1264, 0, 0, 30]):  # another length must not need another kind of graph
        s = make_stage("cuda", dtype, lengths=lengths)
        want, got = OPS[op](s), compiled(s)
        for g, w in zip((*got, *gradients(got, s)), (*want, *gradients(want, s)), strict=True):
            assert_close(g.detach(), w.detach(), 2e-5 if dtype == torch.float32 else 8e-3, op)


def test_steps():
    torch._dynamo.reset()

    def step(q, k, z, state, residual):
        prob, mask, selected = hk.route_step(q, k)
        return prob, mask, selected, *hk.dechunk_step(z, prob, mask, state, residual)

    compiled = torch.compile(step, fullgraph=True)
    for B in (1, 7, 64):
        q, k, z, residual = (rand(B, 96, dtype=torch.bfloat16, seed=i).cuda() for i in range(4))
        state = rand(B, 96).cuda()
        for g, w in zip(compiled(q, k, z, state, residual), step(q, k, z, state, residual), strict=True):
            assert torch.equal(g, w)


def test_reduce_overhead():
    """The compiler's own CUDA graphs, which copy inputs and reuse outputs: several rounds, each with new inputs."""
    torch._dynamo.reset()

    def step(q, k, x, residual, cu):
        r = hk.route(q, k, cu, max_chunks=1600)
        out = hk.dechunk(hk.pool(x, r), r, residual)
        return out.float().square().mean() + hk.ratio_loss(r, 4.0)

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        s = make_stage("cuda", torch.bfloat16, seed=seed)
        inputs = [leaf(t) for t in (s.q, s.k, s.x, s.residual)]
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(*inputs, s.cu)
        got = [g.clone() for g in torch.autograd.grad(loss, inputs)]
        want = torch.autograd.grad(step(*inputs, s.cu), inputs)
        for g, w in zip(got, want, strict=True):
            assert_close(g, w, 8e-3)


def test_round_trip_matches_the_reference():
    """Not compiled: the same results from the kernels and from plain PyTorch on the same card."""
    s = make_stage("cuda", torch.float32)
    got, want = round_trip(s, 1600, "triton"), round_trip(s, 1600, "reference")
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_close(g.detach().float(), w.detach().float(), 2e-5, f"result {i}")
