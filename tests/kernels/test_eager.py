"""Eager calls go straight to the kernels, to the same effect as through PyTorch's dispatcher; and wherever that would
do more than call them, through it."""

import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hnet_kernels as hk

from .cases import PACKS, cu_of, leaf, qk_with_rate, rand, routing_with
from .test_pool import on_device


def leaves(device):
    q, k = qk_with_rate(254, 33, 0.3)
    p = torch.rand(254, generator=torch.Generator().manual_seed(0))
    given = q, k, rand(254, 33), rand(254, 33, seed=1), torch.tensor(0.1), p, rand(7, 33)
    return [leaf(x.to(device)) for x in given]


def everything(backend, device, budget=100):
    """Every op's outputs, and the gradients of all that has one."""
    q, k, x, residual, bias, p, state = inputs = leaves(device)
    cu = cu_of(PACKS["ragged"], device)
    with hk.backend(backend):
        r = hk.route(q, k, cu, logit_bias=bias, max_chunks=budget)
        outs = [hk.dechunk(hk.pool(x, r, mode), r, residual) for mode in ("boundary", "mean", "max", "last")]
        y, final = hk.ema(x, p, cu, state, True)
        loss = hk.ratio_loss(r, 3.0)
        with torch.no_grad():
            steps = *hk.route_step(q, k, logit_bias=bias), *hk.dechunk_step(x, p, p > 0.5, residual)
        inside = hk.dechunk(hk.pool(x.detach(), r), r)  # only the probabilities need a gradient
    total = sum(o.square().sum() for o in (*outs, y, final, inside)) + loss + r.boundary_prob.square().sum()
    return [*r, *outs, y, final, loss, inside, *steps], torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("budget", [None, 100])
def test_the_same_bits_either_way(native, asked, dispatched, budget):
    outs, grads = everything(*native, budget)
    assert len(asked) >= 25  # 14 forward, 11 backward; the ratio loss has kernels on a GPU only
    assert all(asked)
    want, dwant = dispatched(everything, *native, budget)
    for a, b in zip(outs, want, strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride(), a.requires_grad) == (b.dtype, b.stride(), b.requires_grad)
    assert all(torch.equal(a, b) for a, b in zip(grads, dwant, strict=True))


def test_no_op_goes_through_the_dispatcher_by_itself():
    """Only `library.define`, which asks first, knows torch.ops."""
    package = Path(hk.__file__).parent
    assert [str(p.relative_to(package)) for p in package.rglob("*.py") if "torch.ops.hnet" in p.read_text()] == [
        "library.py"
    ]


def test_no_gradient_and_inference_mode(native, asked):
    backend, device = native
    x, r = leaf(rand(254, 33).to(device)), on_device(routing_with("random", PACKS["ragged"]), device)
    with torch.no_grad():
        assert not hk.pool(x, r, backend=backend).requires_grad
    with torch.inference_mode():
        z = hk.pool(x, r, backend=backend)
    assert z.is_inference()
    assert not z.requires_grad
    assert all(asked)


class Names(TorchDispatchMode):
    """The ops of ours that the dispatcher sees"""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hnet_kernels":
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_every_op(native):
    with Names() as mode:
        everything(*native)
    ops = {"route", "pool", "dechunk", "ema", "route_bwd", "pool_bwd", "dechunk_bwd", "ema_bwd"}
    assert {*mode.seen} >= ops | {"route_step", "dechunk_step"}


def test_a_mode_that_begins_with_the_backward_sees_it(native):
    backend, device = native
    x, r = leaf(rand(254, 33).to(device)), on_device(routing_with("random", PACKS["ragged"]), device)
    total = hk.pool(x, r, backend=backend).sum()
    with Names() as mode:
        total.backward()
    assert mode.seen == ["pool_bwd"]


def test_a_function_mode_sees_every_op(native):
    with Functions() as mode:
        everything(*native)
    assert {"route", "pool", "dechunk", "ema", "route_step", "dechunk_step"} <= {
        name.split(".")[0] for name in mode.seen
    }


def test_a_profiler_names_the_ops(native):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        everything(*native)
    assert {"hnet_kernels::route", "hnet_kernels::pool_bwd"} <= {e.name for e in profiler.events()}


def pooled(backend, r):
    return lambda x: hk.pool(x, r, backend=backend)


def test_fake_tensors_stay_fake(native):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    backend, device = native
    r = on_device(routing_with("random", PACKS["ragged"]), device)
    with FakeTensorMode() as mode:
        fakes = hk.Routing(*(mode.from_tensor(f) for f in r))
        z = hk.pool(torch.empty(254, 33, device=device), fakes, backend=backend)
    assert isinstance(z, FakeTensor)
    assert isinstance(hk.pool(mode.from_tensor(rand(254, 33).to(device)), fakes, backend=backend), FakeTensor)


