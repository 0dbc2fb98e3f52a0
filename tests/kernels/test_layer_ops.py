"""add_rms_norm, gated_conv, swiglu: what stands between the matrix products of a layer; cross_entropy: after them."""

import itertools

import pytest
import torch

import hnet_kernels as hk

from . import oracle
from .cases import LONG, PACKS, allowed, assert_close, cu_of, leaf, rand, rel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param


def results(f, args, grads):
    """Outputs, then the gradient of every argument that is not None"""
    leaves = [None if a is None else leaf(a) for a in args]
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    given = [g.to(o.dtype) for o, g in zip(out, grads, strict=True)]
    return [*out, *torch.autograd.grad(out, [a for a in leaves if a is not None], given)]


def compare(f, definition, args, grads, terms, backend):
    """f(backend, *args) against the definition in fp64"""
    want = results(definition, [None if a is None else a.double() for a in args], grads)
    got = results(lambda *a: f(backend, *a), args, grads)
    plain = results(lambda *a: f("reference", *a), args, grads)
    dtype = args[0].dtype
    for i, (g, q, w) in enumerate(zip(got, plain, want, strict=True)):
        if dtype == torch.float32:
            assert_close(g, w, 1e-5 * terms**0.5, str(i))
        else:
            assert rel(g, w) <= allowed(rel(q, w), 2 if i < len(grads) else 3, dtype), i


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("T", "D"), [(1, 1), (63, 33), (130, 64), (200, 1024)])
def test_add_rms_norm(backend, T, D, with_residual, dtype):
    args = [rand(T, D, dtype=dtype), rand(T, D, seed=1) * 3 if with_residual else None, 1 + rand(D, seed=2) / 4]

    def f(backend, x, residual, weight):
        return hk.add_rms_norm(x, residual, weight, 1e-5, backend=backend)

    grads = [rand(T, D, seed=3), rand(T, D, seed=4)]
    compare(f, lambda *a: oracle.add_rms_norm(*a, 1e-5), args, grads, T + D, backend)


@pytest.mark.parametrize("unused", [0, 1])
def test_add_rms_norm_with_one_output_used(backend, unused):
    x, residual, weight = leaf(rand(20, 16)), leaf(rand(20, 16, seed=1)), leaf(1 + rand(16, seed=2) / 4)
    out = hk.add_rms_norm(x, residual, weight, backend=backend)[1 - unused]
    want = oracle.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5)[1 - unused]
    wrt = (x, residual, weight) if unused else (x, residual)
    for g, w in zip(
        torch.autograd.grad(out.sum(), (x, residual, weight), allow_unused=True, materialize_grads=True)[: len(wrt)],
        torch.autograd.grad(want.sum(), (x, residual, weight), allow_unused=True, materialize_grads=True)[: len(wrt)],
        strict=True,
    ):
        assert_close(g, w, 1e-5)


def test_add_rms_norm_gives_each_argument_a_gradient_of_its_own():
    """fp32: both are the same numbers; adding into one in place must not change the other."""
    x, residual, weight = leaf(rand(20, 16)), leaf(rand(20, 16, seed=1)), leaf(rand(16, seed=2))
    for _ in range(2):
        sum(o.sum() for o in hk.add_rms_norm(x, residual, weight, backend="cpu")).backward()
    want = torch.autograd.grad(sum(o.sum() for o in hk.add_rms_norm(x, residual, weight, backend="cpu")), (x, residual))
    assert_close(x.grad, 2 * want[0], 1e-6)
    assert_close(residual.grad, 2 * want[1], 1e-6)


@pytest.mark.parametrize(
    ("pack", "K", "dtype"),
    [*itertools.product(PACKS, [1, 2, 4, 7], DTYPES), *itertools.product(LONG, [4], [torch.float32])],
)
def test_gated_conv(backend, pack, K, dtype):
    lengths = (PACKS | LONG)[pack]
    T, D, cu = sum(lengths), 33 if pack in PACKS else 5, cu_of(lengths)
    args = [rand(T, 2 * D, dtype=dtype), rand(D, K, seed=1), rand(D, seed=2)]

    def f(backend, x, weight, bias):
        return hk.gated_conv(x, weight, bias, cu, backend=backend)

    compare(f, lambda *a: oracle.gated_conv(*a, cu), args, [rand(T, D, seed=3)], T + K, backend)


