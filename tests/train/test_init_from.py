"""Runs that start from weights that are there."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hnet import HNetConfig, HNetForCausalLM
from hnet.chunk_lm import ChunkLM
from hnet.chunk_lm.config import ChunkLMConfig
from hnet.config import NgramConfig
from hnet.diagnose.architecture import model_of
from hnet.diagnose.runs import read_log
from hnet.errors import UserError
from hnet.metrics_log import read_metrics
from hnet.model.checkpoint_format import read_weights
from hnet.train.checkpoint import EMA, latest_checkpoint, load_weights
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

from . import test_resume
from .processes import found, job, run
from .test_resume import equal, run_with_a_crash


def model(folder: Path, **changes) -> HNetForCausalLM:
    """A model whose every weight differs from a fresh one's, and its folder."""
    torch.manual_seed(99)
    lm = HNetForCausalLM(dataclasses.replace(HNetConfig.preset("tiny"), **changes))
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.01 * torch.randn_like(p))
    lm.save_pretrained(folder)
    return lm


def starts_with(config, expected: dict) -> Trainer:
    """The trainer, whose model has these weights before its first step."""
    trainer = Trainer(config)
    state = trainer.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in state.items())
    return trainer


@pytest.fixture
def tuned(config, tmp_path):
    """A run that has no architecture but that of what it starts from."""
    return dataclasses.replace(config, preset="", init_from=str(tmp_path / "base"))


def test_from_a_model_directory(tuned, tmp_path):
    lm = model(tmp_path / "base")
    trainer = starts_with(tuned, lm.state_dict())
    assert trainer.model.config == lm.config
    assert trainer.step == 0
    assert not any(part.state for part in trainer.optimizers.parts)
    trainer.train()
    rows = read_metrics(Path(tuned.out) / "metrics.jsonl")
    (event,) = [r for r in rows if r.get("event") == "init_from"]
    assert event["step"] == 0
    assert str(tmp_path / "base" / "model.safetensors") in event["message"]
    assert model_of(read_log(tuned.out)) == lm.config  # what `hnet diagnose` takes it for
    steps = [r["step"] for r in rows if "loss" in r]
    assert steps == list(range(1, 9))
    assert next(r["lr"] for r in rows if r["step"] == 1 and "lr" in r) == tuned.learning_rate / 2  # of two to warm up


@pytest.mark.parametrize("place", ["run", "checkpoint", "run with an average", "its last weights"])
def test_from_a_run(config, tuned, tmp_path, place):
    config.weight_ema = 0.9 if "average" in place or "last" in place else 0.0
    config.out, config.steps, config.checkpoint_every = str(tmp_path / "base"), 4, 2
    Trainer(config).train()
    last = latest_checkpoint(tmp_path / "base" / "checkpoints")
    expected = load_weights(last)
    if place == "run with an average":
        expected |= (average := read_weights(last / EMA))
        assert average.keys() == expected.keys()
    elif place != "run":
        tuned.init_from = str(last / "model.safetensors" if "last" in place else last)
    trainer = starts_with(tuned, expected)
    assert ("average" in trainer.beginning[0].message) == (place == "run with an average")


def test_from_a_published_file(tuned, tmp_path):
    lm = model(tmp_path / "elsewhere")
    torch.save({k: v.bfloat16() for k, v in lm.state_dict().items()}, tmp_path / "published.pt")
    tuned.init_from = str(tmp_path / "published.pt")
    with pytest.raises(FileNotFoundError, match=r"init_from: nothing says the architecture of .*published\.pt"):
        Trainer(tuned)
    rounded = {k: v.bfloat16().float() for k, v in lm.state_dict().items()}
    starts_with(dataclasses.replace(tuned, preset="tiny"), rounded)  # the shapes are compared all the same
    lm.config.to_json(tmp_path / "published.json")
    starts_with(tuned, rounded)


