"""The op `mamba2`: against a loop over positions in fp64 (outputs and every gradient), documents apart to the last bit,
padding rows, low precision, and what a layer of the paper's size launches and moves."""

import pytest
import torch
import torch.nn.functional as F

import hnet_kernels as hk
from hnet_kernels import reference
from hnet_kernels.dispatch import triton_error

from . import oracle
from .cases import INTERPRETED, allowed, assert_close, cu_of, leaf, rand, rel
from .test_eager import Names

if INTERPRETED:  # by test_triton_interpreted.py
    NATIVE = [pytest.param(("triton", "cpu"), id="triton")]
    EVERYWHERE = NATIVE
else:
    NATIVE = [pytest.param(("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu)]
    EVERYWHERE = [
        pytest.param(("reference", "cpu"), id="reference"),
        *NATIVE,
        pytest.param(("reference", "cuda"), id="reference-gpu", marks=pytest.mark.gpu),
    ]
PACKS = {
    "one position": [1],
    "below a chunk": [40],
    "two chunks": [128],
    "around a chunk": [1, 63, 64, 65],
    "ragged": [1, 37, 0, 150, 2, 64, 0],
}
SHAPES = {"3x16x16": (3, 16, 16, 4), "2x64x64": (2, 64, 64, 4), "1x64x128": (1, 64, 128, 4), "9x32x5": (9, 32, 5, 2)}
NAMES = ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight")


@pytest.fixture(params=EVERYWHERE)
def on(request):
    return request.param


@pytest.fixture(params=NATIVE)
def native(request):
    return request.param


def arguments(T, shape, dtype=torch.float32, decay=0.0, seed=0):
    """Of H heads of P channels with S states and K taps. decay: added to the logarithm of A."""
    H, P, S, K = shape
    d_inner, channels = H * P, H * P + 2 * S
    return [
        rand(T, d_inner + channels + H, dtype=dtype, seed=seed),
        rand(channels, K, seed=1) * 0.4, rand(channels, seed=2) * 0.2, rand(H, seed=3) - 2, rand(H, seed=4) + decay,
        rand(H, seed=5), rand(d_inner, seed=6) * 0.1 + 1,
    ]  # fmt: skip


def run(f, args, dout, **kwargs):
    """The output and the gradient of every argument"""
    leaves = [leaf(a) for a in args]
    out = f(*leaves, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out))]


def check(on, lengths, shape, decay, tol=1e-4):
    backend, device = on
    args, cu = arguments(sum(lengths), shape, decay=decay), cu_of(lengths)
    dout = rand(sum(lengths), shape[0] * shape[1], seed=9)
    want = run(lambda *a: oracle.mamba2(*a, cu), args, dout)
    got = run(hk.mamba2, [a.to(device) for a in args], dout, cu_seqlens=cu.to(device), backend=backend)
    for name, g, w in zip(("out", *NAMES), got, want, strict=True):
        assert_close(g.cpu(), w, tol, name)


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("decay", [1.5, -4.0], ids=["forgetful", "remembering"])
def test_agrees_with_the_definition(on, lengths, decay):
    check(on, lengths, SHAPES["3x16x16"], decay)


@pytest.mark.parametrize("shape", [n for n in SHAPES if n != "3x16x16"])
def test_agrees_with_the_definition_at_other_sizes(on, shape):
    check(on, PACKS["around a chunk"], SHAPES[shape], -2.0)


@pytest.mark.slow
def test_agrees_with_the_definition_on_a_mixed_pack(on):
    """Fourteen chunks of one sequence: its state goes on over more than one of them; and 35 for the recurrence."""
    check(on, [1, 63, 64, 65, 1000], (3, 16, 16, 4), -4.0)
    check(on, [2200], (1, 16, 2, 2), -6.0)


@pytest.mark.parametrize("changed", [1] if INTERPRETED else [0, 1, 2])
def test_documents_are_apart_to_the_last_bit(native, changed):
    """Whatever one of them holds, no bit of another's output or gradient moves."""
    backend, device = native
    lengths = [30, 100, 75]
    cu, shape = cu_of(lengths), SHAPES["3x16x16"]
    args, other = arguments(205, shape, decay=-4), arguments(205, shape, seed=8)
    s, e = oracle.spans(cu)[changed]
    spoilt = args[0].clone()
    spoilt[s:e] = 5 * other[0][s:e]
    kwargs = dict(cu_seqlens=cu.to(device), backend=backend)
    dout = rand(205, 48, seed=9)
    weights = [a.to(device) for a in args[1:]]
    once, again = (run(hk.mamba2, [x.to(device), *weights], dout, **kwargs) for x in (args[0], spoilt))
    rest = torch.ones(205, dtype=torch.bool)
    rest[s:e] = False
    for a, b in zip(once[:2], again[:2], strict=True):
        assert torch.equal(a[rest.to(device)], b[rest.to(device)])
        assert not torch.equal(a, b)


@pytest.mark.parametrize("padding", [1, 100])
def test_padding_rows_are_not_read(on, padding):
    """Rows past the last sequence, and their gradient, hold NaN: the rest is the same, and theirs is zero."""
    backend, device = on
    cu, shape = cu_of([20, 0, 71], device), SHAPES["3x16x16"]
    args, dout = [a.to(device) for a in arguments(91, shape, decay=-4)], rand(91, 48, seed=9).to(device)
    want = run(hk.mamba2, args, dout, cu_seqlens=cu, backend=backend)
    nan = torch.full((padding, args[0].shape[1]), float("nan"), device=device)
    padded = [torch.cat([args[0], nan]), *args[1:]]
    got = run(hk.mamba2, padded, torch.cat([dout, nan[:, :48]]), cu_seqlens=cu, backend=backend)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if i < 2:
            assert (g[91:] == 0).all()
            g = g[:91]
        assert_close(g, w, 1e-5 if i > 1 else 1e-6)


class Rounded(torch.autograd.Function):
    """What is written in `dtype` and read again, the gradient too. The interpreter truncates to bf16 on the way."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        if INTERPRETED and dtype == torch.bfloat16:
            return (x.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32)
        return x.to(dtype).float()

    @staticmethod
    def backward(ctx, grad):
        return Rounded.apply(grad, ctx.dtype), None


def in_low_precision(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, skip, norm_weight, cu):
    """PyTorch in the dtype of zxbcdt: fp32 sums, and rows between convolution, scan and norm rounded."""
    T, H, d_inner, (channels, K) = zxbcdt.shape[0], A_log.shape[0], norm_weight.shape[0], conv_weight.shape
    S, seq = (channels - d_inner) // 2, reference.sequence_of(cu, T)
    z, xbc, dt = zxbcdt.float().split([d_inner, channels, H], 1)
    conv = conv_bias + conv_weight[:, K - 1] * xbc
    for j in range(1, K):
        together = F.pad((seq[j:] == seq[:-j]), (j, 0))[:, None]
        conv = conv + conv_weight[:, K - 1 - j] * torch.where(together, xbc.roll(j, 0), 0)
    x, B, C = Rounded.apply(F.silu(conv), zxbcdt.dtype).split([d_inner, S, S], 1)
    x = x.reshape(T, H, -1)
    y = reference.ssd(x, F.softplus(dt + dt_bias), -A_log.exp(), B, C, seq) + skip[:, None] * x
    y = Rounded.apply(y.flatten(1), zxbcdt.dtype)
    return F.rms_norm(y * F.silu(z), (d_inner,), norm_weight, 1e-5).to(zxbcdt.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16] if INTERPRETED else [torch.bfloat16, torch.float16])
def test_low_precision(native, dtype):
    """At most 2x (gradients 3x) the error of PyTorch in the same dtype against fp64, each the largest of three draws:
    the gradient of a parameter of two heads is two sums in which large terms cancel; one draw's error says little."""
    backend, device = native
    shape, lengths = SHAPES["2x64x64"], [70, 130]
    cu, dout = cu_of(lengths, device), rand(200, 128, dtype=dtype, seed=9).to(device)
    ours, theirs = [], []
    for seed in range(3):
        args = [a.to(device) for a in arguments(200, shape, dtype, decay=-2, seed=seed)]
        exact = run(hk.mamba2, [a.double() for a in args], dout, cu_seqlens=cu, backend="reference")
        plain = run(in_low_precision, args, dout, cu=cu)
        got = run(hk.mamba2, args, dout, cu_seqlens=cu, backend=backend)
        assert got[0].dtype == got[1].dtype == dtype
        ours.append([rel(g, w) for g, w in zip(got, exact, strict=True)])
        theirs.append([rel(p, w) for p, w in zip(plain, exact, strict=True)])
    for i, (g, p) in enumerate(zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)):
        assert max(g) <= allowed(max(p), 2 if i == 0 else 3, dtype), (i, g, p)


