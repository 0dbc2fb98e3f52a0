"""The model of a checkpoint: numbers by another way, and models broken on purpose."""

import math

import numpy as np
import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM
from hnet.data.corpus import Corpus
from hnet.data.packing import eval_batches
from hnet.diagnose import weights as w


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HNetForCausalLM(HNetConfig.preset("tiny")).eval()


@pytest.fixture(scope="module")
def batch():
    text = np.random.default_rng(0).choice(list(b"the cat sat on a mat. "), 900).astype(np.uint8).tobytes()
    return next(iter(eval_batches(Corpus.of([text]), 128, 512, 512)))


def router(model):
    return next(model.stages()).routing_module


def move(model):
    """As training would."""
    for p in (router(model).q_proj_layer.weight, router(model).k_proj_layer.weight):
        p.data += 0.05 * torch.randn_like(p)


def names(found):
    return {f.name for f in found}


def test_rank_and_drift():
    assert w.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert w.effective_rank(torch.zeros(5, 5)) == 0
    assert w.effective_rank(torch.ones(5, 1) @ torch.ones(1, 6)) == pytest.approx(1, abs=1e-6)
    s = np.array([4.0, 2.0, 1.0])
    p = s / s.sum()
    assert w.effective_rank(torch.diag(torch.tensor(s))) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert w.drift(torch.eye(6)) == 0
    assert w.drift(torch.zeros(6, 6)) == pytest.approx(1)


def test_description(model):
    d = w.describe(model)
    assert sum(d["parameters_by_stage"]) == sum(p.numel() for p in model.parameters())
    assert d["d_model"] == [64, 96]
    assert d["layers"] == [4, 2]
    assert d["windows"] == [None, -1]  # no attention outside
    assert d["routers"][0]["drift_q"] == 0
    assert d["routers"][0]["rank_k"] == pytest.approx(64)
    assert d["scales"]["stage1"]["largest"] == pytest.approx(0.02, rel=0.1)
    assert d["scales"]["stage1"]["least"] < 0.015  # ends of residual branches


def test_broken_weights(model):
    assert names(w.weights(model, 0)) == set()
    next(model.stages()).residual_proj.weight.data.normal_(0, 0.01)
    for p in (p for p in model.parameters() if p.dim() == 1):
        p.data += 1e-3
    assert names(w.weights(model, 100)) == set()
    model.lm_head.weight.data.zero_()
    assert names(w.weights(model, 100)) == {"weights_untrained"}
    model.lm_head.weight.data.fill_(5.0)
    assert names(w.weights(model, 100)) == {"weights_grown"}
    model.lm_head.weight.data[3, 3] = math.nan
    assert names(w.weights(model, 100)) == {"weights_broken"}


def test_routers(model, batch):
    def found(step=100):
        return names(w.routers(model, batch, [4.0], step)[0])

    assert found(step=0) == set()
    assert found() == {"router_frozen"}
    move(model)
    assert found() == set()
    _, (numbers,) = w.routers(model, batch, [4.0], 100)
    r = model(batch.input_ids, cu_seqlens=batch.cu_seqlens).routing[0]
    assert numbers["F"] == pytest.approx(int(r.num_chunks) / len(batch.input_ids), abs=1e-6)
    assert numbers["p_on"] == pytest.approx(r.boundary_prob[r.boundary_mask].mean().item(), abs=1e-5)
    router(model).q_proj_layer.weight.data.zero_()
    assert found() == {"router_dead"}


def test_a_saturated_router(model, batch):
    move(model)
    next(model.stages()).logit_bias = torch.tensor(-14.0)
    assert names(w.routers(model, batch, [4.0], 100)[0]) & {"router_dead", "router_saturated"}


def test_a_stage_that_no_update_has_moved(model):
    assert names(w.weights(model, 0)) == set()
    for name, p in model.named_parameters():
        if p.dim() == 1 and w.stage_of(name) == 0:
            p.data += 1e-3
    next(model.stages()).residual_proj.weight.data.normal_(0, 0.01)
    (f,) = w.weights(model, 50)
    assert (f.name, f.severity, f.stage) == ("weights_untrained", "critical", 1)
    assert w.weights(model, 50, frozen=True) == []
