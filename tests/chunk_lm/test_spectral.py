import math

import pytest
import torch

from hnet.chunk_lm import spectral
from hnet.chunk_lm.causal import causal_filter, running_mean
from hnet.chunk_lm.dropout import add_dropped, keep_mask
from hnet.chunk_lm.state import rotating_scan

from .reference import filtered, filtered_causally, mean_so_far


def inputs(T=100, K=20, C=6, seed=0):
    torch.manual_seed(seed)
    n = spectral.fft_length(T, K)
    u, k, g = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((T, C), (K,), (n // 2 + 1,)))
    return u, k, g, n


def assert_close_with_gradients(got, expected, weight, of):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    a, b = (torch.autograd.grad((y * weight).sum(), of) for y in (got, expected))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_fft_length():
    assert spectral.fft_length(1024, 128) == 2048
    assert spectral.fft_length(512, 513) == 1024
    assert spectral.fft_length(512, 514) == 2048
    assert spectral.fft_length(1, 1) == 1


def test_mask_keeps_all_below_the_cutoff_then_rolls_off():
    m = spectral.cutoff_mask(513, 128)
    assert (m[:128] == 1).all()
    assert (m[160:] == 0).all()
    edge = torch.cat([m[127:161]]).double()
    assert (edge.diff() < 0).all()
    assert torch.allclose(edge + edge.flip(0), torch.ones(34, dtype=torch.float64), atol=1e-6)  # symmetric about 1/2
    assert edge[1].item() == pytest.approx((1 + math.cos(math.pi / 33)) / 2, abs=1e-6)
    assert (spectral.cutoff_mask(513, 513) == 1).all()
    assert (spectral.cutoff_mask(513, 500)[:500] == 1).all()


@pytest.mark.parametrize("form", ["fft", "toeplitz", "lowrank", None])
@pytest.mark.parametrize("cutoff", [1, 10, 40, 65])
@pytest.mark.parametrize("length", [100, 37, 1])
def test_every_form_equals_plain_fft(form, cutoff, length):
    u, k, g, n = inputs()
    u = u[:length].detach().requires_grad_()
    expected = filtered(u[None], k, g, cutoff, n)[0]
    H = spectral.response(k, g, cutoff, n)
    assert len(H) == min(65, cutoff + 32)
    got = spectral.spectral_filter(u, H, n, form)
    assert got.is_contiguous()
    weight = torch.randn_like(expected)
    assert_close_with_gradients(got, expected, weight, (u, k, g))
    last = spectral.filter_last(u, spectral.response(k, g, cutoff, n), n)
    assert_close_with_gradients(last, filtered(u[None], k, g, cutoff, n)[0, -1], weight[-1], (u, k, g))


@pytest.mark.parametrize("form", ["fft", "toeplitz", "lowrank"])
def test_fp32_and_bf16_stay_near_fp64(form):
    u, k, g, n = (x.detach() if isinstance(x, torch.Tensor) else x for x in inputs(256, 64, 32))
    exact = filtered(u[None], k, g, 30, n)[0]
    H = spectral.response(k.float(), g.float(), 30, n)
    got = spectral.spectral_filter(u.float(), H, n, form)
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 1e-5 * exact.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = spectral.spectral_filter(u.float(), H, n, form)
    assert low.dtype == (torch.float32 if form == "fft" else torch.bfloat16)
    assert (low - exact).abs().max() < 0.02 * exact.abs().max()


def test_low_rank_basis_is_small_and_orthonormal():
    V, waves = spectral.band_basis(512, 1024, 160, torch.float32, torch.device("cpu"))
    assert 160 <= V.shape[1] <= 185
    assert waves.shape == (320, V.shape[1])
    assert torch.allclose(V.mT @ V, torch.eye(V.shape[1]), atol=1e-6)


def test_form_is_chosen_by_cost():
    assert spectral.choose_form(512, 1024, 160, True) == "lowrank"
    assert spectral.choose_form(512, 1024, 513, True) == "toeplitz"
    assert spectral.choose_form(512, 1024, 513, False) == "fft"
    assert spectral.choose_form(4096, 8192, 4097, True) == "fft"
    with pytest.raises(ValueError, match="form must be"):
        spectral.spectral_filter(torch.zeros(4, 1), torch.zeros(3, dtype=torch.complex64), 4, "direct")


@pytest.mark.parametrize("K", [1, 20, 128])
@pytest.mark.parametrize("T", [1, 63, 300])
def test_causal_filter_equals_tap_by_tap(K, T):
    torch.manual_seed(0)
    n = spectral.fft_length(max(T, K), K)
    g = torch.randn(n // 2 + 1, dtype=torch.float64, requires_grad=True)
    k = torch.randn(K, dtype=torch.float64, requires_grad=True)
    u = torch.randn(T, 5, dtype=torch.float64, requires_grad=True)
    for cutoff in (1, max(1, n // 4), n // 2 + 1):
        got = causal_filter(u, spectral.causal_taps(k, g, cutoff, n))
        expected = filtered_causally(u[None], k, g, cutoff, n)[0]
        assert_close_with_gradients(got, expected, torch.randn_like(got), (u, k, g))


def test_causal_filter_in_pieces():
    torch.manual_seed(0)
    u, taps = torch.randn(400, 3, dtype=torch.float64), torch.randn(70, dtype=torch.float64)
    whole, seen, parts = causal_filter(u, taps), torch.zeros(69, 3, dtype=torch.float64), []
    for piece in u.split([1, 2, 150, 1, 246]):
        parts.append(causal_filter(piece, taps, seen))
        seen = torch.cat([seen, piece])[-69:]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)


def test_running_mean_equals_the_loop_in_pieces():
    torch.manual_seed(0)
    u = torch.randn(500, 3, dtype=torch.float64)
    expected = mean_so_far(u[None], 100)[0]
    torch.testing.assert_close(running_mean(u, 100), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected[99], u[:100].mean(0))
    mean, count, parts = None, 0, []
    for piece in u.split([1, 98, 3, 150, 1, 247]):
        parts.append(running_mean(piece, 100, mean, count))
        mean, count = parts[-1][-1], count + len(piece)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-12)
    assert running_mean(u.bfloat16(), 100).dtype == torch.float32


@pytest.mark.parametrize("N", [1, 2, 7, 64, 100])
def test_scan_equals_the_serial_loop(N):
    torch.manual_seed(0)
    F = torch.randn(2, N, 5, 3, dtype=torch.complex128, requires_grad=True)
    logit, angle = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    start = torch.randn(2, 5, 3, dtype=torch.complex128, requires_grad=True)
    rho, H, states = torch.sigmoid(logit), start, []
    for i in range(N):
        H = rho * torch.exp(1j * angle) * H + (1 - rho) * F[:, i]
        states.append(H)
    expected = torch.stack(states, 1)
    got = rotating_scan(F, rho, angle, start)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    w = torch.randn_like(expected)
    of = (F, logit, angle, start)
    a, b = (torch.autograd.grad((y * w).sum().real, of, retain_graph=True) for y in (got, expected))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    zero = rotating_scan(F, rho, angle)
    torch.testing.assert_close(zero, rotating_scan(F, rho, angle, torch.zeros_like(start)), rtol=0, atol=0)


def test_dropout_drops_the_share_it_says_and_keeps_the_mean():
    torch.manual_seed(0)
    m = keep_mask(torch.Size((1000, 1001)), 0.1)
    share = (m == 0).double().mean().item()
    assert share == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / m.numel()))
    assert m.unique().tolist() == pytest.approx([0, 1 / 0.9], rel=1e-4)
    neighbours = ((m[:, 1:] == 0) & (m[:, :-1] == 0)).double().mean().item()  # the four lanes of a draw are independent
    assert neighbours == pytest.approx(0.01, abs=5e-4)
    torch.manual_seed(0)
    assert torch.equal(m, keep_mask(torch.Size((1000, 1001)), 0.1))
    x, y = torch.randn(10, 3), torch.randn(10, 3, requires_grad=True)
    assert torch.equal(add_dropped(x, y, 0.0), x + y)
    out = add_dropped(x, y, 0.5)
    (grad,) = torch.autograd.grad(out.sum(), y)
    torch.testing.assert_close(out, x + y * grad)
    assert set(grad.unique().tolist()) == {0.0, 2.0}
