"""A table updated where it was read: the run is the one of a table updated whole, and no look at it changes a bit."""

import dataclasses
from pathlib import Path

import pytest
import torch

from hnet.train.checkpoint import latest_checkpoint, load_weights
from hnet.train.loop import Trainer

from .test_resume import run_with_a_crash, same_runs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(config):
    return dataclasses.replace(
        config, preset="", arch="c1 T1", d_model=[32, 32], ngrams=[2, 4], ngram_rows=500, ngram_dropout=0.3,
        dtype="fp32", schedule="constant",
    )  # fmt: skip


def dense(config, out):
    """Updated whole, as on a GPU"""
    trainer = Trainer(dataclasses.replace(config, out=config.out + out))
    adam = trainer.optimizers.parts[0]
    assert adam.table is not None
    adam.table = trainer.model.ngrams.before_reading = None
    return trainer


def table_of(folder):
    return load_weights(latest_checkpoint(Path(folder) / "checkpoints"))["ngrams.weight"]


@pytest.mark.parametrize("change", [{}, {"accumulation": 2, "clipping": "adaptive", "clip_window": 4}])
def test_it_is_the_run_of_a_table_updated_whole(config, change):
    config = dataclasses.replace(config, **change)
    by_row = Trainer(config)
    by_row.train()
    whole = dense(config, "2")
    whole.train()
    mine = table_of(config.out)
    assert mine.any(1).sum() > 100
    assert not mine.any(1).all()
    for (name, a), b in zip(by_row.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4), name


def test_evaluations_and_averages_change_nothing(config):
    Trainer(config).train()
    often = dataclasses.replace(config, out=config.out + "2", eval_every=1, checkpoint_every=1, weight_ema=0.9)
    Trainer(often).train()
    a, b = (load_weights(latest_checkpoint(Path(c.out) / "checkpoints")) for c in (config, often))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_is_exact(config):
    config = dataclasses.replace(config, async_checkpoints=True, accumulation=2, weight_ema=0.9)
    Trainer(config).train()
    crashed = dataclasses.replace(config, out=config.out + "2")
    run_with_a_crash(crashed, at=6)
    same_runs(Path(config.out), Path(crashed.out))


def test_checkpoints_go_from_one_to_the_other(config, monkeypatch):
    """A run of a table updated by row goes on with one updated whole, as on a GPU, and the other way round."""
    config = dataclasses.replace(config, steps=8)
    Trainer(config).train()
    for out, first, second in (("2", True, False), ("3", False, True)):
        half = dataclasses.replace(config, out=config.out + out)
        for steps, by_row in ((4, first), (8, second)):
            with monkeypatch.context() as m:
                if not by_row:
                    m.setattr("hnet.train.optim.wanted", lambda *args: False)
                trainer = Trainer(half, resume=steps == 8)
                assert (trainer.optimizers.table is not None) == by_row
                while trainer.step < steps:
                    trainer.train_step()
                trainer.state.save()
        assert torch.allclose(table_of(config.out), table_of(half.out), atol=1e-6, rtol=1e-4)


def test_rolling_back(config):
    trainer = Trainer(config)
    trainer.train()
    before = table_of(config.out)
    for _ in range(3):
        trainer.train_step()
    assert not torch.equal(trainer.model.state_dict()["ngrams.weight"], before)
    trainer.state.roll_back(trainer.step)
    assert torch.equal(trainer.model.state_dict()["ngrams.weight"], before)


def test_tables_that_decay_are_updated_whole(config):
    trainer = Trainer(dataclasses.replace(config, decay_embeddings=True))
    assert trainer.optimizers.table is None
    assert trainer.train_step()["grad_norm"] > 0