@pytest.mark.parametrize("D", [1, 64, 300])
def test_gated_conv_widths_and_padding(backend, D):
    """The rows past the last sequence are one more."""
    cu = cu_of([70, 0, 20])
    args = [rand(100, 2 * D), rand(D, 6, seed=1), rand(D, seed=2)]

    def f(backend, x, weight, bias):
        return hk.gated_conv(x, weight, bias, cu, backend=backend)

    compare(f, lambda *a: oracle.gated_conv(*a, cu), args, [rand(100, D, seed=3)], 100, backend)


def test_gated_conv_keeps_sequences_apart(backend):
    cu, weight, bias = cu_of([70, 63]), rand(16, 5, seed=1), rand(16, seed=2)
    x = leaf(rand(133, 32))
    out = hk.gated_conv(x, weight, bias, cu, backend=backend)
    changed = torch.cat([x[:70] + 1, x[70:]])
    assert torch.equal(hk.gated_conv(changed, weight, bias, cu, backend=backend)[70:], out[70:])
    assert (torch.autograd.grad(out[70:].sum(), x)[0][:70] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D"), [(1, 1), (63, 33), (130, 64), (40, 1024)])
def test_swiglu(backend, T, D, dtype):
    def f(backend, x):
        return hk.swiglu(x, backend=backend)

    compare(f, oracle.swiglu, [rand(T, 2 * D, dtype=dtype) * 4], [rand(T, D, seed=3)], 1, backend)


def test_silu_far_out():
    """e^x stays finite, NaN stays NaN, and 0 is 0."""
    gate = torch.tensor([[0.0, 1e-30, 20, -20, 60, -60, 88, -88, 1e4, -1e4, 1e38, -1e38, torch.inf, torch.nan]]).T
    x = torch.cat([torch.full_like(gate, 2), gate], 1)
    got, want = hk.swiglu(x, backend="cpu"), (2 * torch.nn.functional.silu(gate.double()))
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "V"), [(1, 1), (63, 33), (130, 256), (20, 1000)])
def test_cross_entropy(backend, T, V, dtype):
    logits, targets = rand(T, V, dtype=dtype) * 4, torch.randint(V, (T,))

    def f(backend, logits):
        return hk.cross_entropy(logits, targets, backend=backend).loss

    def definition(logits):
        return oracle.cross_entropy(logits, targets)[0]

    compare(f, definition, [logits], [rand(T, seed=3)], 1, backend)
    found = hk.cross_entropy(logits, targets, with_entropy=True, backend=backend).entropy
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert_close(found, oracle.cross_entropy(logits, targets)[1], 1e-5)
    assert hk.cross_entropy(logits, targets, backend=backend).entropy is None


@pytest.mark.parametrize("target", [-1, 8])
def test_targets_that_no_logit_is_of(target):
    targets = torch.tensor([3, target])
    with pytest.raises(ValueError, match=rf"targets must be in \[0, 8\) or -100, got {target} at position 1"):
        hk.cross_entropy(rand(2, 8), targets, backend="cpu")


def test_rows_without_a_target(backend):
    """Their loss is 0 whatever they hold, and they have no gradient; of the rest nothing changes."""
    x, targets = leaf(rand(9, 40)), torch.arange(9)
    want = hk.cross_entropy(x, targets, backend=backend).loss
    left_out = torch.arange(9) % 3 == 1
    got = hk.cross_entropy(x, targets.masked_fill(left_out, -100), backend=backend).loss
    assert torch.equal(got, torch.where(left_out, 0, want))
    weights = rand(9, seed=1)
    grads = [torch.autograd.grad(loss @ weights, x)[0] for loss in (got, want)]
    assert torch.equal(grads[0], torch.where(left_out[:, None], 0, grads[1]))