def test_same_bits_every_time(on):
    backend, device = on
    args, cu = [a.to(device) for a in arguments(150, SHAPES["3x16x16"])], cu_of([100, 50], device)
    dout = rand(150, 48, seed=9)
    once, again = (run(hk.mamba2, args, dout, cu_seqlens=cu, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("N", [0, 1, 3])
def test_no_positions(on, N):
    backend, device = on
    args = [a.to(device) for a in arguments(0, SHAPES["3x16x16"])]
    cu = torch.zeros(N + 1, dtype=torch.int32, device=device)
    out, *grads = run(hk.mamba2, args, rand(0, 48), cu_seqlens=cu, backend=backend)
    assert out.shape == (0, 48)
    assert all((g == 0).all() for g in grads)


def test_gradcheck_of_the_reference():
    args = [a.double() for a in arguments(9, (2, 2, 1, 3))]
    f = lambda *a: hk.mamba2(*a, cu_of([4, 5]), backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(f, [leaf(a) for a in args], fast_mode=True)


def test_opcheck(native):
    backend, device = native
    args = [leaf(a.to(device)) for a in arguments(90, SHAPES["3x16x16"])]
    torch.library.opcheck(torch.ops.hnet_kernels.mamba2, (*args, cu_of([50, 40], device), 1e-5, backend))


def test_an_eager_call_gives_the_bits_of_the_dispatchers(native, asked, dispatched):
    backend, device = native
    args, dout = [a.to(device) for a in arguments(90, SHAPES["3x16x16"])], rand(90, 48, seed=9)

    def call():
        return run(hk.mamba2, args, dout, cu_seqlens=cu_of([50, 40], device), backend=backend)

    got = call()
    assert asked == [True, True]  # forward and backward
    for a, b in zip(got, dispatched(call), strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())


def test_no_gradient_and_inference_mode(native, asked):
    backend, device = native
    args, cu = [leaf(a.to(device)) for a in arguments(20, SHAPES["3x16x16"])], cu_of([20], device)
    with torch.no_grad():
        assert not hk.mamba2(*args, cu, backend=backend).requires_grad
    with torch.inference_mode():
        assert hk.mamba2(*args, cu, backend=backend).is_inference()
    assert asked == [True, True]


def test_a_dispatch_mode_sees_the_op(native):
    backend, device = native
    args = [a.to(device) for a in arguments(20, SHAPES["3x16x16"])]
    with Names() as mode:
        run(hk.mamba2, args, rand(20, 48, seed=9), cu_seqlens=cu_of([20], device), backend=backend)
    assert mode.seen == ["mamba2", "mamba2_bwd"]


def test_compile_fullgraph(on):
    """Another layout needs no other graph."""
    backend, device = on
    torch._dynamo.reset()
    args = [a.to(device) for a in arguments(90, SHAPES["3x16x16"])]
    dout = rand(90, 48, seed=9)
    compiler = "aot_eager" if on == ("reference", "cpu") else "inductor"
    compiled = torch.compile(hk.mamba2, fullgraph=True, backend=compiler)
    for lengths in ([50, 40], [1, 89]):
        kwargs = dict(cu_seqlens=cu_of(lengths, device), backend=backend)
        for g, w in zip(run(compiled, args, dout, **kwargs), run(hk.mamba2, args, dout, **kwargs), strict=True):
            assert_close(g, w, 2e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(zxbcdt=rand(20, 130)), ValueError, "zxbcdt must have .* = 131 columns, got 130"),
        (dict(zxbcdt=rand(20, 131).long()), TypeError, "zxbcdt must be floating point"),
        (dict(conv_weight=rand(79, 4)), ValueError, r"conv_weight must be .* d_inner = 48 .* got \(79, 4\)"),
        (dict(conv_weight=rand(80)), ValueError, "conv_weight must have 2 dimensions"),
        (dict(conv_bias=rand(79)), ValueError, r"conv_bias must have shape \(80,\), got \(79,\)"),
        (dict(dt_bias=[1.0]), TypeError, "dt_bias must be a tensor, got list"),
        (dict(dt_bias=rand(2)), ValueError, r"dt_bias must have shape \(3,\)"),
        (dict(A_log=torch.ones(3).int()), TypeError, "A_log must be fp32"),
        (dict(D=rand(3).to("meta")), ValueError, "D must be on the device of zxbcdt, cpu, got meta"),
        (dict(norm_weight=rand(47)), ValueError, "norm_weight must have as many channels for each of the 3 heads"),
        (dict(eps=0), ValueError, "eps must be a number between 0 and 1, got 0"),
        (dict(cu_seqlens=cu_of([21])), ValueError, "cu_seqlens must end at T = 20"),
        (dict(cu_seqlens=torch.tensor([0, 20])), TypeError, "cu_seqlens must be int32"),
        (dict(backend="cpu"), RuntimeError, "cpu: mamba2 has no CPU kernel; there it is plain PyTorch"),
    ],
)
def test_wrong_arguments(changes, error, message):
    args = {**dict(zip(NAMES, arguments(20, SHAPES["3x16x16"]), strict=True)), "cu_seqlens": cu_of([20])}
    assert hk.mamba2(**args).shape == (20, 48)
    with pytest.raises(error, match=message):
        hk.mamba2(**{**args, **changes})


def test_sizes_the_kernels_do_not_take(native):
    """Named, an error; else plain PyTorch."""
    backend, device = native
    args = [a.to(device) for a in arguments(20, (2, 8, 4, 4))]
    with pytest.raises(
        RuntimeError, match="heads of 16, 32, 64 channels, at most 128 states and 8 taps, got 8, 4 and 4"
    ):
        hk.mamba2(*args, cu_of([20], device), backend=backend)
    want = hk.mamba2(*args, cu_of([20], device), backend="reference")
    assert torch.equal(hk.mamba2(*args, cu_of([20], device)), want)


@pytest.mark.skipif(triton_error() is not None, reason=f"{triton_error()}")
def test_what_a_layer_launches_and_moves(monkeypatch):
    """At the size of hnet_2stage_L, counted from the arguments of each launch, and the sums after them: at most 12
    launches forward, two projections and a norm included, and 0.35 MB a position for both ways together."""
    from hnet_kernels.triton import mamba2 as op
    from hnet_kernels.triton.common import Kernel

    launched = []

    def count(kernel, grid, like, D, *args, **constexprs):
        launched.append((kernel.fn.__name__, sum(a.nbytes for a in args if torch.is_tensor(a))))

    monkeypatch.setattr(Kernel, "launch", count)
    T, H, d_inner, channels = 4096, 32, 2048, 2304
    zxbcdt = torch.empty(T, d_inner + channels + H, dtype=torch.bfloat16)
    weights = [torch.empty(*s) for s in ((channels, 4), (channels,), (H,), (H,), (H,), (d_inner,))]
    out, *kept = op.mamba2(zxbcdt, *weights, torch.zeros(9, dtype=torch.int32), 1e-5)
    forward = len(launched)
    op.mamba2_bwd(out, zxbcdt, *weights, *kept, 1e-5)
    moved = sum(size for _, size in launched) / T
    assert forward + 6 <= 12
    assert len(launched) - forward <= 8
    assert 0.2e6 < moved <= 0.35e6, launched
