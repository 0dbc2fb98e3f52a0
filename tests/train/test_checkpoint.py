import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hnet import HNetForCausalLM
from hnet.train.checkpoint import Background, latest_checkpoint, list_checkpoints, load_trainer
from hnet.train.loop import Trainer


@pytest.fixture
def run(config):
    Trainer(dataclasses.replace(config, weight_ema=0.9)).train()
    return Path(config.out) / "checkpoints"


def test_it_says_what_it_is(run, config):
    about = json.loads((run / "step_00000008" / "run.json").read_text())
    assert about["step"] == 8
    assert about["config"]["learning_rate"] == config.learning_rate
    assert about["torch"] == torch.__version__
    assert {"git", "python", "hnet_kernels", "processes"} <= about.keys()
    files = {p.name for p in (run / "step_00000008").iterdir()}
    manifest = json.loads((run / "step_00000008" / "manifest.json").read_text())
    assert files == {*manifest, "manifest.json"}
    assert files == {"config.json", "model.safetensors", "ema.safetensors", "trainer.pt", "run.json", "manifest.json"}


def test_the_best_stays_beside_the_latest(config):
    c = dataclasses.replace(config, steps=12, keep_checkpoints=1)
    trainer = Trainer(c)
    evaluate, wanted = trainer.task.evaluate, iter([5.0, 1.0, 2.0, 3.0])
    trainer.task.evaluate = lambda model: evaluate(model) | {"val_ce": next(wanted)}
    trainer.train()
    root = Path(config.out) / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["best", "step_00000012"]
    assert json.loads((root / "best" / "run.json").read_text())["step"] == 4
    HNetForCausalLM.from_pretrained(root / "best")


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "run.json", "ema.safetensors"])
@pytest.mark.parametrize("how", ["cut", "altered", "gone"])
def test_damage_is_refused_by_name_and_the_previous_one_offered(run, config, name, how):
    file = latest_checkpoint(run) / name
    data = file.read_bytes()
    if how == "cut":
        file.write_bytes(data[:-3])
    elif how == "altered":
        file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    else:
        file.unlink()
    c = dataclasses.replace(config, weight_ema=0.9)
    with pytest.raises(ValueError) as e:
        Trainer(c, resume=True)
    problem = {"cut": "is damaged: ", "altered": "is damaged: its bytes are not", "gone": "is missing"}[how]
    assert f"{file} {problem}" in str(e.value)
    previous = run / "step_00000004"
    assert f"resume with --resume {previous}" in str(e.value)
    assert Trainer(c, resume=str(previous)).step == 4


def test_an_unfinished_checkpoint_is_not_one(run):
    (run / "step_00000008" / "manifest.json").unlink()
    assert [p.name for p in list_checkpoints(run)] == ["step_00000004"]


def test_weight_average_is_saved_and_evaluated(run, config):
    average = load_file(run / "step_00000008" / "ema.safetensors")
    weights = load_file(run / "step_00000008" / "model.safetensors")
    assert average.keys() == weights.keys()
    assert any(not torch.equal(average[k], weights[k]) for k in average)
    row = json.loads((Path(config.out) / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["ema_val_ce"] != row["val_ce"]


def test_weight_average_is_written_once_and_that_of_earlier_versions_is_read(run, config):
    """They had it in trainer.pt as well, as a list."""
    c = dataclasses.replace(config, weight_ema=0.9)
    path = run / "step_00000008"
    state = load_trainer(path)
    assert state["ema"] == {"updates": 8}
    average = load_file(path / "ema.safetensors")
    resumed = Trainer(c, resume=True)
    assert all(torch.equal(a, average[n]) for n, a in resumed.ema.named().items())

    names = [n for n, p in resumed.model.named_parameters() if p.requires_grad]
    torch.save({**state, "ema": {"updates": 8, "average": [average[n] for n in names]}}, path / "trainer.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / "trainer.pt").read_bytes()
    manifest["trainer.pt"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    old = Trainer(c, resume=True)
    assert old.ema.updates == 8
    assert all(torch.equal(a, average[n]) for n, a in old.ema.named().items())


def test_a_weight_average_that_begins_at_a_resume_begins_at_the_weights(config):
    Trainer(config).train()
    trainer = Trainer(dataclasses.replace(config, weight_ema=0.9), resume=True)
    weights = dict(trainer.model.named_parameters())
    assert all(torch.equal(a, weights[n]) for n, a in trainer.ema.named().items())


def test_errors_of_a_background_save_surface():
    background = Background()

    def full():
        raise OSError(28, "No space left on device")

    background.start(full)
    with pytest.raises(OSError, match="No space"):
        background.wait()
    background.wait()  # said once


def test_samples_profile_and_missing_packages(config):
    c = dataclasses.replace(config, steps=13, eval_every=13, sample_bytes=16, profile=2)
    Trainer(c).train()
    sample = (Path(c.out) / "samples" / "step_00000013.txt").read_text()
    assert "--- continuation of" in sample
    assert "--- chunks of stage 0" in sample
    trace = json.loads((Path(c.out) / "trace.json").read_text())
    assert any("mm" in e.get("name", "") for e in trace["traceEvents"])
    for option in ({"tensorboard": True}, {"wandb": "project"}):
        name = next(iter(option))
        try:
            __import__(name)
        except ImportError:
            with pytest.raises(ValueError, match=f"{name} needs its package: pip install {name}"):
                Trainer(dataclasses.replace(config, out=config.out + name, **option)).train()
