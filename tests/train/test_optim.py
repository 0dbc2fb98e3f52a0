import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from hnet import HNetConfig, HNetForCausalLM
from hnet.chunk_lm import ChunkLM, ChunkLMConfig
from hnet.model.parameters import stage_of, stage_parameters
from hnet.train.clipping import AT_LEAST, Clipper
from hnet.train.config import TrainConfig
from hnet.train.muon import Muon, orthogonalize
from hnet.train.optim import Optimizers, decays, muon_parameters


@pytest.fixture(scope="module")
def model():
    return HNetForCausalLM(HNetConfig.preset("small_2stage"))


def test_stage_of_every_parameter(model):
    for name, p in model.named_parameters():
        widths = {0: 256, 1: 320, 2: 448}
        if name.endswith(("norm1.weight", "rmsnorm.weight")):
            assert p.shape[0] == widths[stage_of(name)], name
    assert stage_of("embeddings.weight") == stage_of("lm_head.weight") == 0
    assert stage_of("backbone.main_network.pad_dimension") == 1
    assert stage_of("backbone.main_network.main_network.pad_dimension") == 2
    assert stage_of("backbone.main_network.routing_module.q_proj_layer.weight") == 1
    assert stage_of("backbone.main_network.main_network.main_network.layers.0.norm1.weight") == 2
    assert sum(len(s) for s in stage_parameters(model)) == len(list(model.parameters()))


def test_stages_agree_with_the_module_tree(model):
    """The name rule against the recursion itself."""
    owner = {}
    for depth, stage in enumerate(model.stages()):
        for p in stage.parameters():
            owner[id(p)] = depth  # the deepest stage that holds it wins
    for name, p in model.named_parameters():
        assert stage_of(name) == owner.get(id(p), 0), name


def test_decay_and_muon_choices(model):
    p = dict(model.named_parameters())
    decayed = {n for n in p if decays(n, p[n])}
    assert "backbone.encoder.layers.0.mixer.in_proj.weight" in decayed
    for n in p:
        if any(w in n for w in ("norm", "bias", "A_log", ".D", "embeddings", "conv1d", "pad_dimension")):
            assert n not in decayed, n
    chosen = {n for n in p if id(p[n]) in muon_parameters(model)}
    assert "backbone.encoder.layers.0.mixer.out_proj.weight" in chosen
    assert "backbone.main_network.encoder.layers.0.mixer.Wqkv.weight" in chosen
    assert not any("in_proj" in n or "routing" in n or "lm_head" in n or "embed" in n for n in chosen)
    conv = HNetForCausalLM(HNetConfig.preset("laptop"))
    names = {n for n, q in conv.named_parameters() if id(q) in muon_parameters(conv)}
    assert "backbone.encoder.layers.0.mixer.in_proj.weight" in names  # a convolution's, not Mamba's


def test_routing_projections_have_their_own_rate(model):
    o = Optimizers(model, TrainConfig(learning_rate=1e-2), [4.0, 2.0, 1.0], router_lr=0.1)
    rates = {id(p): g["lr"] for part in o.parts for g in part.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        wanted = 1e-2 * [4, 2, 1][stage_of(name)] * (0.1 if "routing_module" in name else 1)
        assert rates[id(p)] == pytest.approx(wanted), name
    assert o.set_lr(0.5) == pytest.approx({0: 2e-2, 1: 1e-2, 2: 5e-3})


def test_every_parameter_is_in_exactly_one_group(model):
    for optimizer in ("adamw", "muon"):
        o = Optimizers(model, TrainConfig(optimizer=optimizer), [1.0] * 3)
        ids = [id(p) for part in o.parts for g in part.param_groups for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_spectral_state_parameters_do_not_decay():
    model = ChunkLM(ChunkLMConfig(d_model=16, n_layers=1, seq_len=16, kernel_len=4, chunk=4, spectral_state=True))
    p = dict(model.named_parameters())
    assert p["state.decay"].dim() == p["state.angle"].dim() == 2  # numbers of bins and channels, not matrices
    decayed = {n for n in p if decays(n, p[n])}
    assert not {"state.decay", "state.angle"} & decayed
    assert {"state.project.weight", "head.weight", "blocks.0.fc1.weight"} <= decayed


def state_of(model, optimizers):
    moments = {
        (i, n, k): v.clone()
        for i, part in enumerate(optimizers.parts)
        for n, (_, values) in enumerate(part.state.items())
        for k, v in values.items()
    }
    return [p.detach().clone() for p in model.parameters()], moments


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_step_that_is_not_finite_changes_nothing_without_looking(first):
    """The path of a GPU, on a CPU: weights and moments of both optimisers, with and without moments to go stale."""
    torch.manual_seed(0)
    small = HNetForCausalLM(HNetConfig.preset("tiny"))
    config = TrainConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.5)
    o = Optimizers(small, config, [1.0] * 2)
    finite = torch.tensor(True)

    def gradients(value=None):
        for p in small.parameters():
            p.grad = torch.randn_like(p) if value is None else torch.full_like(p, value)

    if not first:
        gradients()
        o.step_without_waiting(finite)
    weights, moments = state_of(small, o)
    for bad in (torch.nan, torch.inf):
        gradients(bad)
        o.step_without_waiting(~finite)
        now, stale = state_of(small, o)
        assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))
        assert all(torch.equal(v, moments.get(k, torch.zeros_like(v))) for k, v in stale.items())


