"""The published package's layers on our ops, against a stand-in tree with its signatures (the package needs CUDA)."""

import copy
import importlib
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import hnet
import hnet_kernels as hk
from hnet_kernels.integrations import goombalab
from tests.kernels.cases import assert_close, cu_of, rand, rel

from . import standin

D = 24
LENGTHS = [37, 1, 64, 5]
REPLACED = (
    ("RoutingModule", "forward"),
    ("RoutingModule", "step"),
    ("ChunkLayer", "forward"),
    (
        "DeChunkLayer",
        "forward",
    ),
    ("DeChunkLayer", "step"),
)


@pytest.fixture
def theirs() -> ModuleType:
    return standin.build()


@pytest.fixture
def ours() -> ModuleType:
    module = standin.build()
    goombalab.patch(module)
    return module


def model_of(module, stages=1, dtype=torch.float64, seed=0, device="cpu"):
    torch.manual_seed(seed)
    return module.models.hnet.HNet(D, stages).to(device, dtype)


def padded_of(lengths, dtype=torch.float64, device="cpu"):
    L = max(lengths)
    mask = torch.arange(L, device=device) < torch.tensor(lengths, device=device)[:, None]
    return rand(len(lengths), L, D, dtype=dtype).to(device), mask


def inputs_of(layout, dtype, device):
    if layout == "packed":
        return rand(sum(LENGTHS), D, dtype=dtype).to(device), {"cu_seqlens": cu_of(LENGTHS, device)}
    x, mask = padded_of(LENGTHS, dtype, device)
    return x, {"mask": mask}


def train_step(module, model, x, where):
    """Outputs, router outputs, losses and every gradient of one step, without padding: what its slots hold is not part
    of the contract, and the published ratio loss of an inner stage counts them, so it is left out there."""
    x = x.clone().requires_grad_()
    out, routers = model(x, **where)
    mask = where.get("mask")
    reals = [slice(None) if mask is None else mask]
    for r in routers[:-1]:
        chunks = r.boundary_mask.sum(-1, keepdim=True)
        reals.append(slice(None) if mask is None else torch.arange(int(chunks.max()), device=x.device) < chunks)
    loss = (out * rand(*out.shape, seed=1).to(out))[reals[0]].sum() / 8
    ratios = [module.utils.train.load_balancing_loss(r, 2.5) for r in routers[: None if mask is None else 1]]
    grads = torch.autograd.grad(loss + sum(ratios), (x, *model.parameters()))
    return {
        "out": out[reals[0]],
        **{f"router {i} {k}": v[reals[i]] for i, r in enumerate(routers) for k, v in vars(r).items()},
        **{f"ratio loss {i}": v for i, v in enumerate(ratios)},
        **{f"gradient {n}": g for n, g in zip(["x", *dict(model.named_parameters())], grads, strict=True)},
    }


