"""On a GPU a step's numbers arrive one step later. Here the delay is forced on a CPU: facts stay the same facts."""

import dataclasses
from pathlib import Path

import pytest
import torch

from hnet.chunk_lm.task import ChunkLMTask
from hnet.metrics_log import read_metrics
from hnet.train.loop import Trainer

from ..chunk_lm.test_curriculum import config as chunk_lm  # noqa: F401 (a fixture)
from .test_resume import NOT_EXACT, same_runs


class Delayed(Trainer):
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.delay = 1


def log(config):
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    steps = {r["step"]: {k: v for k, v in r.items() if k not in NOT_EXACT} for r in rows if "event" not in r}
    return steps, [(r["step"], r["event"]) for r in rows if "event" in r]


def both(config, make_task=None, meddle=lambda trainer: None):
    """The logs of two runs of it, without and with the delay."""
    out = []
    for cls in (Trainer, Delayed):
        c = dataclasses.replace(config, out=f"{config.out}_{cls.__name__}")
        trainer = cls(c, make_task=make_task)
        meddle(trainer)
        trainer.train()
        out.append(log(c))
    return out


def trained_at(trainer):
    """What the model really had in every training step: {step: cutoff}."""
    seen, loss = {}, trainer.task.loss

    def noted(model, batch, step):
        if model.training:
            seen[step + 1] = trainer.model.cutoff
        return loss(model, batch, step)

    trainer.task.loss = noted
    return seen


def test_the_curriculum_by_epochs_is_the_same_run(chunk_lm):  # noqa: F811
    """Raises, their restarts and every number: an epoch's end is waited for."""
    now, late = both(chunk_lm, ChunkLMTask)
    assert now == late
    assert [s for s, name in late[1] if name == "cutoff_raised"] == [8, 12]
    assert "lr_not_at_peak" not in dict(late[1]).values()


def test_a_raise_in_mid_epoch_comes_a_step_later_and_whole(chunk_lm):  # noqa: F811
    c = dataclasses.replace(
        chunk_lm, plateau_check="step", plateau_window=5, min_epoch_before_raise=1, dropout=0.0, checkpoint_every=12
    )
    seen = {}
    now, late = both(c, ChunkLMTask, lambda t: seen.update({type(t): trained_at(t)}))
    for (rows, events), cls in ((now, Trainer), (late, Delayed)):
        assert {s: r["cutoff"] for s, r in rows.items() if s} == seen[cls]
        first = next(s for s in range(2, 25) if rows[s]["cutoff"] > rows[s - 1]["cutoff"])
        assert rows[first]["lr"] == pytest.approx(c.learning_rate)
        assert rows[first + 1]["lr"] < c.learning_rate
        assert (first - 1, "cutoff_raised") == events[0]
        assert "lr_not_at_peak" not in [name for _, name in events]
    assert now[1][0] == (5, "cutoff_raised")
    assert late[1][0] == (6, "cutoff_raised")
    assert [now[0][s] == late[0][s] for s in range(8)] == [True] * 6 + [False, False]  # step 6: the old cutoff still


@pytest.mark.parametrize("at", [5, 6])
def test_ctrl_c_loses_no_answer(chunk_lm, at):  # noqa: F811
    """Stopped with a row finished and not answered (step 6 plateaus), and resumed: the run that went straight on."""
    c = dataclasses.replace(
        chunk_lm, plateau_check="step", plateau_window=6, min_epoch_before_raise=1, checkpoint_every=24, eval_every=24
    )
    Delayed(c, make_task=ChunkLMTask).train()
    again = dataclasses.replace(c, out=c.out + "2", restart_at=[0.0], restart_min=[0.1])
    trainer = Delayed(again, make_task=ChunkLMTask)
    start = trainer.start_step

    def interrupted():
        trainer.interrupted = trainer.step + 1 == at
        return start()

    trainer.start_step = interrupted
    trainer.train()
    assert trainer.step == at + 1  # the step that was on its way is in the checkpoint
    assert not trainer.running
    assert [r["step"] for r in trainer.unanswered.rows] == [at + 1]
    assert max(log(again)[0]) == at + 1
    Delayed(again, make_task=ChunkLMTask, resume=True).train()
    same_runs(Path(c.out), Path(again.out))


def test_guards_and_evaluations_of_an_h_net(config):
    """A skipped step is reported one step later; what an evaluation decides is decided at the same step."""
    c = dataclasses.replace(
        config, steps=12, eval_every=2, checkpoint_every=12, warmup_steps=0, schedule="plateau", plateau_patience=0,
        plateau_cooldown=0, plateau_min_gain=0.9, compression=[4.0], compression_start=[2.0], compression_notches=2,
        compression_anneal="plateau",
    )  # fmt: skip

    def poison(trainer):
        loss = trainer.task.loss

        def poisoned(model, batch, step):
            value, means = loss(model, batch, step)
            return (value * torch.nan if step == 4 and model.training else value), means

        trainer.task.loss = poisoned

    now, late = both(c, meddle=poison)
    assert now[0] == late[0]
    assert [e for e in now[1] if e[1] != "non_finite"] == [e for e in late[1] if e[1] != "non_finite"]
    assert (5, "non_finite") in now[1]
    assert (6, "non_finite") in late[1]
    targets = [late[0][s]["stage0/target"] for s in range(1, 13)]
    assert targets == [2.0] * 4 + [3.0] * 4 + [4.0] * 4  # evaluations 2 and 4; 1 and 3 had nothing to compare with
