"""Made-up arguments: wrong ones are errors that name them, whatever else is given; right ones agree with fp64.

Hypothesis draws the packs from a fixed seed, so every run sees the same ones. `make sanitize` runs this file on a build
of the extension that stops at any access outside of an array.
"""

import re

import pytest
import torch

import hnet_kernels as hk
from hnet_kernels import reference

from .cases import ROUNDING, assert_close, cu_of, leaf, qk_with_rate, rand, rel

hypothesis = pytest.importorskip("hypothesis")  # a borrowed GPU machine may lack it
HealthCheck, given, settings, st = hypothesis.HealthCheck, hypothesis.given, hypothesis.settings, hypothesis.strategies

NAN, INF = float("nan"), float("inf")


def drawn(examples):
    hush = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=hush)


# --- right arguments, by op ------------------------------------------------------------------------------------------

OPS = {
    "route": hk.route, "route_step": hk.route_step, "pool": hk.pool, "dechunk": hk.dechunk,
    "dechunk_step": hk.dechunk_step, "ema": hk.ema, "ratio_loss": hk.ratio_loss,
}  # fmt: skip


def arguments(op, lengths, D, seed):
    """Every argument of `op`, by name, for a pack of at least two positions. The first and the last sequence are not
    empty."""
    T, N = sum(lengths), len(lengths)
    q, k = qk_with_rate(T, D, 0.4, seed=seed)
    cu, flags = cu_of(lengths), torch.arange(T) % 3 > 0
    x, state, p = rand(T, D, seed=seed), rand(N, D, seed=seed), rand(T, seed=seed).sigmoid()
    r = reference.route(q, k, cu)
    common = {"backend": "auto"}
    return {
        "route": dict(
            q=q, k=k, cu_seqlens=cu, logit_bias=0.1, candidates=flags, max_chunks=T + 1, padded=False, **common
        ),
        "route_step": dict(q_prev=q, k=k, is_first=flags, logit_bias=0.1, candidates=flags, **common),
        "pool": dict(x=x, r=r, mode="mean", **common),
        "dechunk": dict(z=x[: len(r.chunk_start)].clone(), r=r, residual=x, **common),
        "dechunk_step": dict(
            z=x, boundary_prob=p, boundary_mask=flags, state=rand(T, D, seed=seed), residual=x, **common
        ),
        "ema": dict(z=x, p=p, cu_seqlens=cu, initial_state=state, **common),
        "ratio_loss": dict(r=r, target_ratio=3.0, reduction="sequence", straight_through=True),
    }[op]  # fmt: skip


PACKS = st.tuples(
    st.lists(st.integers(0, 9), max_size=4).map(lambda middle: [2, *middle, 3]), st.integers(1, 9), st.integers(0, 99)
)

# --- what may be wrong with an argument ------------------------------------------------------------------------------


def any_tensor(x):
    return {
        "a list": x.tolist(), "a number": 3, "text": "x", "an array": x.numpy(), "on meta": x.to("meta"),
        "sparse": x.to_sparse(), "one more dimension": x[None], "no dimension": x.sum(),
    }  # fmt: skip


def row_like(x):
    return {
        **any_tensor(x), "int64": x.long(), "bool": x > 0, "complex": x + 0j, "float8": x.to(torch.float8_e4m3fn),
        "one dimension": x[:, 0],
    }  # fmt: skip


def longer(x):
    return torch.cat([x, x[-1:]])


def rows(x):
    return {**row_like(x), "None": None, "a row more": longer(x), "a row less": x[:-1]}


def with_width(x):
    return {**rows(x), "a column more": torch.cat([x, x[:, :1]], 1), "no column": x[:, :0]}


def optional_rows(x):
    return {name: bad for name, bad in with_width(x).items() if name != "None"}


def vector(x):
    dtypes = {torch.int32: torch.int64, torch.bool: torch.uint8, torch.float32: torch.float16}
    return {
        **any_tensor(x), "None": None, "another dtype": x.to(dtypes[x.dtype]), "complex": x + 0j, "longer": longer(x),
        "shorter": x[:-1], "empty": x[:0],
    }  # fmt: skip


