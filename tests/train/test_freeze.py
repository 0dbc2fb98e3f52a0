"""Parameters that a run leaves as they are."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM
from hnet.errors import UserError
from hnet.train.checkpoint import latest_checkpoint, load_trainer, load_weights
from hnet.train.freeze import freeze
from hnet.train.loop import Trainer


@pytest.mark.parametrize(
    ("patterns", "prefixes"),
    [
        (["encoder"], ["backbone.encoder.", "backbone.main_network.encoder."]),
        (["stage0.encoder", "stage1.router"], ["backbone.encoder.", "backbone.main_network.routing_module."]),
        (["inner", "embeddings"], ["backbone.main_network.main_network.main_network.", "embeddings."]),
        (["stage2"], ["backbone.main_network.main_network."]),
        (["*.router", "pad"], [
            "backbone.routing_module.", "backbone.main_network.routing_module.", "backbone.main_network.pad_dimension",
            "backbone.main_network.main_network.pad_dimension",
        ]),
        (["backbone.encoder.layers.0", "*.rmsnorm.weight"], [
            "backbone.encoder.layers.0.", "backbone.encoder.rmsnorm", "backbone.decoder.rmsnorm",
            "backbone.main_network.encoder.rmsnorm", "backbone.main_network.decoder.rmsnorm",
            "backbone.main_network.main_network.main_network.rmsnorm",
        ]),
    ],
)  # fmt: skip
def test_names(patterns, prefixes):
    with torch.device("meta"):
        model = HNetForCausalLM(HNetConfig.preset("small_2stage"), device="meta")
    count = freeze(model, patterns)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(tuple(prefixes))} != set()
    assert count == sum(p.numel() for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_bits_stay(config, optimizer):
    """No gradient, no moments, no decay; the rest moves. Also the table that is updated row by row."""
    config.freeze, config.optimizer = ["stage0.encoder", "router", "ngrams"], optimizer
    config.ngrams, config.ngram_rows, config.weight_ema, config.weight_decay = [2], 30, 0.9, 0.5
    trainer = Trainer(config)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    still = {n for n in before if n.startswith(("backbone.encoder.", "ngrams.")) or "routing_module" in n}
    assert len(still) > 4
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert {n for n, p in after.items() if torch.equal(p, before[n])} == still
    assert all(after[n].grad is None for n in still)
    assert all(torch.equal(trainer.ema.named()[n], before[n]) for n in still)
    trained = {p for part in trainer.optimizers.parts for g in part.param_groups for p in g["params"]}
    stateful = {p for part in trainer.optimizers.parts for p in part.state}
    assert stateful == trained == {p for n, p in after.items() if n not in still}
    checkpoint = latest_checkpoint(Path(config.out) / "checkpoints")
    saved = load_trainer(checkpoint)["optimizers"]
    assert sum(len(s["state"]) for s in saved) == len(after) - len(still)
    weights = load_weights(checkpoint)
    assert all(torch.equal(weights[n], before[n]) for n in still)


def test_chunks_stay(config):
    """Where all that decides on them is frozen."""
    config.freeze, config.learning_rate = ["embeddings", "encoder", "router"], 0.05
    trainer = Trainer(config)
    ids = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(1))
    before = trainer.model(ids)
    trainer.train()
    after = trainer.model(ids)
    assert torch.equal(after.routing[0].boundary_prob, before.routing[0].boundary_prob)
    assert not torch.allclose(after.logits, before.logits)


def test_all_but_the_router(config):
    """The gradient goes through what is frozen; Muon has nothing to do."""
    config.freeze = ["embeddings", "lm_head", "encoder", "decoder", "residual", "inner", "pad"]
    config.optimizer = "muon"
    trainer = Trainer(config)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train_step()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("routing_module" in n for n in moved)


def test_muon_alone(config):
    """Where all that AdamW would train is frozen."""
    config.optimizer = "muon"
    model = HNetForCausalLM(config.model())
    others = [n for n, p in model.named_parameters() if p.dim() != 2 or "in_proj" in n]
    config.freeze = ["embeddings", "lm_head", "residual", "router", *others]
    trainer = Trainer(config)
    assert trainer.train_step()["grad_norm"] > 0
    adam, muon = trainer.optimizers.parts
    assert not adam.state
    assert muon.state


def test_gradients_are_those_of_the_whole(config):
    """What is trained gets the gradient that it gets without `freeze`."""
    grads = []
    for patterns in ([], ["embeddings", "encoder"]):
        trainer = Trainer(dataclasses.replace(config, freeze=patterns))
        batch = next(trainer.task.stream)
        trainer.task.prepare(0)
        loss, _ = trainer.task.loss(trainer.model, batch, 0)
        loss.backward()
        grads.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    whole, some = grads
    assert set(whole) - set(some) == {n for n in whole if n.startswith(("embeddings.", "backbone.encoder."))}
    for name, g in some.items():
        torch.testing.assert_close(g, whole[name], rtol=1e-5, atol=1e-7)


def test_mistakes(config):
    config.freeze = ["encoder", "stage7.router"]
    with pytest.raises(UserError, match=r"freeze .* 'stage7.router'; known are embeddings, .*stage0.router"):
        Trainer(config)
    config.freeze = ["backbone", "lm_head", "embeddings"]
    with pytest.raises(UserError, match="freeze must leave something to train"):
        Trainer(config)
    assert not Path(config.out).exists()


def test_resume_with_another_freeze(config):
    config.freeze, config.steps = ["router"], 4
    Trainer(config).train()
    with pytest.raises(UserError, match="freeze must be those of the run that goes on"):
        Trainer(dataclasses.replace(config, freeze=[], steps=8), resume=True)


def test_plots_and_metrics(config):
    config.freeze, config.plots, config.steps = ["stage1"], True, 4
    Trainer(config).train()
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert any("stage0/lr" in r for r in rows)
    assert not any("stage1/lr" in r for r in rows)
    assert all(r["stage1/grad_norm"] == 0 for r in rows if "stage1/grad_norm" in r)
    assert list((Path(config.out) / "plots").glob("*.png"))
