import pytest
import torch

import hnet_kernels as hk

from . import oracle
from .cases import PACKS, assert_close, cu_of, leaf, rand
from .test_layer_ops import DTYPES, compare, results


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param


def tables(lengths, half):
    """As a model has them: the angle is that of the place in the sequence"""
    place = torch.cat([torch.arange(n) for n in lengths])
    angle = place[:, None] * 0.7 ** torch.arange(half)
    return angle.cos(), angle.sin()


def check(backend, lengths, heads, width, window, half, dtype=torch.float32, padding=0):
    T, cu = sum(lengths) + padding, cu_of(lengths)
    rotary = tables([*lengths, padding], half) if half else None

    def f(backend, qkv):
        return hk.attention(qkv, cu, window, rotary, backend=backend)

    args = [rand(T, 3, heads, width, dtype=dtype)]
    compare(f, lambda x: oracle.attention(x, cu, window, rotary), args, [rand(T, heads, width, seed=3)], 200, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [-1, 0, 7, 64])
@pytest.mark.parametrize("pack", PACKS)
def test_attention(backend, pack, window, dtype):
    check(backend, PACKS[pack], 2, 16, window, 8, dtype)


@pytest.mark.parametrize(("heads", "width", "half"), [(1, 1, 0), (3, 5, 1), (2, 33, 16), (1, 64, 16), (1, 128, 64)])
def test_widths(backend, heads, width, half):
    check(backend, [40, 0, 33], heads, width, 20, half)


@pytest.mark.parametrize(("heads", "width", "half"), [(1, 1, 0), (3, 5, 1), (2, 33, 16), (1, 40, 16), (2, 64, 32)])
@pytest.mark.parametrize("window", [-1, 50])
def test_bf16_over_many_blocks_of_any_width(backend, heads, width, half, window):
    """Where a CPU multiplies bf16: tiles of queries with the keys that they see, pairs of channels and of rows."""
    check(backend, [140, 1, 0, 71], heads, width, window, half, torch.bfloat16)


def test_padding_is_zero_and_has_no_gradient(backend):
    check(backend, [40, 33], 2, 16, 20, 8, padding=9)
    x = leaf(rand(82, 3, 2, 16))
    out = hk.attention(x, cu_of([40, 33]), 20, backend=backend)
    assert (out[73:] == 0).all()
    assert (torch.autograd.grad(out.sum(), x)[0][73:] == 0).all()


def test_long_against_torch():
    """A window in a sequence of many blocks, against the whole masked matrix in fp64."""
    L, window, qkv = 700, 130, leaf(rand(700, 3, 2, 32))
    i = torch.arange(L)
    mask = (i[:, None] - i >= 0) & (i[:, None] - i <= window)
    q, k, v = qkv.double().permute(1, 2, 0, 3)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)
    got, dout = hk.attention(qkv, cu_of([L]), window, backend="cpu"), rand(L, 2, 32, seed=1)
    assert_close(got, want, 1e-5)
    assert_close(torch.autograd.grad(got, qkv, dout)[0], torch.autograd.grad(want, qkv, dout.double())[0], 1e-4)


def test_large_scores_stay_finite(backend):
    qkv = rand(50, 3, 1, 16) * 100
    out = hk.attention(qkv, cu_of([50]), -1, backend=backend)
    want = hk.attention(qkv.double(), cu_of([50]), -1, backend="reference")
    assert_close(out, want, 1e-3)


def test_sequences_are_apart(backend):
    x = leaf(rand(90, 3, 2, 16))
    out = hk.attention(x, cu_of([50, 40]), backend=backend)
    poisoned = torch.cat([torch.full_like(x[:50], torch.nan), x[50:]])
    assert torch.equal(hk.attention(poisoned, cu_of([50, 40]), backend=backend)[50:], out[50:])
    assert (torch.autograd.grad(out[50:].sum(), x)[0][:50] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count_and_layout(dtype):
    cu, rotary = cu_of([1, 100, 0, 49]), tables([1, 100, 49], 4)

    def f(x):
        return hk.attention(x, cu, 30, rotary, backend="cpu")

    x, grad, before, runs = rand(150, 3, 2, 20, dtype=dtype), [rand(150, 2, 20, seed=1)], torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results(f, [x], grad))
    finally:
        torch.set_num_threads(before)
    wide = x.new_full((150, 3, 2, 47), 7)
    view = wide[..., 3:43:2].copy_(x).requires_grad_()
    out = f(view)
    runs.append([out, *torch.autograd.grad(out, view, grad[0].to(dtype))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("with_rotary", [False, True])
def test_opcheck(with_rotary):
    rotary = tables([12, 8], 2) if with_rotary else (None, None)
    torch.library.opcheck(
        torch.ops.hnet_kernels.attention, (leaf(rand(20, 3, 2, 8)), *rotary, cu_of([12, 8]), 5, "cpu")
    )


def test_gradcheck_reference():
    cos, sin = (x.double() for x in tables([1, 4], 1))
    x, cu = leaf(rand(5, 3, 1, 3, dtype=torch.float64)), cu_of([1, 0, 4])
    assert torch.autograd.gradcheck(lambda x: hk.attention(x, cu, 2, (cos, sin), backend="reference"), x)


def test_no_positions(backend):
    x = leaf(torch.zeros(0, 3, 2, 8))
    out = hk.attention(x, cu_of([]), backend=backend)
    assert out.shape == (0, 2, 8)
    out.sum().backward()
    assert x.grad.shape == x.shape


X = rand(20, 3, 2, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hk.attention([1.0], cu_of([20])), TypeError, "qkv must be a tensor, got list"),
        (lambda: hk.attention(X.long(), cu_of([20])), TypeError, "qkv must be fp32, bf16, fp16 or fp64"),
        (lambda: hk.attention(X[:, :2], cu_of([20])), ValueError, r"qkv must have shape \(T, 3, heads, width\)"),
        (lambda: hk.attention(X, cu_of([21])), ValueError, "cu_seqlens must end at T = 20"),
        (lambda: hk.attention(X, cu_of([20]), -2), ValueError, "window must be an integer >= 0, or -1"),
        (lambda: hk.attention(X, cu_of([20]), 2.0), ValueError, "window must be an integer >= 0, or -1"),
        (lambda: hk.attention(X, cu_of([20]), 2, X), TypeError, r"rotary must be a pair \(cos, sin\)"),
        (lambda: hk.attention(X, cu_of([20]), 2, tables([20], 5)), ValueError, r"rotary's cos must .* half <= 4"),
        (
            lambda: hk.attention(X, cu_of([20]), 2, tables([19], 4)),
            ValueError,
            r"rotary's cos must .*\(20, half\)",
        ),
    ],
)
def test_wrong_arguments(backend, call, error, message):
    with hk.backend(backend), pytest.raises(error, match=message):
        call()