def optional_vector(x):
    return {name: bad for name, bad in vector(x).items() if name != "None"}


def lengths(x):
    return {
        **vector(x), "longer": torch.cat([x, x[-1:] + 1]), "float": x.float(), "starts at 1": x.clamp(min=1),
        "starts at -1": torch.where(x == 0, -1, x),
        "ends late": x + x.eq(x[-1]).int(), "ends early": x - x.eq(x[-1]).int(), "decreases": x.flip(0),
        "huge": torch.where(x == x[-1], 2**31 - 1, x), "negative": -x,
    }  # fmt: skip


def chunk_counts(x):
    return {
        **vector(x),
        "doubled": x * 2,
        "decreases": x.flip(0),
        "starts at 1": x + 1,
        "huge": x + 2**30,
        "none": x * 0,
    }


def chunk_starts(x):
    return {**vector(x), "far": x + 1000, "negative": -1 - x, "reversed": x.flip(0), "all the same": x * 0}


def bias(_):
    return {
        "nan": NAN, "inf": INF, "-inf": -INF, "81": 81, "-1e300": -1e300, "text": "1", "a list": [1.0],
        "a pair": (0, 1), "a NaN tensor": torch.tensor(NAN), "inf in fp64": torch.tensor(-INF, dtype=torch.float64),
        "two numbers": torch.ones(2), "int": torch.tensor(1), "complex": torch.tensor(1j),
        "on meta": torch.zeros((), device="meta"),
    }  # fmt: skip


def budget(_):
    bad = (-1, 0, 1, 2.5, "7", True, NAN, 2**31, 2**70, -(2**70), [4], torch.tensor(7))
    return {repr(b): b for b in bad}


def flag(_):
    return {repr(b): b for b in (None, "no", 1, 0.0, [], torch.tensor(True))}


def ratio(_):
    return {repr(b): b for b in (1, 0.5, 0, -3, 1 - 1e-9, NAN, INF, -INF, None, "x", "", [3.0], torch.ones(2), 3j)}


def choice(_):
    return {repr(b): b for b in (None, "", "median", "MEAN", 3, ["mean"], b"mean", "mean ")}


def backend_name(_):
    return {repr(b): b for b in ("", "gpu", "CPU", 3, ["cpu"], b"cpu", "cpu ", False)}


def routing(r):
    bad = {"None": None, "a tuple": tuple(r), "a dict": r._asdict(), "its mask": r.boundary_mask}
    return bad | {f"its {n} missing": r._replace(**{n: None}) for n in ("cu_seqlens", "cu_chunks")}


def field(name, spoil, but=None):
    """`but`: what is right here, such as padding rows or chunks"""
    return lambda r: {how: r._replace(**{name: bad}) for how, bad in spoil(getattr(r, name)).items() if how != but}


CHUNKS = {
    "r": routing, "r.cu_seqlens": field("cu_seqlens", lengths, "ends early"),
    "r.cu_chunks": field("cu_chunks", chunk_counts),
    "r.chunk_start": field("chunk_start", chunk_starts, "longer"), "r.chunk_index": field("chunk_index", vector),
}  # fmt: skip
PROBS = {f"r.{name}": field(name, vector) for name in ("boundary_prob", "selected_prob")}
SPOILERS = {
    "route": dict(
        q=with_width, k=with_width, cu_seqlens=lengths, logit_bias=bias, candidates=optional_vector, max_chunks=budget,
        padded=flag, backend=backend_name,
    ),
    "route_step": dict(
        q_prev=with_width, k=with_width, is_first=optional_vector, logit_bias=bias, candidates=optional_vector,
        backend=backend_name,
    ),
    "pool": dict(x=rows, mode=choice, backend=backend_name, **CHUNKS),
    "dechunk": dict(z=with_width, residual=optional_rows, backend=backend_name, **CHUNKS, **PROBS),
    "dechunk_step": dict(
        z=with_width, boundary_prob=vector, boundary_mask=vector, state=with_width, residual=optional_rows,
        backend=backend_name,
    ),
    "ema": dict(z=with_width, p=vector, cu_seqlens=lengths, initial_state=optional_rows, backend=backend_name),
    "ratio_loss": {
        "target_ratio": ratio, "reduction": choice, "straight_through": flag, "r.prob_sum": field("prob_sum", vector),
        "r.cu_seqlens": field("cu_seqlens", vector), "r.cu_chunks": field("cu_chunks", vector), "r": routing,
    },
}  # fmt: skip
BAD = [(op, name) for op, spoilers in SPOILERS.items() for name in spoilers]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    with hk.backend(request.param):
        yield request.param


