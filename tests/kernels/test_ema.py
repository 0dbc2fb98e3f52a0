import pytest
import torch

import hnet_kernels as hk

from . import oracle
from .cases import LONG, PACKS, allowed, assert_close, cu_of, leaf, rand, rel


def weights(T, kind, seed=0):
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(T, generator=g)
    return {"any": p, "small": p * 0.01, "zero and one": (p > 0.5).float()}[kind]


def gradients(f, z, p, state, dy, dstate):
    z, p = leaf(z), leaf(p)
    state = None if state is None else leaf(state)
    y, final = f(z, p, state)
    leaves = [x for x in (z, p, state) if x is not None]
    return y, final, *torch.autograd.grad((y, final), leaves, (dy.to(y.dtype), dstate.to(final.dtype)))


def compare(on, lengths, D, dtype, kind="any", with_state=True):
    backend, device = on
    cu, T, N = cu_of(lengths), sum(lengths), len(lengths)
    z, p, dy, dstate = rand(T, D, dtype=dtype), weights(T, kind), rand(T, D, dtype=dtype, seed=1), rand(N, D, seed=2)
    state = rand(N, D, seed=3) if with_state else None
    want = gradients(
        lambda z, p, s: oracle.ema(z, p, cu, s),
        z.double(),
        p.double(),
        None if state is None else state.double(),
        dy,
        dstate,
    )

    def ours(backend, device):
        def f(z, p, s):
            return hk.ema(z, p, cu.to(device), s, return_final_state=True, backend=backend)

        return gradients(f, *(None if x is None else x.to(device) for x in (z, p, state, dy, dstate)))

    got, plain = ours(backend, device), ours("reference", "cpu")
    for name, g, q, w in zip(("y", "final", "dz", "dp", "dstate"), got, plain, want, strict=False):
        terms = 1 if name == "y" else D if name == "dp" else max(lengths)
        if dtype == torch.float32 or name in ("final", "dp", "dstate"):
            assert_close(g.cpu(), w, 1e-5 * terms**0.5, name)
        else:
            assert rel(g.cpu(), w) <= allowed(rel(q, w), 2 if name == "y" else 3, dtype), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["any", "small", "zero and one"])
@pytest.mark.parametrize("pack", PACKS)
def test_against_oracle(on, pack, kind, dtype):
    compare(on, PACKS[pack], 33, dtype, kind)


@pytest.mark.parametrize("D", [1, 64, 700])
@pytest.mark.parametrize("with_state", [False, True])
def test_widths(on, D, with_state):
    compare(on, PACKS["ragged"], D, torch.float32, "small", with_state)


@pytest.mark.parametrize("pack", LONG)
def test_long(on, pack):
    compare(on, LONG[pack], 17, torch.float32, "small")


def test_only_the_final_state_has_a_gradient(on):
    backend, device = on
    z, p = leaf(rand(30, 8).to(device)), leaf(weights(30, "any").to(device))
    _, final = hk.ema(z, p, cu_of([10, 20], device), return_final_state=True, backend=backend)
    final.sum().backward()
    assert not z.grad.isnan().any()
    assert z.grad.abs().sum() > 0


def test_split_equals_whole(on):
    """Handing the final state on continues the sequence."""
    backend, device = on
    z, p = rand(100, 20).to(device), weights(100, "any").to(device)
    whole = hk.ema(z, p, cu_of([100], device), backend=backend)
    a, state = hk.ema(z[:37], p[:37], cu_of([37], device), return_final_state=True, backend=backend)
    b = hk.ema(z[37:], p[37:], cu_of([63], device), state, backend=backend)
    assert_close(torch.cat([a, b]), whole, 1e-6)


@pytest.mark.parametrize("where", ["rows", "weights", "state"])
@pytest.mark.parametrize("kind", ["any", "small"])
def test_what_is_not_finite_stays_in_its_sequence(native, kind, where):
    """NaN and infinities in the sequence of positions 38 to 187 and in the gradients that come back to it: the others
    get the same bits as without."""
    backend, device = native
    lengths, others = PACKS["ragged"], [0, 1, 2, 4, 5, 6]
    z, p, state = rand(254, 33), weights(254, kind), rand(7, 33, seed=1)
    dy, dfinal = rand(254, 33, seed=2), rand(7, 33, seed=3)

    def results():
        def f(z, p, state):
            return hk.ema(z, p, cu_of(lengths, device), state, return_final_state=True, backend=backend)

        return gradients(f, *(x.to(device) for x in (z, p, state, dy, dfinal)))

    clean = results()
    if where == "rows":
        z[38], z[100, 3], z[187, 7] = float("nan"), float("inf"), float("-inf")
        dy[60], dy[187, 2] = float("inf"), float("nan")
    elif where == "weights":
        p[40], p[120], p[187] = float("nan"), float("inf"), float("nan")
    else:
        state[3, ::2], dfinal[3, 1::2] = float("inf"), float("nan")
    dirty = results()
    assert not dirty[0][38:188].isfinite().all()
    assert not dirty[2][38:188].isfinite().all()
    for name, a, b in zip(("y", "final", "dz", "dp", "dstate"), clean, dirty, strict=True):
        if a.shape[0] == 7:
            assert torch.equal(a[others], b[others]), name
        else:
            assert torch.equal(a[:38], b[:38]), name
            assert torch.equal(a[188:], b[188:]), name


def test_gradcheck_reference():
    cu = cu_of([1, 0, 6, 4])
    args = rand(11, 3, dtype=torch.float64), weights(11, "any").double(), rand(4, 3, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(
        lambda z, p, s: hk.ema(z, p, cu, s, return_final_state=True, backend="reference"), tuple(map(leaf, args))
    )
