import pytest
import torch

import hnet_kernels as hk
from hnet_kernels import validation

from . import oracle
from .cases import LONG, PACKS, ROUNDING, assert_close, cu_of, leaf, qk_with_rate, rand

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGER = ("boundary_mask", "chunk_index", "chunk_start", "cu_chunks", "cu_seqlens", "num_dropped")


def run(on, q, k, cu, **kw):
    backend, device = on
    kw = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in kw.items()}
    return hk.route(q.to(device), k.to(device), cu.to(device), backend=backend, **kw)


def check(r, want, tol=2e-6):
    for name in INTEGER:
        assert torch.equal(getattr(r, name).cpu(), getattr(want, name)), name
    for name in ("boundary_prob", "selected_prob", "prob_sum"):
        assert_close(getattr(r, name).cpu(), getattr(want, name), tol, name)
        assert getattr(r, name).dtype == torch.float32
    # of its own p: where that is 0 or 1 the entropy rises infinitely fast
    assert_close(
        r.entropy_sum.cpu(), oracle.entropy_sum(r.boundary_prob.detach().cpu(), want.cu_seqlens), tol, "entropy_sum"
    )
    assert int(r.num_chunks) == int(want.num_chunks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 33, 64, 1024])
@pytest.mark.parametrize("pack", PACKS)
def test_forward(on, pack, D, dtype):
    cu = cu_of(PACKS[pack])
    q, k = qk_with_rate(int(cu[-1]), D, 0.3, dtype)
    check(run(on, q, k, cu), oracle.route(q, k, cu))


@pytest.mark.parametrize("pack", LONG)
def test_forward_long(on, pack):
    cu = cu_of(LONG[pack])
    q, k = qk_with_rate(int(cu[-1]), 64, 0.2)
    check(run(on, q, k, cu), oracle.route(q, k, cu))


@pytest.mark.parametrize("rate", [0.0, 1.0], ids=["no boundaries", "all boundaries"])
def test_extremes(on, rate):
    cu = cu_of(PACKS["ragged"])
    q, k = qk_with_rate(int(cu[-1]), 32, rate)
    r = run(on, q, k, cu)
    check(r, oracle.route(q, k, cu))
    assert int(r.num_chunks) == (5 if rate == 0 else 254)


def test_tie_is_no_boundary_and_opposite_is_one(on):
    q = torch.tensor([[1.0, 0.0]] * 4)
    k = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [5.0, 0.0]])  # cos 0, -1, 1 against the row before
    r = run(on, q, k, cu_of([4]))
    assert r.boundary_prob.tolist() == [1.0, 0.5, 1.0, 0.0]
    assert r.boundary_mask.tolist() == [True, False, True, False]
    assert r.selected_prob.tolist() == [1.0, 0.5, 1.0, 1.0]


def test_zero_rows_do_not_divide_by_zero(on):
    q, k = torch.zeros(3, 5), torch.zeros(3, 5)
    r = run(on, q, k, cu_of([3]))
    assert r.boundary_prob.tolist() == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("bias", [-1.0, 0.7])
def test_logit_bias(on, bias):
    cu = cu_of(PACKS["ragged"])
    q, k = qk_with_rate(254, 33, 0.3)
    check(run(on, q, k, cu, logit_bias=bias), oracle.route(q, k, cu, bias))
    check(run(on, q, k, cu, logit_bias=torch.tensor(bias)), oracle.route(q, k, cu, bias))


@pytest.mark.parametrize("bias", [-80.0, -44.0, 44.0, 80.0])
def test_large_biases_saturate(on, bias):
    q, k = qk_with_rate(64, 8, 0.3)
    q[:3], k[:3] = 0, 0  # p = 1/2
    q[10] = -k[11]  # p = 1
    cu = cu_of([64])
    for value in (bias, torch.tensor(bias)):
        p = run(on, q, k, cu, logit_bias=value).boundary_prob.cpu()[1:]
        torch.testing.assert_close(p, torch.where(p > 0.5, 1.0, 0.0), rtol=0, atol=2e-10)
        assert ((p > 0.5) == (bias > 0)).sum() >= 60
    for grad in gradients(lambda *a, **kw: run(on, *a, **kw), q, k, torch.tensor(bias), cu):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("bias", [-1e30, -89.0, 89.0, float("inf")])
def test_a_bias_nobody_could_check_gives_no_nan(on, bias, monkeypatch):
    """On a GPU the value is not looked at, which would wait for it."""
    monkeypatch.setattr(validation, "readable", lambda x: False)
    q, k = qk_with_rate(64, 8, 0.3)
    r = run(on, q, k, cu_of([64]), logit_bias=torch.tensor(bias))
    limit = run(on, q, k, cu_of([64]), logit_bias=torch.tensor(80.0 if bias > 0 else -80.0))
    assert torch.equal(r.boundary_prob, limit.boundary_prob)
    assert torch.isfinite(r.boundary_prob).all()


