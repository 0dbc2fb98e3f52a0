import dataclasses
import math
from pathlib import Path

import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM
from hnet.metrics_log import read_metrics
from hnet.train.compression import Compression, auto_ratio_weight
from hnet.train.loop import Trainer
from hnet.train.losses import losses


def make(config, **change):
    c = dataclasses.replace(config, **change).validate()
    model = HNetForCausalLM(c.model())
    return Compression(c, model), model


def test_alpha_by_size():
    assert auto_ratio_weight(1_000_000) == 1
    assert auto_ratio_weight(10_000_000) == 1
    assert auto_ratio_weight(1_000_000_000) == pytest.approx(0.2, abs=0.01)


def test_alpha_warms_up(config):
    c, _ = make(config, ratio_weight=2.0, ratio_warmup=4)
    assert [(c.prepare(s), c.weights().item())[1] for s in (0, 1, 3, 100)] == [0.5, 1.0, 2.0, 2.0]


def test_targets_anneal_by_steps_and_by_plateau(config):
    c, _ = make(config, compression=[5.0], compression_start=[1, 2.0], compression_anneal_steps=10)
    assert [c.targets(s)[0] for s in (0, 5, 10, 99)] == [2, 3.5, 5, 5]
    c, _ = make(
        config, compression=[6.0], compression_start=[2.0], compression_anneal="plateau", compression_notches=2,
        plateau_patience=2, plateau_cooldown=0,
    )  # fmt: skip
    assert not any(c.observe(2 * 0.99**i) for i in range(20))
    moved = [c.observe(2.0) for _ in range(20)]
    assert [i for i, m in enumerate(moved) if m] == [2, 6]  # patience + 1, then one more: the new target's first
    assert c.targets(0) == [6]


def test_bias_moves_against_the_error_and_freezes(config):
    c, model = make(config, rate_control="bias", compression=[4.0], steps=100, rate_gain=0.1)
    stage = next(model.stages())
    c.after_step(0, torch.tensor([0.5]))  # twice the rate: an error of 100 %
    assert stage.logit_bias.item() == pytest.approx(-0.1)
    c.after_step(1, torch.tensor([0.125]))
    assert stage.logit_bias.item() == pytest.approx(-0.05)
    c.after_step(2, torch.tensor([torch.nan]))
    c.after_step(90, torch.tensor([1.0]))  # the last tenth
    assert stage.logit_bias.item() == pytest.approx(-0.05)


def test_what_is_taught_moves_against_the_error_and_freezes(config):
    """As a power of e, from where the teacher acts in full, by at most 2; numbers, not tensors, where nothing moves."""
    terms = {"surprisal_weight": [0.1], "surprisal_warmup": 0.1, "surprisal_gain": 0.1}
    c, _ = make(config, rate_control="bias", compression=[4.0], steps=100, **terms)
    share = [c.shares(0)[0].item()]
    for step, F in ((9, 0.5), (10, 0.375), (11, 0.125), (12, torch.nan), (90, 1.0)):
        c.after_step(step, torch.tensor([F]))
        share.append(c.shares(step)[0].item() * 4)
    assert share == pytest.approx([0.25, 1, math.exp(-0.05), 1, 1, 1])
    for F, limit in ((0.9, 0.5), (0.0, 2.0)):
        for step in range(10, 50):
            c.after_step(step, torch.tensor([F]))
        assert c.shares(50)[0].item() * 4 == pytest.approx(limit)
    for change in ({"rate_control": "none"}, {"surprisal_gain": 0.0}, {"surprisal_weight": [0.0]}):
        c, _ = make(config, **{"rate_control": "bias", "compression": [4.0], "steps": 100, **terms, **change})
        c.after_step(20, torch.tensor([0.5]))
        assert c.shares(21) == [0.25]
        assert c.taught.item() == 0
    with pytest.raises(ValueError, match="surprisal_gain must be at least 0, got -0.1"):
        make(config, surprisal_gain=-0.1)