ON = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-6), (torch.float32, 5e-5)])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_training_step(theirs, ours, layout, stages, dtype, tol, device):
    """fp64 runs the reference, held back to 1e-6 by the published loss being fp32; fp32 runs the kernels."""
    x, where = inputs_of(layout, dtype, device)
    models = [model_of(m, stages, dtype, device=device) for m in (theirs, ours)]
    want, got = (train_step(m, model, x, where) for m, model in zip((theirs, ours), models, strict=True))
    assert 0.2 < want["router 0 boundary_mask"].sum() / sum(LENGTHS) < 0.8  # random inputs: boundaries and none
    for name, w in want.items():
        if w.dtype == torch.bool:
            assert torch.equal(got[name], w), name
        else:
            assert got[name].dtype == w.dtype, name
            assert_close(got[name].detach(), w.detach(), tol, name)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_layer_shapes(theirs, ours, layout):
    """What each layer returns, field by field: types, dtypes and shapes too."""
    x, where = inputs_of(layout, torch.float64, "cpu")
    a, b = (m.modules.dc.RoutingModule(D, dtype=torch.float64) for m in (theirs, ours))
    b.load_state_dict(a.state_dict())
    ra, rb = a(x, **where), b(x, **where)
    assert type(rb) is ours.modules.dc.RoutingModuleOutput
    for name, w in vars(ra).items():
        assert getattr(rb, name).shape == w.shape
    ca, cb = (m.modules.dc.ChunkLayer()(x, ra.boundary_mask, **where) for m in (theirs, ours))
    assert [type(v) for v in ca] == [type(v) for v in cb]
    assert ca[0].shape == cb[0].shape
    assert ca[2] == cb[2]
    if layout == "packed":
        assert torch.equal(ca[0], cb[0])
        assert torch.equal(ca[1], cb[1])
        assert ca[1].dtype == cb[1].dtype == torch.int64
    else:
        assert torch.equal(ca[3], cb[3])
        assert torch.equal(ca[0][ca[3]], cb[0][cb[3]])
        assert (cb[0][~cb[3]] == 0).all()


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_bf16(theirs, ours, layout):
    """Each layer in bf16 errs at most twice (gradients: three times) as much as the stand-in in bf16."""
    x, where = inputs_of(layout, torch.float64, "cpu")
    exact = theirs.modules.dc.RoutingModule(D, dtype=torch.float64)
    r = exact(x, **where)
    z, next_cu, _, _ = theirs.modules.dc.ChunkLayer()(x, r.boundary_mask, **where)

    def run(module, dtype):
        layer = module.modules.dc.RoutingModule(D, dtype=dtype)
        layer.load_state_dict(exact.state_dict())
        a, b = x.to(dtype).requires_grad_(), z.to(dtype).requires_grad_()
        prob = r.boundary_prob.detach().to(dtype).requires_grad_()
        p = layer(a, **where).boundary_prob
        out = module.modules.dc.DeChunkLayer(D)(b, r.boundary_mask, prob, next_cu, mask=where.get("mask"))
        assert out.dtype == dtype
        loss = (p * rand(*p.shape).to(p)).sum() + (out * rand(*out.shape, seed=1).to(out)).sum()
        return [p, out], torch.autograd.grad(loss, (a, b, prob, *layer.parameters()))

    want, plain, got = run(theirs, torch.float64), run(theirs, torch.bfloat16), run(ours, torch.bfloat16)
    for factor, wanted, by_plain, by_us in zip((2, 3), want, plain, got, strict=True):
        for w, p, g in zip(wanted, by_plain, by_us, strict=True):
            assert rel(g.detach(), w.detach()) <= factor * rel(p.detach(), w.detach()) + 1e-6


def test_autocast(ours):
    x, where = inputs_of("padded", torch.float32, "cpu")
    model = model_of(ours, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = model(x, **where)
    assert_close(out.detach()[where["mask"]].float(), model(x, **where)[0].detach()[where["mask"]], 0.1)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("stages", "lengths"), [(1, [9, 1, 14]), (2, [11])])
def test_prefill_and_steps_equal_the_full_forward(ours, stages, lengths, dtype, tol):
    steps = 12
    model, (B, L) = model_of(ours, stages, dtype), (len(lengths), max(lengths))
    x = rand(B, L + steps, D, dtype=dtype)
    prompt, mask = x[:, :L], padded_of(lengths)[1]
    more = torch.stack([x[b, n : n + steps] for b, n in enumerate(lengths)])  # each goes on where its prompt ends
    state = model.allocate_inference_cache(B, "cpu", dtype)
    with torch.no_grad():
        out, _ = model(prompt, mask=mask, state=state)
        stepped = torch.cat([model.step(more[:, i : i + 1], state) for i in range(steps)], 1)
        for b, n in enumerate(lengths):
            full, _ = model(x[b : b + 1, : n + steps], mask=torch.ones(1, n + steps, dtype=torch.bool))
            assert_close(out[b, :n], full[0, :n], tol, f"prompt {b}")
            assert_close(stepped[b], full[0, n:], tol, f"steps {b}")


def test_steps_agree_with_theirs(theirs, ours):
    """States and outputs of every step, from empty caches, with steps on which no sequence begins a chunk."""
    x = rand(2, 40, D, dtype=torch.float64)
    x[:, 8:20] = x[:, 7:8]  # nothing new: no boundary
    made = []
    for module in (theirs, ours):
        model = model_of(module)
        state = model.allocate_inference_cache(2, "cpu", torch.float64)
        with torch.no_grad():
            made.append(torch.cat([model.step(x[:, i : i + 1], state) for i in range(40)], 1))
        made.append(state.dechunk.last_value)
        made.append(state.routing.last_hidden_state)
        assert state.routing.has_seen_tokens.all()
    for want, got in zip(made[:3], made[3:], strict=True):
        assert_close(got, want, 1e-12)