def wrong(op, name, good):
    return SPOILERS[op][name](good[name.partition(".")[0]])


def test_there_are_many_of_them():
    good = {op: arguments(op, [2, 4, 3], 4, 0) for op in OPS}
    assert sum(len(wrong(op, name, good[op])) for op, name in BAD) > 300
    for op, args in good.items():
        assert args.keys() == {name.partition(".")[0] for name in SPOILERS[op]}


@pytest.mark.parametrize(("op", "name"), BAD)
@drawn(5)
@given(pack=PACKS)
def test_a_wrong_argument_is_an_error_that_names_it(backend, op, name, pack):
    good = arguments(op, *pack)
    if backend == "reference" or name != "backend":
        good["backend"] = backend
    if op == "ratio_loss":
        del good["backend"]
    OPS[op](**good)
    argument, _, part = name.partition(".")
    for how, bad in wrong(op, name, good).items():
        with pytest.raises((TypeError, ValueError)) as e:
            print(how, OPS[op](**{**good, argument: bad}))
        named = rf"\b({argument}|{part}|routing)\b" if argument == "r" else rf"\b{argument}\b"
        assert re.search(named, str(e.value)), f"{how}: {e.value}"
        assert "\n" not in str(e.value)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just(()),
    st.builds(
        lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
        st.lists(st.integers(0, 9), max_size=3),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.bool]),
        st.sampled_from([0, 1, -1, 5, 2**30]),
    ),
)  # fmt: skip


@pytest.mark.parametrize("op", OPS)
@drawn(120)
@given(pack=PACKS, data=st.data())
def test_anything_at_all_is_taken_or_refused(op, pack, data):
    """Both backends agree on which, and neither fails in another way."""
    args = arguments(op, *pack)
    args.pop("backend", None)
    for name in data.draw(st.lists(st.sampled_from([*args]), min_size=1, unique=True)):
        junk = data.draw(JUNK)
        if name == "r":
            fields = ("boundary_prob", "selected_prob", "cu_seqlens", "cu_chunks", "chunk_start", "prob_sum")
            junk = args["r"]._replace(**{data.draw(st.sampled_from(fields)): junk})
        args[name] = junk
    outcome = {}
    for backend in ("reference", "cpu"):
        with hk.backend(backend):
            try:
                out = OPS[op](**args)
            except (TypeError, ValueError) as e:
                outcome[backend] = str(e)
            except RuntimeError as e:  # fp64 is the reference's only; "global" wants processes
                if not re.match("backend 'cpu' cannot run|reduction='global'", str(e)):
                    raise
                return
            else:
                outcome[backend] = [tuple(x.shape) for x in (out if isinstance(out, tuple) else (out,))]
    assert isinstance(outcome["cpu"], str) == isinstance(outcome["reference"], str), outcome
    if not isinstance(outcome["cpu"], str):
        assert outcome["cpu"] == outcome["reference"]


# --- right arguments agree with fp64 ---------------------------------------------------------------------------------

SIZES = st.tuples(st.lists(st.one_of(st.integers(0, 4), st.integers(0, 70)), max_size=6), st.integers(0, 70))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DRAWN = dict(sizes=SIZES, dtype=DTYPES, seed=st.integers(0, 999))


