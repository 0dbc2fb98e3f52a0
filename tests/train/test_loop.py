import dataclasses
import math
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from hnet import EOS, HNetForCausalLM
from hnet.data.pack_stream import PackStream
from hnet.data.packing import eval_batches
from hnet.metrics_log import read_metrics
from hnet.train.checkpoint import latest_checkpoint, list_checkpoints
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer


def metrics(config):
    return read_metrics(Path(config.out) / "metrics.jsonl")


def weights(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def test_run_directory_and_metrics(config):
    result = Trainer(config).train()
    out = Path(config.out)
    assert {p.name for p in out.iterdir()} == {
        "config.toml", "metrics.jsonl", "held_out.jsonl", "checkpoints", "samples",
    }  # fmt: skip
    assert [p.name for p in list_checkpoints(out / "checkpoints")] == ["step_00000004", "step_00000008"]
    rows = metrics(config)
    assert [r["step"] for r in rows] == list(range(9))
    wanted = ["step", "bytes", "time", "loss", "ce", "bpb", "ratio_loss", "grad_norm", "lr", "bytes_per_second"]
    wanted += [f"stage0/{k}" for k in ["F", "G", "bytes_per_chunk", "target", "ratio_loss", "grad_norm", "lr"]]
    wanted += ["stage1/grad_norm", "stage1/lr"]
    assert set(wanted) <= set(rows[3])
    assert [("val_bpb" in r) for r in rows] == [True, False, False, False, True, False, False, False, True]
    last = rows[-1]
    assert last["val_bpb"] == pytest.approx(result["val_bpb"], rel=1e-6)
    assert 0 < last["epoch"] < 1
    assert last["loss"] == pytest.approx(last["ce"] + config.ratio_weight * last["ratio_loss"], rel=1e-5)
    assert last["stage0/bytes_per_chunk"] == pytest.approx(1 / last["stage0/F"], rel=1e-4)
    assert last["grad_norm"] == pytest.approx(math.hypot(last["stage0/grad_norm"], last["stage1/grad_norm"]), rel=1e-5)


def test_bytes_and_bits_are_of_text(config):
    config = dataclasses.replace(config, documents="line", steps=3, accumulation=2)
    trainer = Trainer(config)
    packs = PackStream(trainer.task.stream.source, config.seq_len, 512, config.seed)
    result = trainer.train()
    rows, total = metrics(config), 0
    for row in rows[1:]:
        ends = int((next(packs).targets == EOS).sum())  # no document holds the byte
        total += 512 - ends
        assert ends > 5
        assert row["bytes"] == total
        assert row["bpb"] == pytest.approx(512 * row["ce"] / math.log(2) / (512 - ends), rel=1e-5)
    held_out = list(eval_batches(trainer.task.val, config.seq_len, 256, config.eval_bytes))
    symbols, text = (sum(getattr(b, n) for b in held_out) for n in ("num_targets", "num_bytes"))
    assert text + 10 < symbols
    assert result["val_bpb"] == pytest.approx(symbols * result["val_ce"] / math.log(2) / text, rel=1e-9)


@pytest.mark.slow
def test_it_learns(config):
    c = dataclasses.replace(config, steps=80, learning_rate=5e-3, batch_bytes=2048, eval_every=80, optimizer="muon")
    Trainer(c).train()
    rows = metrics(c)
    assert rows[0]["val_bpb"] > 7.5
    assert rows[-1]["val_bpb"] < 4.0


def test_ctrl_c_saves_and_resume_goes_on(config):
    config = dataclasses.replace(config, steps=50, checkpoint_every=100, eval_every=100)
    trainer = Trainer(config)
    launch = trainer.start_step

    def interrupted():
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return launch()

    trainer.start_step = interrupted
    trainer.train()
    assert latest_checkpoint(Path(config.out) / "checkpoints").name == "step_00000003"
    again = Trainer(dataclasses.replace(config, steps=5), resume=True)
    again.train()
    assert [r["step"] for r in metrics(config)] == [0, 1, 2, 3, 4, 5]


def test_a_checkpoint_is_a_model_directory(config):
    trainer = Trainer(config)
    trainer.train()
    model = HNetForCausalLM.from_pretrained(latest_checkpoint(Path(config.out) / "checkpoints"))
    assert model.config == trainer.model.config
    assert all(torch.equal(v, weights(trainer)[k]) for k, v in model.state_dict().items())


def test_a_failed_save_leaves_the_old_checkpoint(config, monkeypatch):
    trainer = Trainer(config)
    trainer.train()
    before = list_checkpoints(Path(config.out) / "checkpoints")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hnet.train.checkpoint.torch.save", full)
    trainer.state.step += 1
    with pytest.raises(OSError, match="No space left"):
        trainer.save()
    assert list_checkpoints(Path(config.out) / "checkpoints") == before
    monkeypatch.undo()
    assert Trainer(config, resume=True).step == 8


def test_damaged_checkpoint_is_refused_by_name(config):
    Trainer(config).train()
    path = latest_checkpoint(Path(config.out) / "checkpoints") / "trainer.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"trainer.pt is damaged"):
        Trainer(config, resume=True)


def test_an_existing_run_is_not_overwritten(config):
    Trainer(config).train()
    with pytest.raises(FileExistsError, match="already holds a run: resume it with --resume"):
        Trainer(config)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        Trainer(dataclasses.replace(config, out=config.out + "x"), resume=True)


def test_learning_rate_multipliers_and_clipping(config):
    c = dataclasses.replace(config, lr_multipliers=[2.0, 0.5], max_grad_norm=1e-3, warmup_steps=0, schedule="constant")
    trainer = Trainer(c)
    row = trainer.train_step()
    assert (row["stage0/lr"], row["stage1/lr"]) == (2e-3, 5e-4)
    assert row["grad_norm"] > 1e-3  # the norm before clipping
    exp_avg = [s["exp_avg"] for s in trainer.optimizers.parts[0].state.values()]
    total = torch.linalg.vector_norm(torch.stack([m.norm() for m in exp_avg])) / (1 - 0.9)
    assert total.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("stages", "twice"), [([], {0, 1}), ([0], {0}), ([1], {1})])