def test_cross_entropy_far_out(backend):
    """As PyTorch: nothing overflows, what cannot happen costs nothing, and NaN stays NaN."""
    logits = torch.randn(6, 40)
    logits[0] += 1e30
    logits[1] -= 1e4
    logits[2, 1:] = -torch.inf
    logits[3, 7] = 3e38
    logits[4, 39] = torch.nan
    x, targets = leaf(logits), torch.tensor([3, 4, 0, 7, 8, 9])
    loss, entropy = hk.cross_entropy(x, targets, with_entropy=True, backend=backend)
    want = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert torch.allclose(loss.detach().double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert (entropy[2:4] < 1e-30).all()
    assert torch.isnan(entropy).tolist() == [False] * 4 + [True, False]
    grad = torch.autograd.grad(loss.sum(), x)[0]
    want = torch.nn.functional.softmax(logits.double(), 1) - torch.nn.functional.one_hot(targets, 40)
    assert torch.allclose(grad.double(), want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("op", ["add_rms_norm", "gated_conv", "swiglu"])
def test_no_positions(backend, op):
    x, weight = leaf(torch.zeros(0, 8)), leaf(torch.ones(8 if op == "add_rms_norm" else 4))
    out = {
        "add_rms_norm": lambda: hk.add_rms_norm(x, torch.zeros(0, 8), weight, backend=backend)[0],
        "gated_conv": lambda: hk.gated_conv(x, torch.ones(4, 3), weight, cu_of([0]), backend=backend),
        "swiglu": lambda: hk.swiglu(x, backend=backend),
    }[op]()
    assert out.shape == (0, 8 if op == "add_rms_norm" else 4)
    out.sum().backward()
    assert x.grad.shape == (0, 8)
    assert weight.grad is None or (weight.grad == 0).all()


CASES = {
    "add_rms_norm": lambda dtype: (
        lambda x, r, w: hk.add_rms_norm(x, r, w, backend="cpu"),
        [rand(150, 40, dtype=dtype), rand(150, 40, seed=1), rand(40, seed=2)],
    ),
    "gated_conv": lambda dtype: (
        lambda x, w, b: hk.gated_conv(x, w, b, cu_of([1, 100, 0, 49]), backend="cpu"),
        [rand(150, 80, dtype=dtype), rand(40, 4, seed=1), rand(40, seed=2)],
    ),
    "swiglu": lambda dtype: (lambda x: hk.swiglu(x, backend="cpu"), [rand(150, 80, dtype=dtype)]),
    "cross_entropy": lambda dtype: (
        lambda x: hk.cross_entropy(x, torch.arange(150) % 41, backend="cpu").loss,
        [rand(150, 41, dtype=dtype)],
    ),
}


def grads_of(op):
    return {"add_rms_norm": [rand(150, 40, seed=5)] * 2, "cross_entropy": [rand(150, seed=5)]}.get(
        op, [rand(150, 40, seed=5)]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CASES)
def test_same_bits_for_any_thread_count(op, dtype):
    f, args = CASES[op](dtype)
    grads = grads_of(op)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results(f, args, grads))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("op", CASES)
def test_any_layout_gives_the_bits_of_a_dense_copy(op):
    f, args = CASES[op](torch.float32)
    grads = grads_of(op)
    want = results(f, args, grads)

    def spread(x):
        wide = x.new_full([2 * n + 3 for n in x.shape], 7)
        view = wide[tuple(slice(3, None, 2) for _ in x.shape)]
        return view.copy_(x)

    views = [spread(a).requires_grad_() for a in args]
    out = f(*views)
    out = out if isinstance(out, tuple) else (out,)
    got = [*out, *torch.autograd.grad(out, views, [spread(g) for g in grads])]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    ops = torch.ops.hnet_kernels
    x, residual, weight = leaf(rand(20, 8, dtype=dtype)), leaf(rand(20, 8, seed=1)), leaf(rand(8, seed=2))
    for given in (residual, None):
        torch.library.opcheck(ops.add_rms_norm, (x, given, weight, 1e-5, "cpu"))
    conv = (leaf(rand(20, 16, dtype=dtype)), leaf(rand(8, 3)), leaf(rand(8)), cu_of([12, 8]), "cpu")
    torch.library.opcheck(ops.gated_conv, conv)
    torch.library.opcheck(ops.swiglu, (x, "cpu"))
    torch.library.opcheck(ops.cross_entropy, (x, torch.arange(20) % 8, "cpu"))


def test_compile_fullgraph():
    torch._dynamo.reset()
    cu = cu_of([12, 8])

    def f(x, residual, weight, taps, bias):
        h, s = hk.add_rms_norm(x, residual, weight, backend="cpu")
        return hk.gated_conv(torch.cat([h, s], 1), taps, bias, cu, backend="cpu") + hk.swiglu(
            torch.cat([s, h], 1), backend="cpu"
        )

    args = [leaf(rand(20, 8)), leaf(rand(20, 8, seed=1)), leaf(rand(8)), leaf(rand(8, 3)), leaf(rand(8, seed=2))]
    want = torch.autograd.grad(f(*args).square().sum(), args)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*args).square().sum(), args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradcheck_reference():
    cu = cu_of([1, 0, 6, 4])

    def all_three(x, residual, weight, taps, bias):
        h, s = hk.add_rms_norm(x, residual, weight, backend="reference")
        return hk.gated_conv(torch.cat([h, s], 1), taps, bias, cu, backend="reference"), hk.swiglu(
            torch.cat([s, h], 1), backend="reference"
        )

    args = [rand(*s, dtype=torch.float64) for s in ((11, 3), (11, 3), (3,), (3, 4), (3,))]
    assert torch.autograd.gradcheck(all_three, tuple(map(leaf, args)))