def test_stepping_without_looking_is_the_same_step():
    """Five steps, the third not finite, against the optimisers that are simply not called there."""
    models = []
    for blind in (True, False):
        torch.manual_seed(0)
        small = HNetForCausalLM(HNetConfig.preset("tiny"))
        o = Optimizers(small, TrainConfig(optimizer="muon", learning_rate=1e-2), [1.0] * 2)
        for i in range(5):
            for p in small.parameters():
                p.grad = torch.randn_like(p) * (torch.nan if i == 2 else 1)
            finite = torch.tensor(i != 2)
            (o.step_without_waiting if blind else o.step)(finite)
        models.append(list(small.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*models, strict=True))


@pytest.mark.parametrize("rate", ["number", "memory"])
def test_muon_is_pytorchs(rate):
    """Ten steps of both on the same gradients, with decay and rates that change; torch.optim.Muon rounds elsewhere."""
    torch.manual_seed(0)
    start, results = [torch.randn(6, 10), torch.randn(12, 4)], []
    for cls in (torch.optim.Muon, Muon):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        own = rate == "memory" and cls is Muon
        lr = torch.zeros((), dtype=torch.float64) if own else 0.0
        o = cls(params, lr=lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        grads = torch.Generator().manual_seed(1)
        for i in range(10):
            if own:
                lr.fill_(0.02 / (i + 1))
            else:
                o.param_groups[0]["lr"] = 0.02 / (i + 1)
            for p in params:
                p.grad = torch.randn(p.shape, generator=grads)
            o.step()
        results.append([*(p.detach() for p in params), *(o.state[p]["momentum_buffer"] for p in params)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_in_memory_are_the_same_rates(optimizer):
    """On a CPU to the bit; and a checkpoint of one is a checkpoint of the other, the rates in it numbers."""
    found = []
    for in_memory in (False, True):
        torch.manual_seed(0)
        small = HNetForCausalLM(HNetConfig.preset("tiny"))
        o = Optimizers(small, TrainConfig(optimizer=optimizer), [1.0, 2.0])
        if in_memory:
            o.keep_rates_on(torch.device("cpu"))
            rates = [g["lr"] for part in o.parts for g in part.param_groups]
        for i in range(4):
            assert o.set_lr(0.5**i) == pytest.approx({0: 1e-3 * 0.5**i, 1: 2e-3 * 0.5**i})
            for p in small.parameters():
                p.grad = torch.randn_like(p)
            o.step(torch.tensor(True))
            o.load_state_dict(o.state_dict())
        if in_memory:  # still the memory that a graph would know
            assert all(g["lr"] is r for g, r in zip(o._groups(), rates, strict=True))
        found.append((list(small.parameters()), o.state_dict()))
    (a, first), (b, second) = found
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for x, y in zip(first, second, strict=True):
        assert [g["lr"] for g in x["param_groups"]] == [g["lr"] for g in y["param_groups"]]
        assert all(isinstance(g["lr"], float) for g in y["param_groups"])
        for m, n in zip(x["state"].values(), y["state"].values(), strict=True):
            assert all(torch.equal(m[k], n[k]) for k in m)


def test_adaptive_clipping_begins_after_enough_norms():
    """Against the percentile of the norms themselves; those that are not finite are left out."""
    p = torch.nn.Parameter(torch.zeros(3))
    clipper = Clipper(TrainConfig(clipping="adaptive", max_grad_norm=1.0, clip_window=30), [[p]], torch.device("cpu"))
    seen = []
    for i in range(50):
        norm = torch.inf if i == 5 else 2.0 + i % 7
        p.grad = torch.tensor([norm, 0.0, 0.0])
        limit = 1.0 if i < AT_LEAST else torch.tensor(seen[-30:]).nanquantile(0.9).item()
        assert clipper.clip().item() == norm
        if i != 5:
            assert p.grad[0].item() == pytest.approx(min(limit, norm), rel=1e-5)
        seen.append(torch.nan if i == 5 else norm)
    again = Clipper(clipper.config, [[p]], torch.device("cpu"))
    again.load_state_dict(clipper.state_dict())
    assert again.count == 50
    assert torch.equal(again.history.nan_to_num(-1), clipper.history.nan_to_num(-1))


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (128, 300)])
def test_matrices_that_are_orthogonalised_together_are_as_alone(shape):
    """To the bit, as fsdp takes them one by one; and as torch does it."""
    like = dict(coefficients=(3.4445, -4.775, 2.0315), steps=5, eps=1e-7)
    matrices = [torch.randn(shape if i % 2 else shape[::-1]).bfloat16() * 10**i for i in range(-2, 4)]
    for x, got in zip(matrices, orthogonalize(matrices, **like), strict=True):
        assert got.shape == x.shape
        assert torch.equal(got, orthogonalize([x], **like)[0])
        torch.testing.assert_close(got, _zeropower_via_newtonschulz(x, *like.values()), rtol=0, atol=0.02)