def test_recompute_takes_the_stages_named(config, stages, twice):
    """Their blocks run again in the backward, to the same gradients."""
    config = dataclasses.replace(config, dtype="fp32", compile=False)
    plain = Trainer(config).train_step()
    trainer = Trainer(dataclasses.replace(config, recompute=True, recompute_stages=stages))
    runs: Counter[int] = Counter()
    for i, stage in enumerate(trainer.model.stages()):
        for stack in [stage.main_network] if stage.innermost else [stage.encoder, stage.decoder]:
            stack.layers[0].register_forward_pre_hook(lambda *_, i=i: runs.update([i]))
    row = trainer.train_step()
    assert {i: runs[i] for i in (0, 1)} == {0: 4 if 0 in twice else 2, 1: 2 if 1 in twice else 1}
    assert (row["loss"], row["grad_norm"]) == (plain["loss"], plain["grad_norm"])


def test_a_resumed_run_takes_a_changed_learning_rate(config):
    config = dataclasses.replace(config, schedule="constant")
    Trainer(config).train()
    changed = dataclasses.replace(config, steps=9, learning_rate=5e-4)
    assert Trainer(changed, resume=True).train_step()["stage1/lr"] == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "data must be at least one file or folder, got []"),
        ({"compression": [1.0]}, "compression must be above 1 everywhere, got [1.0]"),
        ({"compression": [3.0, 3.0]}, "compression must be one target for each of the 1 stages with routing"),
        ({"lr_multipliers": [1.0]}, "lr_multipliers must be empty or one for each of 2 stages"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"schedule": "linear"}, "schedule must be one of wsd, cosine, constant, plateau, restarts, got 'linear'"),
        ({"preset": "huge"}, "unknown preset 'huge'"),
        ({"batch_bytes": 10**9}, "fewer than one batch of 1000000000"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"recompute_stages": [1]}, "recompute_stages must be left out unless recompute is on, got [1]"),
        ({"recompute": True, "recompute_stages": [2]}, "recompute_stages must be stages from 0 to 1, got [2]"),
        ({"restart_on_plateau": True}, "restart_on_plateau must be off unless schedule is restarts, got True"),
    ],
)
def test_bad_configs_are_one_line_and_write_nothing(config, change, message):
    with pytest.raises(ValueError) as e:
        Trainer(dataclasses.replace(config, **change))
    assert message in str(e.value)
    assert not Path(config.out).exists()


def test_toml_round_trip(config, tmp_path):
    from hnet.config.keys import read_toml

    (tmp_path / "c.toml").write_text(config.to_toml())
    assert TrainConfig(**read_toml(tmp_path / "c.toml", TrainConfig)) == config
    for text, message in [
        ("nope = 1", "unknown key 'nope'"),
        ('steps = "many"', "steps must be int, got 'many'"),
        ("compression = [2, 'x']", "compression must be float, got 'x'"),
        ("steps = ", "is not TOML"),
    ]:
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_toml(tmp_path / "bad.toml", TrainConfig)
    (tmp_path / "int.toml").write_text("learning_rate = 1\ncompression = 3")
    assert read_toml(tmp_path / "int.toml", TrainConfig) == {"learning_rate": 1.0, "compression": [3.0]}
