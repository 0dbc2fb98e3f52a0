"""Each way a run can die is provoked and seen."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from hnet.chunk_lm.task import ChunkLMTask
from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.diagnose.runs import read_log
from hnet.diagnose.training import non_finite
from hnet.errors import RunFailed
from hnet.metrics_log import read_metrics
from hnet.train import guards
from hnet.train.checkpoint import list_checkpoints
from hnet.train.console import TrainConsole
from hnet.train.guards import Guards
from hnet.train.loop import Trainer
from hnet.train.schedule import Schedule
from hnet.train.stopping import EarlyStopping

from .conftest import STDLIB


def events(config, name):
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    return [r for r in rows if r.get("event") == name]


def before_step(trainer, step, action):
    launch = trainer.start_step

    def patched():
        if trainer.step == step:
            action()
        return launch()

    trainer.start_step = patched


# --- whole runs ---------------------------------------------------------------------------------------------------


def test_non_finite_step_is_skipped_and_counted(config):
    trainer = Trainer(config)
    loss = trainer.task.loss
    seen = {}

    def poisoned(model, batch, step):
        value, means = loss(model, batch, step)
        if step == 4 and model.training:
            seen["before"] = {k: v.clone() for k, v in trainer.model.state_dict().items()}
            return value * torch.nan, means
        if step == 5 and model.training:
            assert all(torch.equal(v, seen["before"][k]) for k, v in trainer.model.state_dict().items())
        return value, means

    trainer.task.loss = poisoned
    trainer.train()
    (event,) = events(config, "non_finite")
    assert event["step"] == 5
    assert "the step was not taken (1 in a row)" in event["message"]
    assert trainer.step == 8
    assert trainer.guards.bad == 0


def test_too_many_non_finite_steps_end_the_run(config):
    config = dataclasses.replace(config, max_bad_steps=3)
    trainer = Trainer(config)
    before_step(trainer, 2, lambda: trainer.model.lm_head.weight.data.fill_(torch.inf))
    with pytest.raises(RunFailed, match=r"step 5: non-finite loss.*3 in a row.*giving up"):
        trainer.train()


@pytest.mark.parametrize(("every", "back_to"), [(4, 8), (5, 5)])  # the checkpoint of step 10 is of broken weights
def test_loss_spike_rolls_back_to_before_it(config, monkeypatch, every, back_to):
    monkeypatch.setattr(guards, "WINDOW", 12)
    config = dataclasses.replace(config, steps=16, checkpoint_every=every, eval_every=every)  # the best is kept too
    config = dataclasses.replace(config, spike_lr_cut=0.5, schedule="constant")
    trainer = Trainer(config)
    trainer.guards.losses = guards.deque(maxlen=12)

    def break_it():
        trainer.model.lm_head.weight.data.normal_(std=50.0)

    before_step(trainer, 9, break_it)
    trainer.train()
    (spike,) = events(config, "loss_spike")
    assert spike["step"] == 12  # broken before the 10th, seen for three steps
    (back,) = events(config, "rollback")
    assert f"step_{back_to:08d}; learning rate x 0.5" in back["message"]
    rows = {r["step"]: r for r in read_metrics(Path(config.out) / "metrics.jsonl") if "loss" in r}
    assert rows[12]["loss"] > 2 * rows[9]["loss"]
    assert rows[13]["loss"] < 1.1 * rows[9]["loss"]  # the weights of then, on new data
    assert rows[13]["lr"] == pytest.approx(0.5 * rows[12]["lr"])


@pytest.mark.parametrize(("bias", "name"), [(30.0, "collapse_open"), (-30.0, "collapse_closed")])
def test_collapse(config, monkeypatch, bias, name):
    monkeypatch.setattr(guards, "PERSISTENT", 3)
    trainer = Trainer(config)
    next(trainer.model.stages()).set_logit_bias(bias)
    trainer.train()
    (event,) = events(config, name)  # once, not at every step
    assert event["step"] == 3
    assert "stage0 collapsed to one" in event["message"]


def test_budget_overflow(config):
    config = dataclasses.replace(config, max_chunks=[0.3])
    Trainer(config).train()
    (event,) = events(config, "budget_overflow")
    assert event["step"] == 1
    row = next(r for r in read_metrics(Path(config.out) / "metrics.jsonl") if "loss" in r)
    assert row["stage0/dropped"] > 0
    assert row["stage0/F"] == pytest.approx(0.3, abs=0.01)


def test_out_of_memory_gives_advice(config):
    trainer = Trainer(config)
    before_step(trainer, 3, lambda: torch.empty(1 << 60))
    with pytest.raises(RunFailed, match="out of memory at step 3: lower batch_bytes or raise accumulation"):
        trainer.train()
    assert events(config, "out_of_memory")


def test_disk_full_costs_one_checkpoint(config, monkeypatch):
    trainer = Trainer(config)
    save = torch.save

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    before_step(trainer, 6, lambda: monkeypatch.setattr("hnet.train.distributed.torch.save", full))
    with pytest.raises(OSError, match="No space left"):  # the last checkpoint is not optional
        trainer.train()
    monkeypatch.setattr("hnet.train.distributed.torch.save", save)
    assert "checkpoint of step 8 not written" in events(config, "disk_full")[0]["message"]
    left = Path(config.out) / "checkpoints"
    assert [p.name for p in list_checkpoints(left)] == ["step_00000004"]
    assert not list(left.glob(".partial*"))
    assert Trainer(config, resume=True).step == 4


# --- rules on made-up rows ----------------------------------------------------------------------------------------


def row(step, **kw):
    base = {
        "step": step, "loss": 2.0, "grad_norm": 1.0, "stage0/F": 0.25, "stage0/G": 0.25, "stage0/target": 4.0,
        "stage0/ratio_loss": 1.0, "stage0/chunks_per_sequence": 30.0, "stage0/grad_norm": 1.0,
    }  # fmt: skip
    return base | kw


def names(g, rows):
    return [e.name for r in rows for e in g.check(r)]


def test_target_missed_although_the_ratio_loss_is_near_one():
    """F 0.4 against 1/4 with G = 0.26: the ratio loss is 1.008 and says nothing."""
    ratio = 4 / 3 * (3 * 0.4 * 0.26 + 0.6 * 0.74)
    assert ratio == pytest.approx(1, abs=0.01)
    missed = [row(s, **{"stage0/F": 0.4, "stage0/G": 0.26, "stage0/ratio_loss": ratio}) for s in range(1, 400)]
    g = Guards(warmup=100)
    assert names(g, missed[:199]) == []
    assert names(g, missed[199:]) == ["target_missed"]  # once the warm-up and a window are over, then quiet
    assert names(Guards(warmup=100), [row(s) for s in range(1, 400)]) == []


def test_gradient_explosion():
    calm = [row(s, **{"stage0/grad_norm": 1 + s % 3 / 10}) for s in range(1, 80)]
    g = Guards(warmup=0)
    assert names(g, calm) == []
    (event,) = g.check(row(80, **{"stage0/grad_norm": 50.0}))
    assert event.name == "grad_explosion"
    assert "norm 50 against 1.1" in event.message


def test_a_single_high_loss_is_no_spike():
    g = Guards(warmup=0)
    assert names(g, [row(s, loss=2 + 0.01 * (s % 5)) for s in range(100)]) == []
    assert names(g, [row(100, loss=9.0), row(101), row(102, loss=9.0), row(103, loss=9.0), row(104)]) == []
    assert names(g, [row(s, loss=9.0) for s in (105, 106, 107)]) == ["loss_spike"]


def test_state_survives():
    a = Guards(warmup=10)
    for s in range(150):
        a.check(row(s, **{"stage0/F": 0.4 + s / 1e4}))
    b = Guards(warmup=10)
    b.load_state_dict(a.state_dict())
    assert a.state_dict() == b.state_dict()


# --- early stopping -------------------------------------------------------------------------------------------------


def test_early_stopping_rule():
    s = EarlyStopping(patience=2, min_delta=0.1)
    for step, ce in enumerate([3.0, 2.0, 1.95, 1.85, 1.84]):
        s.observe(step, ce)
        assert not s.stop, step
    assert s.best_step == 3
    s.observe(5, 1.80)
    assert s.stop
    smooth = EarlyStopping(patience=1, smoothing=0.9)
    for step, ce in enumerate([3.0, 2.0, 2.8, 2.0]):  # noise that the smoothed curve does not follow
        smooth.observe(step, ce)
        assert not smooth.stop


def test_early_stop_looks_at_cross_entropy_and_keeps_the_best(config):
    config = dataclasses.replace(config, steps=40, eval_every=2, checkpoint_every=100, patience=2)
    trainer = Trainer(config)
    evaluate = trainer.task.evaluate
    wanted = iter([3.0, 2.5, 2.0, 2.2, 2.1])
    trainer.task.evaluate = lambda model: evaluate(model) | {"val_ce": next(wanted)}
    trainer.train()
    assert trainer.step == 8
    (event,) = events(config, "early_stop")
    assert "no better validation cross entropy in 2 evaluations" in event["message"]
    root = Path(config.out) / "checkpoints"
    assert '"step": 4' in (root / "best" / "run.json").read_text()
    assert [p.name for p in list_checkpoints(root)][-1] == "step_00000008"


# --- planned jumps --------------------------------------------------------------------------------------------------


@pytest.fixture
def chunk_lm(tmp_path):
    return ChunkLMTrainConfig(
        data=[str(STDLIB / "json")], pattern="*.py", seq_len=32, kernel_len=8, chunk=4, width=16, n_layers=1,
        batch_size=1, accumulation=1, epochs=4, steps_per_epoch=30, learning_rate=1e-3, cutoffs=[8, 16, 0],
        eval_bytes=64, eval_every=200, checkpoint_every=30, sample_bytes=0, plots=False, out=str(tmp_path / "lm"),
    )  # fmt: skip


def traced(trainer, loss):
    """Rows get made-up losses: loss(row)."""
    finish = trainer.finish_step

    def made_up(running):
        row = finish(running)
        row["loss"] = row["ce"] = loss(row)
        return row

    trainer.finish_step = made_up


def test_the_kick_of_a_raise_is_no_spike(chunk_lm):
    """The documented numbers: 2.86 with 0.7 % noise, and 3.45 after the raise, for 15 steps."""
    noise = random.Random(0)
    kick = {"at": 10**9, "cutoff": 8}

    def loss(row):
        if row["cutoff"] > kick["cutoff"]:
            kick.update(at=row["step"], cutoff=row["cutoff"])
        return (3.45 if 0 <= row["step"] - kick["at"] < 15 else 2.86) * (1 + 0.007 * noise.gauss(0, 1))

    trainer = Trainer(chunk_lm, make_task=ChunkLMTask)
    traced(trainer, loss)
    trainer.train()
    rows = read_metrics(Path(chunk_lm.out) / "metrics.jsonl")
    assert not [r for r in rows if r.get("event") in ("loss_spike", "rollback")]
    assert [r["step"] for r in rows if r.get("event") == "cutoff_raised"] == [60, 120]  # not in the kick
    forgetful, plain = Guards(warmup=0), Guards(warmup=0)
    kicked = [row(s, loss=(3.45 if 60 < s < 76 else 2.86) * (1 + 0.007 * noise.gauss(0, 1))) for s in range(1, 121)]
    assert "loss_spike" in names(plain, kicked)
    assert names(forgetful, kicked[:60]) == []
    forgetful.forget(61)
    assert names(forgetful, kicked[60:]) == []
    assert names(forgetful, [row(s, loss=9.0) for s in range(121, 124)]) == ["loss_spike"]  # and it watches again


def test_a_rollback_does_not_lower_the_cutoff(chunk_lm):
    """A true spike right after a raise goes back to weights of before; the curriculum and the rate go on."""
    trainer = Trainer(dataclasses.replace(chunk_lm, checkpoint_every=59, cutoffs=[8, 0]), make_task=ChunkLMTask)
    high = range(112, 115)
    traced(trainer, lambda row: 9.0 if row["step"] in high else 2.86 + 0.01 * (row["step"] % 3))
    trainer.train()
    rows = read_metrics(Path(chunk_lm.out) / "metrics.jsonl")
    assert [(r["step"], r["event"]) for r in rows if "event" in r] == [
        (60, "cutoff_raised"), (114, "loss_spike"), (114, "rollback"),
    ]  # fmt: skip
    assert "step_00000059" in next(r["message"] for r in rows if r.get("event") == "rollback")  # before the raise
    cutoffs = {r["step"]: r["cutoff"] for r in rows if "cutoff" in r}
    assert [cutoffs[s] for s in (60, 61, 114, 115, 120)] == [8, 33, 33, 33, 33]


def test_a_rollback_leaves_the_controller_and_the_target(config):
    c = dataclasses.replace(
        config, rate_control="bias", rate_gain=0.1, compression_start=[2.0], compression_anneal="plateau"
    )
    trainer = Trainer(c)
    trainer.train()
    saved = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    compression = trainer.task.compression
    compression.stages[0].logit_bias.fill_(1.5)
    compression.notch = 3
    trainer.model.lm_head.weight.data.zero_()
    trainer.state.roll_back(until=trainer.step)
    assert torch.equal(trainer.model.state_dict()["lm_head.weight"], saved["lm_head.weight"])
    assert (compression.stages[0].logit_bias.item(), compression.notch) == (1.5, 3)


def test_planned_restarts_begin_a_new_history():
    s = Schedule("restarts", 100, restart_at=[0, 20, 50], restart_min=[0.1, 0.1, 0.05])
    assert [i for i in range(100) if s.begins(i)] == [20, 50]
    assert not any(Schedule("wsd", 100, restart_at=[0, 20], restart_min=[0.1, 0.1]).begins(i) for i in range(100))


def test_seven_skipped_steps_are_seven_events(config):
    config = dataclasses.replace(config, steps=12, max_bad_steps=10, eval_every=12, checkpoint_every=12)
    trainer = Trainer(config)
    loss = trainer.task.loss

    def poisoned(model, batch, step):
        value, means = loss(model, batch, step)
        return (value * torch.nan if 2 <= step < 9 and model.training else value), means

    trainer.task.loss = poisoned
    said = []
    console = TrainConsole.event
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainConsole, "event", lambda self, text: (said.append(text), console(self, text)))
        trainer.train()
    assert [e["step"] for e in events(config, "non_finite")] == list(range(3, 10))
    assert said == ["step 3: non-finite loss: the step was not taken (1 in a row)"]
    (finding,) = non_finite(read_log(config.out))
    assert any("The trainer skipped 7 updates, the first at step 3" in line for line in finding.evidence)