def tolerance(dtype, terms, low=1.0):
    return 1e-5 * max(terms, 1) ** 0.5 if dtype == torch.float32 else low * ROUNDING[dtype]


def check(f, args, terms, low):
    """f(backend, *args) against f("reference", *the same in fp64): outputs, then the gradients"""
    results, dout = [], None
    for backend, given_args in (("cpu", args), ("reference", [a.double() for a in args])):
        leaves = [leaf(a) for a in given_args]
        out = f(backend, *leaves)
        dout = [rand(*o.shape, dtype=o.dtype, seed=9) for o in out] if dout is None else dout
        used = [(o, d.to(o.dtype)) for o, d in zip(out, dout, strict=True) if o.requires_grad]
        total = sum(((o * d).sum() for o, d in used), torch.zeros((), requires_grad=True))
        grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        results.append((*out, *grads))
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert got.shape == want.shape
        assert rel(got, want) <= tolerance(got.dtype, terms, low), (i, rel(got, want))


def routed(lengths, D, seed, max_chunks=None, padding=0, candidates=None, logit_bias=None):
    T = sum(lengths) + padding
    q, k = qk_with_rate(T, max(D, 2), 0.4, seed=seed)
    return hk.route(
        q, k, cu_of(lengths), candidates=candidates, max_chunks=max_chunks, padded=True, logit_bias=logit_bias,
        backend="cpu",
    )  # fmt: skip


@drawn(60)
@given(
    **DRAWN, bias=st.sampled_from([None, 0.0, 0.1, -0.1, 9.0, -9.0, 80.0, -80.0]), chosen=st.booleans(),
    room=st.none() | st.integers(0, 90), padding=st.sampled_from([0, 1, 17]),
)  # fmt: skip
def test_route_agrees(sizes, dtype, seed, bias, chosen, room, padding):
    """Probabilities and gradients with fp64; the layout, exactly, with what those probabilities make it"""
    lengths, D = sizes[0], max(sizes[1], 2)
    T, N = sum(lengths) + padding, len(lengths)
    q, k = qk_with_rate(T, D, 0.4, dtype, seed)
    budget = None if room is None else max(N, 1) + room
    candidates = torch.arange(T) % 3 > 0 if chosen else None
    options = dict(candidates=candidates, max_chunks=budget, padded=padding > 0, logit_bias=bias)

    def f(backend, q, k):
        return hk.route(q, k, cu_of(lengths), **options, backend=backend)

    r, exact = f("cpu", q, k), f("reference", q.double(), k.double())
    assert (r.boundary_prob - exact.boundary_prob).abs().max() <= 2e-6 if T else True
    first, valid = reference.starts(r.cu_seqlens, T), torch.arange(T) < r.cu_seqlens[-1]
    wanted = first | ((r.boundary_prob > 0.5) & valid & (candidates if chosen else True))
    kept = wanted if budget is None else reference.drop_past_budget(wanted, r.boundary_prob, first, budget)
    assert torch.equal(r.boundary_mask, kept)
    assert torch.equal(r.boundary_mask, exact.boundary_mask)
    for name in ("chunk_index", "chunk_start", "cu_chunks", "num_dropped"):
        assert torch.equal(getattr(r, name), getattr(exact, name)), name
    assert_close(r.prob_sum, exact.prob_sum, 1e-5 if N else 0, "prob_sum")
    entropies = torch.nn.functional.pad(reference.entropy(r.boundary_prob.double()).cumsum(0), (1, 0))
    assert_close(r.entropy_sum, entropies[r.cu_seqlens.long()].diff(), 1e-6 if N else 0, "entropy_sum")
    mild = bias in (None, 0.0, 0.1, -0.1)
    if abs(bias or 0) < 20:  # beyond that the derivative by p is larger than an fp32 number of p can tell
        check(lambda *a: f(*a)[:3:2], [q, k], D * 30 if mild else D * 1e8, 3)
    if mild:
        check(lambda *a: [f(*a).entropy_sum], [q, k], D * 30, 3)