@pytest.mark.parametrize(("F", "limit"), [(0.9, -8.0), (0.001, 8.0)])
def test_the_bias_has_a_limit_and_says_so_once(config, F, limit):
    c, model = make(config, rate_control="bias", compression=[4.0], steps=10_000, rate_gain=0.5)
    stage, events = next(model.stages()), []
    for step in range(60):
        row = {"stage0/F": F, "stage0/target": 4.0, "stage0/logit_bias": stage.logit_bias.item()}
        events += c.at_limits(row)
        c.after_step(step, torch.tensor([F]))
    assert stage.logit_bias.item() == limit
    (event,) = events
    assert event.name == "rate_at_limit"
    assert f"limit, {limit:+g}, and {1 / F:.2f} positions a chunk where 4 are asked for" in event.message
    assert ("raise" if limit > 0 else "lower") + " compression" in event.message
    c.after_step(60, torch.tensor([0.25 if F > 0.25 else 0.5]))  # now the target is met, or passed
    assert c.at_limits({"stage0/F": 0.25, "stage0/target": 4.0, "stage0/logit_bias": limit}) == []


def test_alpha_grows_while_the_target_is_missed(config):
    c, _ = make(config, rate_control="alpha", compression=[4.0], ratio_weight=1.0, rate_gain=0.1, steps=100)
    c.after_step(0, torch.tensor([0.375]))  # 50 % off
    assert c.weights().item() == pytest.approx(1 + 0.1 * 0.48)
    for s in range(1, 40):
        c.after_step(s, torch.tensor([0.25]))
    assert c.weights().item() == 1  # never below its start


@pytest.mark.slow
def test_the_controller_reaches_a_target_that_the_ratio_loss_alone_misses(config):
    """Real text, too weak an alpha, 120 steps: the mean of the last 30 steps."""
    base = dataclasses.replace(
        config, steps=120, batch_bytes=2048, compression=[6.0], ratio_weight=0.03, eval_every=120, checkpoint_every=120,
        schedule="constant", learning_rate=3e-3, rate_gain=0.05,
    )  # fmt: skip
    realised = {}
    for control in ("none", "bias"):
        c = dataclasses.replace(base, rate_control=control, out=f"{config.out}_{control}")
        Trainer(c).train()
        rows = [r for r in read_metrics(Path(c.out) / "metrics.jsonl") if "stage0/F" in r][-30:]
        realised[control] = len(rows) / sum(r["stage0/F"] for r in rows)
    assert abs(realised["bias"] / 6 - 1) < 0.1
    assert abs(realised["none"] / 6 - 1) > 0.2
    saved = HNetForCausalLM.from_pretrained(Path(f"{config.out}_bias") / "checkpoints" / "step_00000120")
    assert saved.config.routing_cfg.logit_bias[0] < -0.1


def test_losses_add_up():
    torch.manual_seed(0)
    model = HNetForCausalLM(HNetConfig.preset("tiny"))
    ids = torch.randint(0, 250, (65,))
    out = model(ids[:-1], cu_seqlens=torch.tensor([0, 40, 64], dtype=torch.int32))
    weights = torch.tensor([0.7])
    got = losses(out.logits, ids[1:], out.routing, [3.0], weights)
    F, G = got.stages[0].F.double(), got.stages[0].G.double()
    ratio = 1.5 * (2 * F * G + (1 - F) * (1 - G))
    ce = -out.logits.double().log_softmax(-1)[torch.arange(64), ids[1:]].mean()
    torch.testing.assert_close(got.ce.double(), ce, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.loss.double(), ce + 0.7 * ratio, rtol=1e-6, atol=0)
    assert got.stages[0].sequences == 2
    smooth = losses(out.logits, ids[1:], out.routing, [3.0], weights, label_smoothing=0.1)
    uniform = -out.logits.double().log_softmax(-1).mean(-1).mean()
    torch.testing.assert_close(smooth.loss.double(), 0.9 * ce + 0.1 * uniform + 0.7 * ratio, rtol=1e-6, atol=0)
    assert smooth.ce == got.ce
