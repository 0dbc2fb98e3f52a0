import pytest

from hnet import HNetConfig, HNetForCausalLM
from hnet.model.parameters import stage_of, stage_parameters
from hnet.train.config import TrainConfig
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