@drawn(60)
@given(**DRAWN, mode=st.sampled_from(["boundary", "mean", "max", "last"]), padding=st.sampled_from([0, 5]))
def test_pool_agrees(sizes, dtype, seed, mode, padding):
    lengths, D = sizes
    r = routed(lengths, D, seed, len(lengths) + 20 if padding else None, padding)
    x = rand(sum(lengths) + padding, D, dtype=dtype, seed=seed)
    check(lambda b, x: [hk.pool(x, r, mode, backend=b)], [x], 70, 2)


@drawn(60)
@given(**DRAWN, added=st.sampled_from([None, torch.float32, torch.bfloat16]), padding=st.sampled_from([0, 5]))
def test_dechunk_agrees(sizes, dtype, seed, added, padding):
    lengths, D = sizes
    r = routed(lengths, D, seed, len(lengths) + 20 if padding else None, padding)
    T, M = sum(lengths) + padding, r.chunk_start.shape[0]
    args = [rand(M, D, dtype=dtype, seed=seed), r.boundary_prob, r.selected_prob]
    args += [] if added is None else [rand(T, D, dtype=added, seed=seed + 1)]

    def f(backend, z, p, c, residual=None):
        return [hk.dechunk(z, r._replace(boundary_prob=p, selected_prob=c), residual, backend=backend)]

    check(f, args, D * 70, 3)


@drawn(60)
@given(**DRAWN, with_state=st.booleans(), extreme=st.booleans())
def test_ema_agrees(sizes, dtype, seed, with_state, extreme):
    lengths, D = sizes
    T, N = sum(lengths), len(lengths)
    p = rand(T, seed=seed).sigmoid()
    p = p.round() if extreme else p
    args = [rand(T, D, dtype=dtype, seed=seed), p] + ([rand(N, D, seed=seed + 2)] if with_state else [])

    def f(backend, z, p, state=None):
        return hk.ema(z, p, cu_of(lengths), state, return_final_state=True, backend=backend)

    check(f, args, D * 70, 3)


@drawn(40)
@given(**DRAWN, first=st.booleans(), added=st.sampled_from([None, torch.float32, torch.bfloat16]))
def test_steps_agree(sizes, dtype, seed, first, added):
    B, D = len(sizes[0]), max(sizes[1], 2)
    q, k = qk_with_rate(B, D, 0.4, dtype, seed)
    flags = torch.arange(B) % 2 > 0 if first else None
    got = hk.route_step(q, k, is_first=flags, candidates=flags, backend="cpu")
    want = hk.route_step(q.double(), k.double(), is_first=flags, candidates=flags, backend="reference")
    assert torch.equal(got[1], want[1])
    assert_close(got[0], want[0], 2e-6)
    assert_close(got[2], want[2], 2e-6)
    p, mask, state = got[0], got[1], rand(B, D, seed=seed)
    residual = None if added is None else rand(B, D, dtype=added, seed=seed)
    out, new = hk.dechunk_step(q, p, mask, state, residual, backend="cpu")
    wide = None if added is None else residual.double()
    want = hk.dechunk_step(q.double(), p.double(), mask, state.double(), wide, backend="reference")
    assert_close(new, want[1], 1e-6)
    assert_close(out, want[0], tolerance(dtype, 1))


@pytest.mark.parametrize(("T", "D"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_nothing_at_all(backend, T, D):
    """No positions, no columns, forward and backward"""
    x, cu = leaf(torch.zeros(T, D)), cu_of([T])
    r = hk.route(x, x, cu)
    out = hk.dechunk(hk.pool(x, r), r, x)
    y, final = hk.ema(x, torch.ones(T), cu, return_final_state=True)
    assert out.shape == y.shape == (T, D)
    assert final.shape == (1, D)
    assert r.chunk_start.tolist() == [0] * T
    (out.sum() + y.sum() + hk.ratio_loss(r, 2.0)).backward()
    assert x.grad.shape == (T, D)
