"""A run whose step is recorded and replayed is the run whose step is not, to the bit. The recorder stands in for a CUDA
graph and is as strict: what the host decided while recording stays decided."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hnet_kernels as hk
from hnet.device import World
from hnet.errors import UserError
from hnet.events import Event
from hnet.metrics_log import read_metrics
from hnet.train import capturable
from hnet.train.captured import WARMUP
from hnet.train.checkpoint import latest_checkpoint, load_trainer, load_weights
from hnet.train.loop import Trainer
from hnet.train.task import HNetTask

from .recorder import Recorder, masked_attention, masked_fused
from .test_resume import NOT_EXACT, equal, run_with_a_crash

EVENTS = ("captured", "not_captured")


@pytest.fixture
def config(config):
    return dataclasses.replace(
        config, arch="c1 m1T1", d_model=[32, 64], windows=[15, -1], max_chunks=[0.6], documents="paragraph", steps=10,
        cuda_graph="on", dtype="fp32", batch_bytes=256, seq_len=64, eval_bytes=128,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    """Graphs are recorders, on a CPU too; attention has one shape for all lengths, and our ops are plain PyTorch (the
    CPU kernels look where a pack ends)."""
    Recorder.made.clear()
    monkeypatch.setattr("hnet.train.captured.CudaGraph", Recorder)
    monkeypatch.setattr("hnet.train.capturable.obstacle", lambda *a: "")
    monkeypatch.setattr("hnet.model.attention.attention", masked_attention)
    monkeypatch.setattr("hnet.model.attention.fused", masked_fused)
    monkeypatch.setattr("hnet_kernels.validation.readable", lambda x: False)
    with hk.backend("reference"):
        yield Recorder.made


def off(config):
    return dataclasses.replace(config, cuda_graph="off", out=config.out + "_off")


def same_runs(a: Path, b: Path) -> None:
    """But for what says that one of them was recorded."""
    x, y = latest_checkpoint(a / "checkpoints"), latest_checkpoint(b / "checkpoints")
    equal(load_weights(x), load_weights(y), "weights")
    first, second = load_trainer(x), load_trainer(y)
    for state in (first, second):
        del state["seconds"]
        state.pop("captured", None)
    equal(first, second, "trainer")
    logs = [
        [{k: v for k, v in r.items() if k not in NOT_EXACT} for r in read_metrics(d / "metrics.jsonl")] for d in (a, b)
    ]
    kept = [[r for r in rows if r.get("event") not in EVENTS] for rows in logs]
    assert kept[0] == kept[1]
    assert len([r for r in kept[0] if "event" not in r]) == 11


def events(config) -> list[tuple[int, str]]:
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    return [(r["step"], r["event"]) for r in rows if r.get("event") in EVENTS]


OPTIONS = {
    "muon+adaptive+bias": {
        "optimizer": "muon", "clipping": "adaptive", "clip_window": 5, "rate_control": "bias", "accumulation": 2,
        "weight_ema": 0.9, "schedule": "cosine",
    },
    "dropout+alpha+warm-ups": {
        "dropout": 0.1, "rate_control": "alpha", "ratio_warmup": 8, "label_smoothing": 0.1, "warmup_steps": 6,
        "boundaries": "char-end", "async_checkpoints": True, "entropy_weight": [0.1], "entropy_start": 0.2,
        "entropy_warmup": 0.5, "surprisal_weight": [0.05], "surprisal_warmup": 0.4,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_a_recorded_run_is_the_run(config, options, recorder):
    """Rates that change at every step, evaluations and checkpoints in between."""
    config = dataclasses.replace(config, **OPTIONS[options])
    Trainer(config).train()
    Trainer(off(config)).train()
    same_runs(Path(config.out), Path(off(config).out))
    assert (recorder[0].warm, recorder[0].recorded, recorder[0].replays) == (WARMUP, 1, 10 - WARMUP)
    assert events(config) == [(WARMUP + 1, "captured")]


def test_resumed_in_the_middle(config):
    config = dataclasses.replace(config, optimizer="muon", clipping="adaptive", clip_window=5, checkpoint_every=5)
    run_with_a_crash(config, at=9)
    Trainer(off(config)).train()
    same_runs(Path(config.out), Path(off(config).out))


@pytest.mark.slow
def test_a_checkpoint_is_read_with_and_without(config):
    """Recorded up to step 5, then not; and the other way around."""
    first, second = (dataclasses.replace(config, steps=5, schedule="constant", cuda_graph=c) for c in ("on", "off"))
    second.out += "2"
    for a, b in ((first, second), (second, first)):
        Trainer(dataclasses.replace(a)).train()
        Trainer(dataclasses.replace(a, steps=10, cuda_graph=b.cuda_graph), resume=True).train()
    same_runs(Path(first.out), Path(second.out))


def test_a_step_that_is_not_finite_is_skipped_in_a_replay(config, monkeypatch):
    right = HNetTask.loss

    def poisoned(task, model, batch, step):
        loss, means = right(task, model, batch, step)
        return (loss * task.poison if model.training else loss), means

    monkeypatch.setattr(HNetTask, "loss", poisoned)
    for c in (config, off(config)):
        trainer = Trainer(c)
        trainer.task.poison = torch.ones(())
        start = trainer.start_step

        def start_step(trainer=trainer, start=start):
            trainer.task.poison.fill_(torch.nan if trainer.step == 6 else 1.0)
            return start()

        trainer.start_step = start_step
        trainer.train()
    same_runs(Path(config.out), Path(off(config).out))
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    assert [r["step"] for r in rows if r.get("event") == "non_finite"] == [7]


class Cut:
    """A stream whose packs are cut into as many sequences as asked for."""

    def __init__(self, stream, counts: list[int]) -> None:
        self.stream, self.counts = stream, iter(counts)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __next__(self):
        batch, n = next(self.stream), next(self.counts)
        T = len(batch.targets)
        cu = torch.tensor([*(T * i // n for i in range(n)), T], dtype=torch.int32)
        return dataclasses.replace(batch, cu_seqlens=cu, max_seqlen=-(-T // n))


def test_more_sequences_than_there_was_room_for(config, recorder, monkeypatch):
    """Room for 4, then for 16; and a pack of so many that the budget has no room, which runs by itself."""
    monkeypatch.setattr("hnet.train.captured.FEWEST", 2)
    config = dataclasses.replace(config, max_chunks=[0.08])
    for c in (config, off(config)):
        trainer = Trainer(c)
        trainer.task.stream = Cut(trainer.task.stream, [2, 2, 2, 2, 5, 5, 5, 5, 40, 9])
        trainer.train()
    same_runs(Path(config.out), Path(off(config).out))
    assert (recorder[0].warm, recorder[0].recorded, recorder[0].replays) == (6, 2, 3)
    rooms = [r["message"] for r in read_metrics(Path(config.out) / "metrics.jsonl") if r.get("event") == "captured"]
    assert ["up to 4 sequences" in rooms[0], "up to 16 sequences" in rooms[1]] == [True, True]


@pytest.mark.slow
def test_a_target_that_moves_is_recorded_anew(config, recorder):
    config = dataclasses.replace(
        config, compression=[4.0], compression_start=[2.0], compression_notches=1, compression_anneal="plateau",
        eval_every=2, plateau_patience=0, plateau_cooldown=0, plateau_min_gain=0.9, min_delta=9.0, warmup_steps=0,
    )  # fmt: skip
    Trainer(config).train()
    Trainer(off(config)).train()
    same_runs(Path(config.out), Path(off(config).out))
    targets = [r["stage0/target"] for r in read_metrics(Path(config.out) / "metrics.jsonl") if "stage0/target" in r]
    assert targets == [2.0] * 4 + [4.0] * 6
    assert events(config) == [(4, "captured"), (8, "captured")]


def test_a_rollback_throws_the_graph_away(config, recorder):
    for c in (config, off(config)):
        trainer = Trainer(c)
        start = trainer.start_step

        def start_step(trainer=trainer, start=start):
            if trainer.step == 6:
                trainer.guards.sound = 6
                trainer._answer([Event("loss_spike", "a spike", "rollback")])
            return start()

        trainer.start_step = start_step
        trainer.train()
    same_runs(Path(config.out), Path(off(config).out))
    assert recorder[0].recorded == 2


@pytest.mark.parametrize("setting", ["auto", "on"])
def test_what_cannot_be_recorded(config, setting, monkeypatch):
    """Recording fails: one event with the reason and the run goes on; or an error, where it was asked for."""

    def fail(self, work):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Recorder, "record", fail)
    monkeypatch.setattr(capturable, "doubt", lambda *a: "")
    config = dataclasses.replace(config, cuda_graph=setting)
    trainer = Trainer(config)
    if setting == "auto":
        assert trainer.captured is None  # on a CPU nobody asked
        asked = dataclasses.replace(config, cuda_graph="on", out=config.out + "2")
        trainer = Trainer(asked)
        trainer.captured.required = False
        trainer.train()
        Trainer(off(config)).train()
        same_runs(Path(asked.out), Path(off(config).out))
        (row,) = [r for r in read_metrics(Path(asked.out) / "metrics.jsonl") if "event" in r]
        assert (row["step"], row["event"]) == (WARMUP + 1, "not_captured")
        assert row["message"].endswith("RuntimeError: operation not permitted when stream is capturing")
    else:
        with pytest.raises(UserError, match="cannot be recorded: RuntimeError: operation not permitted"):
            trainer.train()


# --- whether to ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "device", "processes", "why"),
    [
        ({}, "cpu", 1, "it needs a GPU, and the device is cpu"),
        ({}, "cuda", 2, "several processes"),
        ({"max_chunks": []}, "cuda", 1, "max_chunks is not set"),
        ({}, "cuda", 1, "attention in fp32"),
        ({"dtype": "bf16", "recompute": True, "dropout": 0.1}, "cuda", 1, "recompute with dropout"),
        ({"dtype": "bf16", "recompute": True}, "cuda", 1, ""),
        ({"dtype": "bf16"}, "cuda", 1, ""),
    ],
)
def test_obstacles(config, change, device, processes, why, monkeypatch):
    monkeypatch.undo()
    config = dataclasses.replace(config, cuda_graph="off", **change)
    task = Trainer(config).task
    found = capturable.obstacle(config, task, torch.device(device), World(0, processes, 0))
    assert found.startswith(why) if why else found == ""
    if found:
        inner, asked = SimpleNamespace(task=task), dataclasses.replace(config, cuda_graph="on")
        with pytest.raises(UserError, match=f"cuda_graph must be auto or off here, got 'on': {why}"):
            capturable.capture(asked, inner, torch.device(device), World(0, processes, 0))
        auto = dataclasses.replace(config, cuda_graph="auto")
        expected = "" if device == "cpu" else found
        assert capturable.capture(auto, inner, torch.device(device), World(0, processes, 0)) == (None, expected)


def test_a_long_step_is_left_alone(config, monkeypatch):
    task = Trainer(dataclasses.replace(config, cuda_graph="off")).task
    assert capturable.doubt(config, task) == ""
    monkeypatch.setattr(task, "pack_bytes", 10**9)
    assert "long enough for the host to keep ahead" in capturable.doubt(config, task)


def test_a_run_says_why_it_is_not_recorded(config, monkeypatch):
    monkeypatch.setattr("hnet.train.loop.capture", lambda *a: (None, "max_chunks is not set"))
    Trainer(dataclasses.replace(config, steps=1)).train()
    (row,) = [r for r in read_metrics(Path(config.out) / "metrics.jsonl") if "event" in r]
    assert row["event"] == "not_captured"
    assert row["message"] == "the training step runs without a CUDA graph: max_chunks is not set"