def test_from_a_folder_of_transformers(tuned, tmp_path):
    """Its own keys in config.json, and several files with an index."""
    lm = model(tmp_path / "base")
    whole = tmp_path / "base" / "model.safetensors"
    state = read_weights(whole)
    whole.unlink()
    names = sorted(state)
    for i, some in enumerate((names[:5], names[5:])):
        save_file({k: state[k] for k in some}, str(tmp_path / "base" / f"part{i}.safetensors"))
    index = {"weight_map": {k: f"part{int(i >= 5)}.safetensors" for i, k in enumerate(names)}}
    whole.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    about = lm.config.to_dict() | {"model_type": "hnet"}
    whole.with_name("config.json").write_text(json.dumps(about))
    starts_with(tuned, lm.state_dict())


def test_the_average_begins_at_the_start(tuned, tmp_path):
    expected = model(tmp_path / "base").state_dict()
    trainer = Trainer(dataclasses.replace(tuned, weight_ema=0.99))
    assert trainer.ema.updates == 0
    assert all(torch.equal(v, expected[k]) for k, v in trainer.ema.named().items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact_and_needs_the_start_no_more(tuned, tmp_path, optimizer, monkeypatch):
    ngrams = NgramConfig([2, 3], 50)
    model(tmp_path / "base", ngram_cfg=ngrams)
    tuned.rate_control, tuned.weight_ema, tuned.optimizer = "bias", 0.9, optimizer
    tuned.freeze = ["encoder", "router"]
    whole = dataclasses.replace(tuned, out=str(tmp_path / "whole"))
    Trainer(whole).train()
    torch.manual_seed(5)
    moved = tmp_path / "moved"

    class Moving(Trainer):
        def train(self):
            if self.step == 0:
                (tmp_path / "base").rename(moved)
            return super().train()

    monkeypatch.setattr(test_resume, "Trainer", Moving)
    assert run_with_a_crash(tuned, at=6) == 4
    assert moved.is_dir()
    a, b = (latest_checkpoint(Path(c.out) / "checkpoints") for c in (whole, tuned))
    equal(load_weights(a), load_weights(b))
    equal(read_weights(a / EMA), read_weights(b / EMA))
    events = [r["event"] for r in read_metrics(Path(tuned.out) / "metrics.jsonl") if "event" in r]
    assert events.count("init_from") == 1


def test_ngrams_boundaries_and_biases_stay(tuned, tmp_path):
    """Unless the run has other boundaries."""
    base = HNetConfig.preset("tiny")
    routing = dataclasses.replace(base.routing_cfg, boundaries="char-end", logit_bias=[0.75])
    lm = model(tmp_path / "base", ngram_cfg=NgramConfig([2, 4], 30), routing_cfg=routing)
    for preset in ("", "tiny"):
        trainer = starts_with(dataclasses.replace(tuned, preset=preset), lm.state_dict())
        assert trainer.model.backbone.boundaries == "char-end"
        assert trainer.model.backbone.logit_bias.item() == 0.75
        assert trainer.model.ngrams.longest == 4
    changed = Trainer(dataclasses.replace(tuned, boundaries="char-start"))
    assert changed.model.backbone.boundaries == "char-start"
    assert changed.model.backbone.logit_bias.item() == 0.75


def test_ngrams_may_be_added(tuned, tmp_path):
    lm = model(tmp_path / "base")
    trainer = Trainer(dataclasses.replace(tuned, ngrams=[2, 3], ngram_rows=40))
    assert trainer.model.ngrams.weight.shape[0] == 80
    assert "new" in trainer.beginning[0].message
    ids = torch.arange(60)[None]
    assert torch.equal(trainer.model.eval()(ids).logits, lm.eval()(ids).logits)


@pytest.mark.parametrize(
    ("keys", "changes", "names"),
    [
        ({"preset": "laptop"}, {}, ("arch_layout", "laptop", "tiny")),
        ({"model_config": "vocab"}, {}, ("vocab_size", "300", "256")),
        ({"model_config": "width"}, {}, ("d_intermediate", "", "")),
        ({"ngrams": [2]}, {"ngram_cfg": NgramConfig([2, 3], 40)}, ("ngrams", "[2]", "[2, 3]")),
        ({"arch": "T1 T2", "d_model": [64, 64]}, {}, ("arch_layout", "T1", "")),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tuned, tmp_path, keys, changes, names):
    base = model(tmp_path / "base", **changes).config
    if "model_config" in keys:
        other = {"vocab": {"vocab_size": 300}, "width": {"d_intermediate": [x + 128 for x in base.d_intermediate]}}
        dataclasses.replace(base, **other[keys["model_config"]]).to_json(tmp_path / "other.json")
        keys = {"model_config": str(tmp_path / "other.json")}
    config = dataclasses.replace(tuned, **keys)
    with pytest.raises(UserError) as e:
        Trainer(config)
    key, given, there = names
    layouts = {"laptop": str(HNetConfig.preset("laptop").arch_layout), "tiny": str(base.arch_layout)}
    message = str(e.value)
    assert message.startswith(f"{key} must be that of init_from")
    assert tuned.init_from in message
    assert layouts.get(given, given) in message
    assert layouts.get(there, there) in message
    assert not Path(config.out).exists()


def test_attention_windows_may_change(tuned, tmp_path):
    base = model(tmp_path / "base").config
    windows = [7 if w != -1 else w for w in base.attn_cfg.window_size]
    attn = dataclasses.replace(base.attn_cfg, window_size=windows)
    dataclasses.replace(base, attn_cfg=attn).to_json(tmp_path / "wider.json")
    trainer = Trainer(dataclasses.replace(tuned, model_config=str(tmp_path / "wider.json")))
    assert trainer.model.config.attn_cfg.window_size == windows


def test_mistakes(tuned, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"init_from: .*base does not exist"):
        Trainer(tuned)
    ChunkLM(ChunkLMConfig(d_model=32, n_layers=1, seq_len=64, kernel_len=16)).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="init_from must be an H-Net's weights, got a ChunkLM's"):
        Trainer(tuned)
    (tmp_path / "base" / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="init_from: no checkpoint in"):
        Trainer(tuned)


@pytest.mark.slow
def test_two_processes_start_from_it_too(tuned, tmp_path):
    """ddp and fsdp: after a step at a small rate everything is near the weights, and what is frozen has their bits."""
    lm = model(tmp_path / "base", ngram_cfg=NgramConfig([2], 40))
    tuned.freeze, tuned.weight_ema, tuned.learning_rate = ["encoder", "decoder", "embeddings"], 0.9, 1e-4
    both = ("ddp", "fsdp")
    jobs = [job(p, dataclasses.replace(tuned, parallel=p, out=str(tmp_path / p)), "step") for p in both]
    assert run(tmp_path, jobs) == [0, 0]
    start = dict(lm.named_parameters())
    still = {k for k in start if k.startswith(("embeddings", "backbone.encoder", "backbone.decoder"))}
    for p in both:
        for rank in (0, 1):
            state = found(tmp_path, p, rank)["state"]
            for k, v in start.items():
                for kind in ("weight", "ema"):
                    torch.testing.assert_close(state[f"{kind}/{k}"], v, rtol=0, atol=2e-4)
                    assert k not in still or torch.equal(state[f"{kind}/{k}"], v)
            assert {k for k, v in start.items() if torch.equal(state[f"weight/{k}"], v)} == still
            assert {k.partition("/")[2] for k in state if k.startswith("exp_avg/")} == start.keys() - still


def test_a_preset_is_the_default():
    assert TrainConfig(data=["x"]).validate().preset == "small"
    assert TrainConfig(data=["x"], arch="m1 T1", d_model=[64, 64]).validate().preset == ""
