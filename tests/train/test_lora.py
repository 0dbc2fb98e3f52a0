"""Adapters: what trains, what stays, checkpoints that are ordinary ones, exact resuming."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hnet import HNetConfig, HNetForCausalLM
from hnet.errors import UserError
from hnet.model.checkpoint_format import read_weights
from hnet.train import lora
from hnet.train.checkpoint import latest_checkpoint, load_weights
from hnet.train.config import TrainConfig
from hnet.train.dry_run import report
from hnet.train.loop import Trainer

from .processes import STEP, found, job, run, state_of
from .test_init_from import model
from .test_resume import equal, run_with_a_crash

peft = pytest.importorskip("peft", reason="needs peft: pip install 'hnet-kernels[lora]'")

LINEARS = ("in_proj", "out_proj", "Wqkv", "fc1", "fc2", "q_proj_layer", "k_proj_layer", "residual_proj", "lm_head")
IDS = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tuned(config, tmp_path):
    model(tmp_path / "base")
    return dataclasses.replace(config, preset="", init_from=str(tmp_path / "base"), lora_rank=3, learning_rate=0.02)


def logits(lm):
    with torch.no_grad():
        return lm.eval()(IDS).logits


def with_adapters(config, **keys):
    lm = HNetForCausalLM(config)
    lora.adapt(lm, TrainConfig(lora_rank=2, **keys))
    return lm


# --- which maps ----------------------------------------------------------------------------------------------------


def test_every_map_in_every_way_of_running():
    """An adapter on any linear map changes what comes out; a text as a whole, byte by byte, and of the merged weights
    then gives the same: nothing reads past an adapter to its weight."""
    torch.manual_seed(0)
    config = HNetConfig.from_dict(
        {"arch_layout": ["c1m1", ["T1t1"], "M1"], "d_model": [64, 96], "d_intermediate": [64, 96],
         "ssm_cfg": {"d_state": 8}, "attn_cfg": {"num_heads": [4, 4], "rotary_emb_dim": [8, 8], "window_size": [7, 9]}}
    )  # fmt: skip
    lm = with_adapters(config, lora_targets=list(LINEARS)).eval()
    layers = [m for m in lm.modules() if hasattr(m, "base_layer")]
    assert len(layers) == 5 * 2 + 2 * 2 + 4  # mixers c m T t M, MLPs of T and M, router, residual, head
    for layer in layers:  # not sharper: boundaries are where they are
        nn.init.normal_(layer.lora_B["default"].weight, std=0.05)

    for layer in layers:
        before = logits(lm)
        nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
        assert not torch.allclose(before, logits(lm), atol=1e-3)
    cache = lm.allocate_cache(2, 60)
    steps = torch.stack([lm.step(IDS[:, t], cache)[0] for t in range(60)], 1)
    torch.testing.assert_close(steps, logits(lm), rtol=1e-4, atol=2e-5)
    plain = HNetForCausalLM(config)
    plain.load_state_dict(lora.merged(lm))
    torch.testing.assert_close(logits(plain), logits(lm), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([], {"in_proj", "out_proj", "Wqkv", "fc1", "fc2"}),
        (["Wqkv", "fc?"], {"Wqkv", "fc1", "fc2"}),
        (["router", "lm_head"], {"q_proj_layer", "k_proj_layer", "lm_head"}),
        (["stage0.decoder"], {"in_proj", "out_proj"}),
    ],
)
def test_names(patterns, names):
    chosen = lora.targets(HNetForCausalLM(HNetConfig.preset("tiny")), patterns)
    assert {n.rpartition(".")[2] for n in chosen} == names
    assert patterns != ["stage0.decoder"] or all(n.startswith("backbone.decoder.") for n in chosen)


# --- training ------------------------------------------------------------------------------------------------------


def test_what_trains(tuned, tmp_path):
    """The adapters, and what lora_full names; at the start the model is that of the weights, to the bit."""
    tuned.lora_full, tuned.optimizer, tuned.lr_multipliers = ["router", "*.fc1"], "muon", [2.0, 1.0]
    tuned.dtype = "fp32"
    trainer = Trainer(tuned)
    assert torch.equal(logits(trainer.model), logits(HNetForCausalLM.from_pretrained(tmp_path / "base")))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".lora_" in n or "routing_module" in n or ".fc1." in n}
    assert len([n for n in moved if ".lora_" in n]) == 2 * (4 * 2 + 2 * 3)  # tiny is m2, T2, m2; of T all but fc1
    names = {p: n for n, p in trainer.model.named_parameters()}
    for part in trainer.optimizers.parts:
        for group in part.param_groups:
            router = 0.1 if group["router"] else 1.0
            assert group["peak"] == pytest.approx(0.02 * router * (1.0 if group["stage"] else 2.0))
            assert all(("main_network" in names[p]) == bool(group["stage"]) for p in group["params"])
    muon = {names[p] for g in trainer.optimizers.parts[1].param_groups for p in g["params"]}
    assert muon == {n for n in moved if ".fc1." in n}
    held_out = trainer.evaluate()["val_bpb"]
    saved = HNetForCausalLM.from_pretrained(latest_checkpoint(Path(tuned.out) / "checkpoints"))
    torch.testing.assert_close(logits(saved), logits(trainer.model), rtol=1e-4, atol=2e-5)
    again = Trainer(dataclasses.replace(tuned, lora_rank=0, lora_full=[], lr_multipliers=[], out=str(tmp_path / "next"),
                                        init_from=tuned.out))  # fmt: skip
    assert again.evaluate()["val_bpb"] == pytest.approx(held_out, abs=1e-5)


def test_resume_is_exact_and_needs_the_start_no_more(tuned, tmp_path):
    tuned.lora_dropout, tuned.lora_full, tuned.async_checkpoints = 0.2, ["lm_head"], True
    whole = dataclasses.replace(tuned, out=str(tmp_path / "whole"))
    Trainer(whole).train()
    assert run_with_a_crash(tuned, at=6) == 4
    a, b = (latest_checkpoint(Path(c.out) / "checkpoints") for c in (whole, tuned))
    equal(load_weights(a), load_weights(b))
    for file in (lora.ADAPTERS, lora.BASE):
        equal(read_weights(a / "lora" / file), read_weights(b / "lora" / file))
    base = read_weights(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(v, base[k]) for k, v in read_weights(a / "lora" / lora.BASE).items())


def test_resume_with_other_adapters(tuned, tmp_path):
    tuned.steps = 4
    Trainer(tuned).train()
    for keys, message in [
        ({"lora_rank": 2}, "lora_rank, lora_alpha, lora_targets and lora_full must be those"),
        ({"lora_alpha": 1.0}, "lora_rank, lora_alpha, lora_targets and lora_full must be those"),
        ({"lora_targets": ["Wqkv"]}, "lora_rank, lora_alpha, lora_targets and lora_full must be those"),
        ({"lora_rank": 0}, r"lora_\* and freeze must be those of the run that goes on"),
    ]:
        with pytest.raises(UserError, match=message):
            Trainer(dataclasses.replace(tuned, steps=8, **keys), resume=True)
    other = dataclasses.replace(tuned, lora_rank=0, out=str(tmp_path / "plain"))
    Trainer(other).train()
    with pytest.raises(UserError, match="lora_rank must be 0 as in the run that goes on"):
        Trainer(dataclasses.replace(other, steps=8, lora_rank=2), resume=True)


@pytest.mark.slow
def test_a_step_of_two_processes_is_that_of_one(tuned, tmp_path, one_thread):
    tuned = dataclasses.replace(tuned, **STEP, clipping="off")
    alone = Trainer(dataclasses.replace(tuned, accumulation=2, out=str(tmp_path / "alone")))
    row = alone.train_step()
    assert run(tmp_path, [job("two", tuned, "step")]) == [0, 0]
    two, mine = found(tmp_path, "two"), state_of(alone)
    assert two["rows"][-1]["loss"] == pytest.approx(row["loss"], rel=1e-5)
    moments = [k for k in mine if k.startswith("exp_avg/")]
    assert moments
    assert all(".lora_" in k for k in moments)
    assert mine.keys() == two["state"].keys()
    for k in moments:
        torch.testing.assert_close(two["state"][k], mine[k], rtol=1e-4, atol=1e-5 * float(mine[k].abs().max()))


# --- elsewhere -----------------------------------------------------------------------------------------------------


def test_peft_reads_the_adapters(tuned, tmp_path):
    """Around the transformers model of the weights that the run started from."""
    hf = pytest.importorskip("hnet.hf")
    tuned.steps = 4
    Trainer(tuned).train()
    last = latest_checkpoint(Path(tuned.out) / "checkpoints")
    model = peft.PeftModel.from_pretrained(hf.HNetForCausalLM.from_checkpoint(tmp_path / "base"), last / "lora")
    with torch.no_grad():
        theirs = model(IDS).logits
    torch.testing.assert_close(theirs, logits(HNetForCausalLM.from_pretrained(last)), rtol=1e-4, atol=2e-5)
    about = json.loads((last / "lora" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (3, 6.0, tuned.init_from)


def test_mistakes(tuned, monkeypatch):
    for keys, message in [
        ({"lora_rank": -1}, "lora_rank must be at least 0, got -1"),
        ({"lora_rank": 0, "lora_alpha": 2.0}, "lora_alpha must be left out unless lora_rank is given, got 2.0"),
        ({"lora_targets": ["fc1", "q_proj"]}, "lora_targets must name linear maps, got 'q_proj'; known are in_proj"),
        ({"lora_targets": ["embeddings"]}, "lora_targets must name linear maps, got 'embeddings'"),
        ({"lora_targets": ["fc1"], "lora_full": ["inner"]}, "lora_targets must leave a linear map to adapt"),
        ({"lora_full": ["heads"]}, "lora_full must name parts of this model, got 'heads'; known are embeddings"),
        ({"init_from": "", "preset": "tiny"}, "init_from must be given where lora_rank is"),
        ({"freeze": ["encoder"]}, "freeze must be left out with lora_rank"),
        ({"weight_ema": 0.9}, "weight_ema must be 0 with lora_rank"),
        ({"parallel": "fsdp"}, "parallel must be ddp with lora_rank"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            Trainer(dataclasses.replace(tuned, **keys))
    tied = HNetForCausalLM(dataclasses.replace(HNetConfig.preset("tiny"), tie_embeddings=True))
    with pytest.raises(UserError, match="lora_targets must leave out lm_head, which is tied"):
        lora.targets(tied, ["lm_head"])
    assert "adapters of rank 3 on 16 maps" in report(tuned)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"lora_rank needs peft: pip install 'hnet-kernels\[lora\]'"):
        Trainer(tuned)
    assert not Path(tuned.out).exists()