def test_traces_hold_the_op(native):
    from torch.fx.experimental.proxy_tensor import make_fx

    backend, device = native
    x, r = rand(254, 33).to(device), on_device(routing_with("random", PACKS["ragged"]), device)
    graph = make_fx(pooled(backend, r))(x)
    assert any("hnet_kernels.pool" in str(n.target) for n in graph.graph.nodes)
    captured = []

    def keep(graph, inputs):
        captured.extend(str(n.target) for n in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(pooled(backend, r), backend=keep, fullgraph=True)(x)
    assert any("hnet_kernels.pool" in target for target in captured)


def same(a, b):
    if torch.is_tensor(b):
        return torch.is_tensor(a) and torch.equal(a, b)
    return all(map(same, a, b)) if isinstance(b, tuple) and torch.is_tensor(b[0]) else a == b


def outcome(f):
    """What f gives, or raises, and what it warns of"""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            result = f()
        except Exception as e:
            result = type(e), str(e).splitlines()[0]
    return result, sorted({str(w.message).splitlines()[0] for w in warned})


def test_transforms_and_forward_mode_are_the_dispatchers(native, dispatched):
    backend, device = native
    x, r = rand(254, 33).to(device), on_device(routing_with("random", PACKS["ragged"]), device)
    f = pooled(backend, r)

    def forward_mode():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            return torch.autograd.forward_ad.unpack_dual(f(dual)).tangent

    for call in (
        lambda: torch.func.grad(lambda x: f(x).sum())(x),
        lambda: torch.vmap(f)(x[None]),
        lambda: torch.func.jvp(f, (x,), (x,)),
        forward_mode,
    ):
        outcome(call)  # some warnings come once
        (got, warned), (want, expected) = outcome(call), dispatched(outcome, call)
        assert warned == expected
        assert same(got, want)


class Logged(torch.Tensor):
    """A subclass that looks like a tensor and hears of what is done with it"""

    heard: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.heard.append(getattr(func, "__name__", str(func)).split(".")[0])
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_hear_of_the_op(native):
    backend, device = native
    r = on_device(routing_with("random", PACKS["ragged"]), device)
    Logged.heard.clear()
    z = hk.pool(rand(254, 33).to(device).as_subclass(Logged), r, backend=backend)
    assert type(z) is Logged
    assert "pool" in Logged.heard


def test_tensors_that_are_not_what_their_memory_says(native, asked):
    """A pending negation, zeros without memory"""
    backend, device = native
    r = on_device(routing_with("random", PACKS["ragged"]), device)
    negative = torch.complex(rand(254, 33), rand(254, 33, seed=1)).to(device).conj().imag
    assert negative.is_neg()
    assert torch.equal(
        hk.pool(negative, r, backend=backend), hk.pool(negative.resolve_neg().clone(), r, backend=backend)
    )
    zero = torch._efficientzerotensor(254, 33, device=device)
    assert (hk.pool(zero, r, backend=backend) == 0).all()
    assert asked == [False, True, False]


def test_saved_tensors_are_seen_by_hooks_and_guarded(native, dispatched):
    backend, device = native
    r = on_device(routing_with("random", PACKS["ragged"]), device)
    z = rand(r.chunk_start.shape[0], 33).to(device)

    def saved():
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
            hk.dechunk(leaf(z), r, backend=backend).sum().backward()
        return shapes

    assert saved() == dispatched(saved)
    assert saved()

    def changed():
        x, copy = leaf(rand(254, 33).to(device)), r._replace(chunk_start=r.chunk_start.clone())
        out = hk.pool(x, copy, backend=backend)
        copy.chunk_start.zero_()
        out.sum().backward()

    got = outcome(changed)
    assert "modified by an inplace operation" in str(got)
    assert got == dispatched(outcome, changed)


def test_a_second_derivative_gets_the_dispatchers_warning(native, dispatched):
    """Backwards have no gradient of their own: PyTorch says so, however the op was called."""
    backend, device = native
    r = on_device(routing_with("random", PACKS["ragged"]), device)

    def second():
        x = leaf(rand(254, 33).to(device))
        y = hk.pool(x, r, "mean", backend=backend).square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        assert first.requires_grad
        return torch.autograd.grad(first.sum(), x)[0].tolist()

    got = outcome(second)
    assert got == dispatched(outcome, second)
    assert "pool_bwd: an autograd kernel was not registered" in str(got[1])