def test_candidates(on):
    cu = cu_of(PACKS["ragged"])
    q, k = qk_with_rate(254, 33, 0.6)
    candidates = torch.rand(254) < 0.4
    r = run(on, q, k, cu, candidates=candidates)
    check(r, oracle.route(q, k, cu, candidates=candidates))
    first = torch.tensor([s for s, e in oracle.spans(cu) if e > s])
    assert not (r.boundary_mask.cpu() & ~candidates).index_fill(0, first, False).any()


@pytest.mark.parametrize("budget", [7, 30, 100, 254, 400])
def test_budget(on, budget):
    cu = cu_of(PACKS["ragged"])
    q, k = qk_with_rate(254, 33, 0.5)
    r = run(on, q, k, cu, max_chunks=budget)
    check(r, oracle.route(q, k, cu, max_chunks=budget))
    assert r.chunk_start.shape == (budget,)


def test_budget_breaks_ties_towards_the_earlier_position(on):
    q = torch.tensor([[1.0, 0.0]] * 9)
    k = torch.tensor([[-1.0, 0.0]] * 9)  # p = 1 everywhere
    r = run(on, q, k, cu_of([5, 4]), max_chunks=4)
    assert r.boundary_mask.nonzero().flatten().tolist() == [0, 1, 2, 5]
    assert r.num_dropped.item() == 5


def test_padded_rows_are_ignored(on):
    cu = cu_of([20, 30])
    q, k = qk_with_rate(60, 16, 0.4)
    q[50:], k[50:] = float("nan"), float("nan")
    want = oracle.route(q[:50], k[:50], cu, max_chunks=40)
    q, k = leaf(q), leaf(k)
    r = run(on, q, k, cu, max_chunks=40, padded=True)
    for name in ("boundary_prob", "boundary_mask", "chunk_index", "selected_prob"):
        assert_close(getattr(r, name)[:50].cpu(), getattr(want, name), 2e-6, name)
    assert torch.equal(r.chunk_start.cpu(), want.chunk_start)
    assert not r.boundary_mask[50:].any()
    assert (r.boundary_prob[50:] == 0).all()
    (r.boundary_prob.sum() + r.selected_prob.square().sum()).backward()
    assert (q.grad[49:] == 0).all()
    assert (k.grad[50:] == 0).all()
    assert not q.grad.isnan().any()


def gradients(route, q, k, bias, cu, **kw):
    q, k, bias = leaf(q), leaf(k), leaf(bias)
    r = route(q, k, cu, logit_bias=bias, **kw)
    outs = r.boundary_prob, r.selected_prob, r.prob_sum, r.entropy_sum
    weights = [rand(*x.shape, seed=i).to(x.device, torch.float64) for i, x in enumerate(outs)]
    loss = sum((w * x.double()).sum() for w, x in zip(weights, outs, strict=True))
    if not loss.requires_grad:  # a lone first position: p = 1 is a constant
        return tuple(torch.zeros_like(x) for x in (q, k, bias))
    grads = torch.autograd.grad(loss, (q, k, bias), allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, (q, k, bias), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [2, 33, 64, 1024])
@pytest.mark.parametrize("pack", PACKS)
def test_gradients(on, pack, D, dtype):
    cu = cu_of(PACKS[pack])
    q, k = qk_with_rate(int(cu[-1]), D, 0.3, dtype)
    bias = torch.tensor(0.3)
    want = gradients(oracle.route, q.double(), k.double(), bias.double(), cu)
    got = gradients(lambda *a, **kw: run(on, *a, **kw), q, k, bias, cu)
    for name, g, w in zip(("dq", "dk"), got, want, strict=False):
        assert_close(g.cpu(), w, 1.2 * ROUNDING[dtype], name)
    assert abs(got[2].item() - want[2].item()) < 1e-5 * int(cu[-1]) ** 0.5


def test_gradients_with_budget(on):
    cu = cu_of(PACKS["ragged"])
    q, k = qk_with_rate(254, 33, 0.5)
    bias = torch.tensor(-0.2)
    want = gradients(oracle.route, q.double(), k.double(), bias.double(), cu, max_chunks=60)
    got = gradients(lambda *a, **kw: run(on, *a, **kw), q, k, bias, cu, max_chunks=60)
    for name, g, w in zip(("dq", "dk"), got, want, strict=False):
        assert_close(g.cpu(), w, 1e-5, name)


def test_gradient_of_zero_rows_is_finite(on):
    q, k = torch.zeros(3, 5, requires_grad=True), torch.zeros(3, 5, requires_grad=True)
    run(on, q, k, cu_of([3])).boundary_prob.sum().backward()
    assert (q.grad == 0).all()
    assert (k.grad == 0).all()