X, BIAS, CLASSES = rand(20, 8), rand(4), torch.arange(20) % 8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hk.add_rms_norm([1.0], None, BIAS), TypeError, "x must be a tensor, got list"),
        (lambda: hk.add_rms_norm(X.long(), None, BIAS), TypeError, "x must be floating point"),
        (lambda: hk.add_rms_norm(X, None, BIAS), ValueError, r"weight must have shape \(8,\), next to x of \(20, 8\)"),
        (lambda: hk.add_rms_norm(X, X.half(), X[0]), ValueError, "residual must be torch.float32 of shape"),
        (lambda: hk.add_rms_norm(X, X[:3], X[0]), ValueError, r"residual must be .* got torch.float32 \(3, 8\)"),
        (lambda: hk.add_rms_norm(X, None, X[0].to("meta")), ValueError, "weight must be on the device of x, cpu"),
        (lambda: hk.gated_conv(X, rand(3, 4), BIAS, cu_of([20])), ValueError, r"weight must have shape \(D, K\)"),
        (lambda: hk.gated_conv(X, rand(4, 0), BIAS, cu_of([20])), ValueError, r"weight must have shape \(D, K\)"),
        (lambda: hk.gated_conv(X, rand(4, 3), X[0], cu_of([20])), ValueError, r"bias must have shape \(4,\)"),
        (lambda: hk.gated_conv(X, rand(4, 3), BIAS, cu_of([21])), ValueError, "cu_seqlens must end at T = 20"),
        (lambda: hk.gated_conv(X, rand(4, 3), BIAS, cu_of([-1, 3])), ValueError, "cu_seqlens must not decrease"),
        (lambda: hk.gated_conv(X, rand(4, 3), BIAS, [0, 20]), TypeError, "cu_seqlens must be a tensor, got list"),
        (lambda: hk.swiglu(X[:, :7]), ValueError, r"x must be y and its gate side by side, .*\(20, 7\)"),
        (lambda: hk.swiglu(X[0]), ValueError, "x must be packed rows"),
        (lambda: hk.swiglu(X.double(), backend="cpu"), RuntimeError, "backend 'cpu' cannot run swiglu"),
        (lambda: hk.swiglu(X, backend="triton"), RuntimeError, "swiglu has no triton kernel"),
        (lambda: hk.cross_entropy(X, BIAS), TypeError, "targets must be torch.int64, got torch.float32"),
        (lambda: hk.cross_entropy(X, CLASSES[:3]), ValueError, r"targets must have shape \(20,\), got \(3,\)"),
        (lambda: hk.cross_entropy(X[0], CLASSES), ValueError, r"logits must be packed rows"),
    ],
)  # fmt: skip
def test_wrong_arguments(backend, call, error, message):
    with hk.backend(backend), pytest.raises(error, match=message):
        call()
