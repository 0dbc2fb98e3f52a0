import pytest
import torch

import hnet_kernels as hk

from . import oracle
from .cases import LONG, PACKS, ROUNDING, assert_close, leaf, rand, routing_with

MODES = ["boundary", "mean", "max", "last"]


def on_device(r, device):
    return hk.Routing(*(x.to(device) for x in r))


def compare(on, lengths, pattern, D, dtype, mode, max_chunks=None):
    backend, device = on
    r = routing_with(pattern, lengths, max_chunks)
    x = leaf(rand(sum(lengths), D, dtype=dtype))
    x64 = leaf(x.double())
    want = oracle.pool(x64, r, mode)
    weight = rand(*want.shape, dtype=dtype, seed=3)
    (dx_want,) = torch.autograd.grad((want * weight.double()).sum(), x64) if want.requires_grad else (x64 * 0,)
    xd = leaf(x.to(device))
    got = hk.pool(xd, on_device(r, device), mode, backend=backend)
    assert got.dtype == dtype
    assert_close(got.cpu(), want, 0 if mode != "mean" else ROUNDING[dtype], "z")
    (dx,) = torch.autograd.grad(got, xd, weight.to(device))
    assert_close(dx.cpu(), dx_want, ROUNDING[dtype], "dx")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("pattern", ["all", "none", "alternating", "random"])
@pytest.mark.parametrize("pack", PACKS)
def test_against_oracle(on, pack, pattern, dtype, mode):
    compare(on, PACKS[pack], pattern, 33, dtype, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("D", [1, 64, 1024])
def test_widths(on, D, mode):
    compare(on, LONG["ragged long"] if D == 64 else PACKS["ragged"], "random", D, torch.float32, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [7, 20, 200])
def test_budget_rows_are_zero(on, budget, mode):
    compare(on, PACKS["ragged"], "random", 33, torch.float32, mode, budget)


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("lengths", [[200], [64, 128], [70, 130, 1, 63], [5, 65, 192, 0, 3]], ids=str)
def test_chunks_of_many_blocks(on, lengths, mode):
    """Chunks longer than a block of the Triton kernels, which hand such blocks to programs of their own."""
    compare(on, lengths, "none", 9, torch.float32, mode)
    compare(on, lengths, "none", 9, torch.bfloat16, mode, sum(lengths))


@pytest.mark.parametrize("at", [3, 70, 140, 199])
def test_max_of_many_blocks_takes_the_first_of_equals_and_keeps_nan(on, at):
    """The place of the maximum in the rows before, in and after the blocks inside a chunk; equals come later."""
    backend, device = on
    r = on_device(routing_with("none", [210], 3), device)
    x = rand(210, 4).clamp(max=1.0)
    x[:, 2], x[:, 3] = float("-inf"), 0.5
    x[at:, 0], x[at, 1], x[at + 5, 1], x[at + 3 :, 3] = 2.0, float("nan"), 5.0, 0.5
    x = leaf(x.to(device))
    z = hk.pool(x, r, "max", backend=backend)
    assert z[0, [0, 2, 3]].tolist() == [2.0, float("-inf"), 0.5]
    assert z[0, 1].isnan()
    assert (z[1:] == 0).all()
    z.backward(torch.ones_like(z))
    assert x.grad.nonzero().tolist() == sorted([[at, 0], [at, 1], [0, 2], [0, 3]])


@pytest.mark.parametrize("mode", MODES)
def test_rows_past_the_last_sequence_get_no_gradient(on, mode):
    backend, device = on
    r = routing_with("random", [40, 100])
    last, rows = int(r.chunk_index[-1]), 200
    r = r._replace(chunk_index=torch.nn.functional.pad(r.chunk_index, (0, rows), value=last))
    x = torch.full((140 + rows, 9), float("nan"))
    x[:140] = rand(140, 9)
    x = leaf(x.to(device))
    z = hk.pool(x, on_device(r, device), mode, backend=backend)
    assert z.isfinite().all()
    z.backward(torch.ones_like(z))
    assert (x.grad[140:] == 0).all()
    assert x.grad.isfinite().all()
    assert (x.grad[:140] != 0).any()


def test_max_takes_the_first_of_equals_and_keeps_nan(on):
    backend, device = on
    r = on_device(routing_with("none", [4]), device)
    x = leaf(torch.tensor([[1.0, 2.0], [3.0, float("nan")], [3.0, 9.0], [0.0, 1.0]]).to(device))
    z = hk.pool(x, r, "max", backend=backend)
    assert z[0, 0] == 3
    assert z[0, 1].isnan()
    z[0].sum().backward()
    assert x.grad.tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]


def test_non_contiguous(on):
    backend, device = on
    r = on_device(routing_with("random", PACKS["ragged"]), device)
    wide = rand(254, 100).to(device)
    for x in (wide[:, 10:43], wide[:, ::3], wide.T.contiguous().T):
        for mode in MODES:
            x = x.detach().requires_grad_()
            z = hk.pool(x, r, mode, backend=backend)
            assert torch.equal(z, hk.pool(x.contiguous(), r, mode, backend=backend))
            z.backward(torch.ones_like(z).T.contiguous().T)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_reference(mode):
    r = routing_with("random", [1, 6, 4])
    assert torch.autograd.gradcheck(
        lambda x: hk.pool(x, r, mode, backend="reference"), leaf(rand(11, 3, dtype=torch.float64))
    )
