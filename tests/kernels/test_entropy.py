"""`Routing.entropy_sum`: the entropy of boundary probabilities, summed by `route` and taken into its backward."""

import math

import pytest
import torch

import hnet_kernels as hk
from hnet_kernels import native as native_kernels

from . import oracle
from .cases import PACKS, ROUNDING, assert_close, cu_of, leaf, qk_with_rate, rand


def qk_with(p, D=2):
    """fp32 rows whose boundary probabilities are close to p"""
    T = p.shape[0]
    q, k = torch.zeros(T, D), torch.zeros(T, D)
    q[:, 0] = 1.0
    angle = torch.arccos(1 - 2 * p.double())
    k[:, 0], k[:, -1] = angle.cos(), angle.sin()
    return q, k


@pytest.mark.parametrize("bias", [None, 1.5, -2.0])
def test_is_exact_however_sure_the_router_is(on, bias):
    """Within 1e-6 of what the probabilities have, be they 1e-7 or 1 - 1e-7: 1 - p has lost half of its digits there."""
    backend, device = on
    exponent = 0.3 + 6.7 * torch.rand(220, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sure, lengths = 10**-exponent, [1, 40, 0, 69, 110]
    for p in (sure, 1 - sure, sure * 1e-2 + 1e-5, 0.5 + 0.4 * (sure - sure.mean())):
        q, k = qk_with(p)
        cu = cu_of(lengths)
        r = hk.route(q.to(device), k.to(device), cu.to(device), logit_bias=bias, backend=backend)
        want = oracle.entropy_sum(r.boundary_prob.cpu(), cu)
        assert ((r.entropy_sum.cpu() - want).abs() <= 1e-6 * want).all()
        assert r.entropy_sum.dtype == torch.float32


@pytest.mark.parametrize("bias", [None, 0.7])
def test_certain_positions_have_none_and_no_gradient(on, bias):
    """p = 0 and 1 exactly, first positions, a sequence of one position, none and padding"""
    backend, device = on
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    q = torch.stack([one] * 7 + [torch.full((2,), float("nan"))])
    k = torch.stack([other, one, -one, other, one, other, other, q[-1]])  # p = 1st 0 1 1/2 | 1st 1/2 | 1st | padding
    q, k = leaf(q.to(device)), leaf(k.to(device))
    cu = cu_of([4, 2, 0, 1], device)
    r = hk.route(q, k, cu, logit_bias=bias, padded=True, backend=backend)
    assert r.boundary_prob[:3].tolist() == [1.0, 0.0, 1.0]
    p = 1 / (1 + math.exp(-(bias or 0)))
    half = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert_close(r.entropy_sum.cpu(), torch.tensor([half, half, 0.0, 0.0]), 1e-6)
    dq, dk = torch.autograd.grad(r.entropy_sum.sum(), (q, k))
    certain = [0, 1, 2, 4, 6, 7]
    assert (dk[certain] == 0).all()
    assert (dq[[t - 1 for t in certain]] == 0).all()
    slope = math.log((1 - p) / p) * p * (1 - p) * 4 / 2  # d entropy / d p, d p / d raw p, d raw p / d -cos
    assert (dk.cpu()[[3, 5]] + slope * one).abs().max() < 1e-6
    assert dk.isfinite().all()
    assert dq.isfinite().all()


@pytest.mark.parametrize("bias", [None, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pack", [name for name in PACKS if name != "one position"])
def test_gradients(on, pack, dtype, bias):
    """Of the entropy alone, with a weight for every sequence"""
    backend, device = on
    cu, weights = cu_of(PACKS[pack]), rand(len(PACKS[pack]), dtype=torch.float64)
    q, k = qk_with_rate(int(cu[-1]), 33, 0.3, dtype)
    grads = []
    for route, move in ((oracle.route, torch.Tensor.double), (hk.route, lambda x: x.to(device))):
        leaves = [leaf(move(x)) for x in ([q, k] if bias is None else [q, k, torch.tensor(bias)])]
        options = {} if route is oracle.route else {"backend": backend}
        r = route(*leaves[:2], cu.to(leaves[0].device), logit_bias=None if bias is None else leaves[2], **options)
        total = (weights.to(r.entropy_sum) * r.entropy_sum).sum()
        grads.append([g.cpu() for g in torch.autograd.grad(total, leaves)])
    want, got = grads
    for name, g, w in zip(("dq", "dk", "dbias"), got, want, strict=False):
        assert_close(g, w, 1e-5 * 254**0.5 if name == "dbias" else 1.2 * ROUNDING[dtype], name)


def test_every_path_into_p_at_once(on):
    """A gradient for the entropy and one for p and the sum of p is the sum of both apart."""
    backend, device = on
    q, k = (leaf(x.to(device)) for x in qk_with_rate(254, 33, 0.3))
    cu = cu_of(PACKS["ragged"], device)
    r = hk.route(q, k, cu, logit_bias=0.2, max_chunks=40, backend=backend)
    assert torch.equal(r.entropy_sum, hk.route(q, k, cu, logit_bias=0.2, backend=backend).entropy_sum)
    parts = r.boundary_prob.square().sum(), r.selected_prob.sum(), r.prob_sum.square().sum(), -r.entropy_sum.sum()
    both = torch.autograd.grad(sum(parts), (q, k), retain_graph=True)
    apart = [torch.autograd.grad(part, (q, k), retain_graph=True) for part in parts]
    for got, *each in zip(both, *apart, strict=True):
        assert_close(got, sum(each), 1e-5)


def test_costs_nothing_where_nobody_asks(monkeypatch):
    """The backward is told so, and takes no logarithm."""
    given = []
    plain = native_kernels.route_bwd
    monkeypatch.setattr(native_kernels, "route_bwd", lambda *args: given.append(args[9]) or plain(*args))
    q, k = (leaf(x) for x in qk_with_rate(254, 33, 0.3))
    r = hk.route(q, k, cu_of(PACKS["ragged"]), backend="cpu")
    torch.autograd.grad(r.boundary_prob.sum() + r.prob_sum.sum(), (q, k), retain_graph=True)
    torch.autograd.grad(r.entropy_sum.sum(), (q, k))
    assert given[0] is None
    assert given[1].shape == (7,)