def test_packed_equals_padded(ours):
    model = model_of(ours, 2)
    x, mask = padded_of(LENGTHS)
    out, _ = model(x, mask=mask)
    packed, _ = model(x[mask], cu_seqlens=cu_of(LENGTHS))
    assert_close(packed.detach(), out[mask].detach(), 1e-12)


def test_a_row_of_padding_changes_no_other(ours):
    x, mask = padded_of([20, 0, 7])
    where = train_step(ours, model_of(ours), x, {"mask": mask})
    alone = train_step(ours, model_of(ours), x[[0, 2]], {"mask": mask[[0, 2]]})
    assert torch.equal(where["out"], alone["out"])
    model = model_of(ours)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x, mask=mask)[0][mask].sum(), x)
    assert (grad[1] == 0).all()
    assert grad.isfinite().all()
    empty, _ = model(x, mask=torch.zeros_like(mask))  # nothing but padding
    assert empty.shape == x.shape
    assert empty.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_no_layer_but_chunk_waits_for_the_device(ours, monkeypatch, backend):
    """Fake tensors have no values: reading one raises, where a GPU would wait. Forward and backward, both layouts."""
    monkeypatch.setattr(goombalab, "_readable", lambda x: False)  # the checks made where reading is free
    monkeypatch.setattr("hnet_kernels.routing.check_cu_seqlens_values", lambda *args: None)
    dc = ours.modules.dc
    with FakeTensorMode(), hk.backend(backend):
        routing, chunk, dechunk = dc.RoutingModule(D), dc.ChunkLayer(), dc.DeChunkLayer(D)
        for shape, where in (
            ((50, D), {"cu_seqlens": torch.empty(4, dtype=torch.int32)}),
            ((3, 20, D), {"mask": torch.empty(3, 20, dtype=torch.bool)}),
        ):
            x, z = torch.empty(*shape, requires_grad=True), torch.empty(*shape[:-2], 7, D, requires_grad=True)
            r = routing(x, **where)
            out = dechunk(z, r.boundary_mask, r.boundary_prob, where.get("cu_seqlens"), mask=where.get("mask"))
            (out.sum() + ours.utils.train.load_balancing_loss(r, 3.0)).backward()
            assert out.shape == shape
            assert x.grad is not None
            assert z.grad is not None
            with pytest.raises(DataDependentOutputException):
                chunk(x, r.boundary_mask, **where)


# --- patching -----------------------------------------------------------------------------------------------------


def functions(module):
    dc, train = module.modules.dc, module.utils.train  # and the loss once more, re-exported
    return [
        *(vars(getattr(dc, c))[f] for c, f in REPLACED),
        train.load_balancing_loss,
        module.utils.load_balancing_loss,
    ]


def test_patch_and_unpatch():
    module, other = standin.build(), standin.build()
    before, untouched = functions(module), functions(other)
    chunk_step = module.modules.dc.ChunkLayer.step
    old = model_of(module)  # made before
    want = old(*(inputs := (rand(12, D, dtype=torch.float64), cu_of([12]))))[0]
    keys, values = list(old.state_dict()), copy.deepcopy(old.state_dict())

    goombalab.patch(module)
    once = functions(module)
    goombalab.patch(module)
    assert all(a is b for a, b in zip(functions(module), once, strict=True)), "a second patch changed something"
    assert not any(a is b for a, b in zip(once, before, strict=True))
    assert functions(other) == untouched
    assert module.modules.dc.ChunkLayer.step is chunk_step
    new = model_of(module)  # made after
    assert list(old.state_dict()) == list(new.state_dict()) == keys
    for model in (old, new):
        assert_close(model(*inputs)[0].detach(), want.detach(), 1e-12)
        assert all(torch.equal(model.state_dict()[k], values[k]) for k in keys)

    goombalab.unpatch(module)
    assert all(a is b for a, b in zip(functions(module), before, strict=True))
    goombalab.unpatch(module)
    assert all(a is b for a, b in zip(functions(module), before, strict=True))
    goombalab.patch(module)
    assert not any(a is b for a, b in zip(functions(module), before, strict=True))