def test_rows_of_a_wider_matrix(on):
    """q and k as two halves of one fused projection, and transposed storage."""
    cu = cu_of(PACKS["ragged"])
    q, k = qk_with_rate(254, 48, 0.3)
    both = leaf(torch.cat([q, k], 1))
    r = run(on, both[:, :48], both[:, 48:], cu)
    check(r, oracle.route(q, k, cu))
    (grad,) = torch.autograd.grad(r.boundary_prob.square().sum(), both)
    q, k = leaf(q), leaf(k)
    want = torch.autograd.grad(run(on, q, k, cu).boundary_prob.square().sum(), (q, k))
    assert torch.equal(grad, torch.cat(want, 1))
    check(run(on, q.detach().T.contiguous().T, k, cu), oracle.route(q, k, cu))


def test_large_norms_and_long_rows_keep_precision(on):
    """bf16 rows: the sums are fp32, so p is as exact as for fp32 rows."""
    cu = cu_of([64])
    q, k = qk_with_rate(64, 4096, 0.5, torch.bfloat16)
    check(run(on, q * 1000, k, cu), oracle.route(q * 1000, k, cu))


@pytest.mark.parametrize("bias", [None, 0.4])
def test_what_is_not_finite_stays_in_its_sequence(native, bias):
    """NaN and infinite rows and gradients at positions 38 to 187: the other sequences get the same bits as without."""
    backend, device = native
    q, k = (x.to(device) for x in qk_with_rate(254, 33, 0.3))
    grads = [rand(254, seed=1).to(device), rand(254, seed=2).to(device), *(rand(7, seed=3).to(device) for _ in "pH")]

    def results():
        a, b = leaf(q), leaf(k)
        r = hk.route(a, b, cu_of(PACKS["ragged"], device), logit_bias=bias, backend=backend)
        outs = r.boundary_prob, r.selected_prob, r.prob_sum, r.entropy_sum
        return r, torch.autograd.grad(outs, (a, b), grads)

    clean, dclean = results()
    q[38], q[150, 3], k[187, 5], k[60] = float("nan"), float("inf"), float("-inf"), float("nan")
    grads[0][100], grads[1][110], grads[2][3] = float("inf"), float("nan"), float("nan")
    grads[3][3] = float("-inf")
    dirty, ddirty = results()
    by_position = clean.boundary_prob, clean.boundary_mask, clean.selected_prob, *dclean
    for a, b in zip(by_position, (dirty.boundary_prob, dirty.boundary_mask, dirty.selected_prob, *ddirty), strict=True):
        assert torch.equal(a[:38], b[:38])
        assert torch.equal(a[188:], b[188:])
        assert b.dtype == torch.bool or not b[38:188].isfinite().all()
    assert torch.equal(clean.cu_chunks.diff()[[0, 1, 2, 4, 5, 6]], dirty.cu_chunks.diff()[[0, 1, 2, 4, 5, 6]])
    for name in ("prob_sum", "entropy_sum"):
        a, b = getattr(clean, name), getattr(dirty, name)
        assert torch.equal(a[[0, 1, 2, 4, 5, 6]], b[[0, 1, 2, 4, 5, 6]])
        assert b[3].isnan()


def test_gradcheck_reference():
    cu = cu_of([1, 5, 3])
    q, k = qk_with_rate(9, 4, 0.4, torch.float64)
    bias = torch.tensor(0.2, dtype=torch.float64)

    def f(q, k, bias):
        r = hk.route(q, k, cu, logit_bias=bias, backend="reference")
        return r.boundary_prob, r.selected_prob, r.prob_sum, r.entropy_sum

    assert torch.autograd.gradcheck(f, (leaf(q), leaf(k), leaf(bias)))


@pytest.mark.parametrize("bias", [None, 0.4])
@pytest.mark.parametrize(("D", "dtype"), [(33, torch.float32), (64, torch.bfloat16), (700, torch.float32)])
def test_step_equals_full(on, D, dtype, bias):
    backend, device = on
    q, k = qk_with_rate(40, D, 0.4, dtype)
    full = run(on, q, k, cu_of([40]), logit_bias=bias)
    is_first = torch.arange(40) == 0
    prob, mask, selected = hk.route_step(
        torch.cat([q[:1], q[:-1]]).to(device),
        k.to(device),
        is_first=is_first.to(device),
        logit_bias=bias,
        backend=backend,
    )
    assert torch.equal(prob, full.boundary_prob)
    assert torch.equal(mask, full.boundary_mask)
    assert torch.equal(selected, full.selected_prob)


def test_split_equals_whole(on):
    lengths = [50, 70, 3]
    q, k = qk_with_rate(123, 33, 0.4)
    whole = run(on, q, k, cu_of(lengths))
    at = 0
    for n, length in enumerate(lengths):
        alone = run(on, q[at : at + length], k[at : at + length], cu_of([length]))
        assert torch.equal(alone.boundary_prob, whole.boundary_prob[at : at + length])
        assert alone.num_chunks == whole.cu_chunks[n + 1] - whole.cu_chunks[n]
        at += length
