"""A run that is killed and resumed is the run that was not, to the bit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hnet.config.keys import read_toml
from hnet.errors import UserError
from hnet.metrics_log import read_metrics
from hnet.train.checkpoint import latest_checkpoint, load_trainer, load_weights
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

from .conftest import STDLIB

NOT_EXACT = ("time", "bytes_per_second", "flops_per_second", "data_wait_share", "peak_memory")


class Killed(BaseException):
    pass


def run_with_a_crash(config, at, **options):
    """Train; lose everything since the last checkpoint at step `at`; resume to the end. Returns where it went on."""
    trainer = Trainer(config, **options)
    launch = trainer.start_step

    def killed():
        if trainer.step == at:
            raise Killed
        return launch()

    trainer.start_step = killed
    with pytest.raises(Killed):
        trainer.train()
    torch.manual_seed(12345)  # nothing may come from what happens to be in the global generator
    resumed = Trainer(config, resume=True, **options)
    begin = resumed.step
    assert 0 < begin < at
    resumed.train()
    return begin


def equal(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            equal(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def same_runs(a: Path, b: Path):
    x, y = latest_checkpoint(a / "checkpoints"), latest_checkpoint(b / "checkpoints")
    assert x.name == y.name
    equal(load_weights(x), load_weights(y), "weights")
    first, second = load_trainer(x), load_trainer(y)
    del first["seconds"], second["seconds"]
    equal(first, second, "trainer")
    rows = [
        [{k: v for k, v in r.items() if k not in NOT_EXACT} for r in read_metrics(d / "metrics.jsonl")] for d in (a, b)
    ]
    assert rows[0] == rows[1]


SCHEDULES = {
    "wsd": {"decay_shape": "inverse-sqrt"},
    "cosine": {"optimizer": "muon"},
    "constant": {"clipping": "adaptive", "clip_window": 5},
    "plateau": {"plateau_patience": 0, "plateau_cooldown": 0, "plateau_min_gain": 0.9, "eval_every": 2,
                "min_delta": 9.0},
    "restarts": {"restart_at": [0.0, 0.5], "restart_min": [0.1, 0.1], "restart_on_plateau": True,
                 "plateau_patience": 0, "plateau_cooldown": 0, "plateau_min_gain": 0.9, "eval_every": 2,
                 "min_delta": 9.0},
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resume_is_exact(config, schedule):
    config = dataclasses.replace(
        config, schedule=schedule, dropout=0.1, weight_ema=0.9, accumulation=2, rate_control="bias", ratio_warmup=6,
        compression_start=[2.0], patience=5, **SCHEDULES[schedule],
    )  # fmt: skip
    Trainer(config).train()
    crashed = dataclasses.replace(config, out=config.out + "2")
    run_with_a_crash(crashed, at=6)
    same_runs(Path(config.out), Path(crashed.out))


@pytest.mark.parametrize(
    "change",
    [
        {"rate_control": "alpha", "compression_start": [2.0], "compression_anneal": "plateau", "eval_every": 2,
         "plateau_patience": 0, "plateau_cooldown": 0, "plateau_min_gain": 0.9, "min_delta": 9.0},
        {"async_checkpoints": True, "label_smoothing": 0.1, "recompute": True, "num_workers": 2},
        {"max_chunks": [0.6], "boundaries": "char-end", "clipping": "off", "straight_through": True},
        {"stream": "on", "shuffle_bytes": 10_000, "documents": "line", "num_workers": 2,
         "data": [{"path": str(STDLIB / "email"), "weight": 2}, {"path": str(STDLIB / "json"), "weight": 1}]},
    ],
    ids=["alpha+anneal", "async+recompute+workers", "budget", "mixture of streams"],
)  # fmt: skip
def test_resume_is_exact_with(config, change):
    config = dataclasses.replace(config, **change)
    Trainer(config).train()
    crashed = dataclasses.replace(config, out=config.out + "2")
    run_with_a_crash(crashed, at=6)
    same_runs(Path(config.out), Path(crashed.out))


def test_a_run_of_0_1_0_goes_on(config, monkeypatch):
    """Its checkpoint lacks what came later, its plateaus are lists of losses, its config.toml has two more keys."""
    Trainer(config).train()
    older = load_trainer(latest_checkpoint(Path(config.out) / "checkpoints"))
    del older["unanswered"], older["guards"]["fresh"], older["task"]["flips"]
    older["plateau"] = older["task"]["plateau"] = [3.0, 2.9, 2.8]
    monkeypatch.setattr("hnet.train.checkpoint.load_trainer", lambda path: older)
    path = Path(config.out) / "config.toml"
    path.write_text(path.read_text() + "plateau_window = 50\nplateau_threshold = 0.005\n")
    again = TrainConfig(**read_toml(path, TrainConfig) | {"steps": 10})
    trainer = Trainer(again, resume=True)
    trainer.train()
    assert trainer.step == 10
    path.write_text("plateau_window = 20\n")  # set by someone: it would have no effect
    with pytest.raises(UserError, match="unknown key 'plateau_window'"):
        read_toml(path, TrainConfig)


@pytest.mark.slow
def test_kill_9(config, tmp_path):
    """40 steps straight, and 20 + kill -9 somewhere in what follows + the rest, as real processes."""
    config = dataclasses.replace(config, steps=40, checkpoint_every=20, eval_every=20, weight_ema=0.9)

    def start(out, *extra):
        path = tmp_path / "config.toml"
        path.write_text(dataclasses.replace(config, out=str(out)).to_toml())
        return subprocess.Popen([sys.executable, "-m", "hnet", "train", str(path), *extra], stdout=subprocess.DEVNULL)

    assert start(tmp_path / "a").wait() == 0
    killed = start(tmp_path / "b")
    log = tmp_path / "b" / "metrics.jsonl"
    for _ in range(3000):
        if log.exists() and any(json.loads(line)["step"] >= 23 for line in log.read_text().splitlines()[-3:-1]):
            break
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert latest_checkpoint(tmp_path / "b" / "checkpoints").name == "step_00000020"
    assert start(tmp_path / "b", "--resume", "auto").wait() == 0
    same_runs(tmp_path / "a", tmp_path / "b")