def test_an_imported_package(monkeypatch):
    """Found by import, whatever the attribute `utils` of the package happens to be."""
    standin.install(module := standin.build(), monkeypatch)
    import hnet as package

    assert package is module
    assert not hasattr(module.utils, "train")
    goombalab.patch(package)
    loss = importlib.import_module("hnet.utils.train").load_balancing_loss
    assert loss.__module__ == goombalab.__name__
    assert importlib.import_module("hnet.utils").load_balancing_loss is loss
    goombalab.unpatch(package)
    assert importlib.import_module("hnet.utils.train").load_balancing_loss.__module__ == standin.__name__


def test_the_patched_layers_run_our_ops(ours, monkeypatch):
    """With a backend that cannot run here, every replaced function says so."""
    dc, x = ours.modules.dc, rand(4, D, dtype=torch.float32)
    cu, b = cu_of([4]), torch.tensor([True, False, True, False])
    r = dc.RoutingModule(D)(x, cu)
    state = standin.DeChunkState(torch.zeros(4, D))
    with hk.backend("cuda"):
        for call in (
            lambda: dc.RoutingModule(D)(x, cu),
            lambda: dc.RoutingModule(D).step(
                x[:, None], dc.RoutingModule(D).allocate_inference_cache(4, 0, "cpu", torch.float32)
            ),
            lambda: dc.ChunkLayer()(x, b, cu),
            lambda: dc.DeChunkLayer(D)(x[r.boundary_mask], r.boundary_mask, r.boundary_prob, cu),
            lambda: dc.DeChunkLayer(D).step(x[b][:, None], b, r.boundary_prob, state),
        ):
            with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
                call()
    monkeypatch.setattr(goombalab, "ratio_loss", lambda r, N: "ours")
    assert ours.utils.train.load_balancing_loss(r, 2.0) == "ours"


def test_wrong_modules():
    with pytest.raises(TypeError, match="imported hnet package, got str"):
        goombalab.patch("hnet")
    with pytest.raises(AttributeError, match="published hnet package.*lacks modules.dc.RoutingModule.forward"):
        goombalab.patch(hnet)  # ours
    module = standin.build()
    before = functions(module)
    del module.modules.dc.DeChunkLayer.step, module.utils.train, module.utils.load_balancing_loss
    for function in (goombalab.patch, goombalab.unpatch):
        with pytest.raises(
            AttributeError, match=r"lacks modules.dc.DeChunkLayer.step, utils.train.load_balancing_loss$"
        ):
            function(module)
    assert vars(module.modules.dc.RoutingModule)["forward"] is before[0], "a refused patch changed something"


def test_bad_input(ours):
    dc = ours.modules.dc
    x, mask = padded_of([6, 4])
    routing, chunk, dechunk = dc.RoutingModule(D, dtype=x.dtype), dc.ChunkLayer(), dc.DeChunkLayer(D)
    r = routing(x, mask=mask)
    z = chunk(x, r.boundary_mask, mask=mask)[0]
    state = routing.allocate_inference_cache(2, 0, "cpu", x.dtype)
    smooth = dechunk.allocate_inference_cache(2, 0, "cpu", x.dtype)
    for call in (lambda: routing(x), lambda: chunk(x, r.boundary_mask)):
        with pytest.raises(ValueError, match=r"mask \(padded\) or cu_seqlens \(packed\)"):
            call()
    with pytest.raises(ValueError, match="mask must be given with inference_params"):
        routing(x[0], cu_of([6]), inference_params=state)
    with pytest.raises(ValueError, match="mask must be given with inference_params"):
        dechunk(z, r.boundary_mask, r.boundary_prob, inference_params=smooth)
    routing(x, mask=mask, inference_params=state)
    with pytest.raises(ValueError, match="inference_params must be fresh"):
        routing(x, mask=mask, inference_params=state)
    left = r.boundary_mask.clone()
    left[1, 0], left[1, 1] = False, True
    for call in (lambda: chunk(x, left, mask=mask), lambda: dechunk(z, left, r.boundary_prob, mask=mask)):
        with pytest.raises(ValueError, match="sequence 1 begins without one"):
            call()
    with pytest.raises(ValueError, match="begin every prompt"):
        dechunk(z, left, r.boundary_prob, mask=mask, inference_params=smooth)
    with pytest.raises(ValueError, match="one row for each of the"):
        dechunk(z[:, :1], torch.ones_like(mask), r.boundary_prob, mask=mask)
    with pytest.raises(ValueError, match="at least 1/2"):
        dechunk(x, torch.ones_like(mask), r.boundary_prob, mask=mask)
