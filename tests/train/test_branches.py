"""Going on from an earlier checkpoint: what came later is moved aside, kept, and never seen again by accident."""

import dataclasses
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from hnet.cli.main import main
from hnet.cli.models import checkpoint_of
from hnet.metrics_log import read_metrics
from hnet.train import branches
from hnet.train.branches import set_aside
from hnet.train.checkpoint import latest_checkpoint, list_checkpoints, step_of, verify
from hnet.train.loop import Trainer

from .conftest import tiny


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def steps(log: Path) -> list[int]:
    return [r["step"] for r in read_metrics(log) if "event" not in r]


def evaluating(config, losses, **options) -> Trainer:
    """A trainer whose validation cross entropies are these."""
    trainer = Trainer(config, **options)
    evaluate, wanted = trainer.task.evaluate, iter(losses)
    trainer.task.evaluate = lambda model: evaluate(model) | {"val_ce": next(wanted)}
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """12 steps, a checkpoint every 2 of which 2 are kept, best at 4, samples at 4, 8, 12."""
    c = tiny(tmp_path_factory.mktemp("finished") / "run")
    c = dataclasses.replace(c, steps=12, checkpoint_every=2, keep_checkpoints=2, sample_bytes=4)
    evaluating(c, [5.0, 1.0, 2.0, 3.0]).train()
    assert names(Path(c.out) / "checkpoints") == ["best", "step_00000010", "step_00000012"]
    return c


@pytest.fixture
def run(finished, tmp_path):
    """(config, out) of a copy of it."""
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    return dataclasses.replace(finished, out=str(out)), out


def test_resuming_from_best_keeps_both_branches(run):
    """A new best on the new branch too: marking it once crashed, its folder being pruned as it was written."""
    c, out = run
    old = {n: (out / "checkpoints" / n / "manifest.json").read_text() for n in ("step_00000010", "step_00000012")}
    rows = read_metrics(out / "metrics.jsonl")
    evaluating(c, [0.5, 2.0], resume=str(out / "checkpoints" / "best")).train()
    assert names(out / "checkpoints") == ["best", "step_00000010", "step_00000012"]
    assert step_of(out / "checkpoints" / "best") == 8
    aside = out / "abandoned" / "from_step_00000004_1"
    assert {n: (aside / "checkpoints" / n / "manifest.json").read_text() for n in old} == old
    for path in [*list_checkpoints(out / "checkpoints"), *list_checkpoints(aside / "checkpoints")]:
        verify(path)
    assert names(aside / "samples") == ["step_00000008.txt", "step_00000012.txt"]
    assert read_metrics(aside / "metrics.jsonl") == [r for r in rows if r["step"] > 4]
    assert steps(out / "metrics.jsonl") == list(range(13))
    (event,) = [r for r in read_metrics(out / "metrics.jsonl") if r.get("event") == "abandoned"]
    assert event["step"] == 4
    for part in ("step 4", "step_00000010, step_00000012", "8 rows", str(aside)):
        assert part in event["message"]
    assert checkpoint_of(str(aside)) == str(aside / "checkpoints" / "step_00000012")  # a run directory itself


def test_everything_sees_the_new_branch_alone(run):
    """From the start of the first step on: a kill before the first checkpoint goes on from step 4, not from 12."""
    c, out = run
    trainer = evaluating(c, [], resume=str(out / "checkpoints" / "best"))

    def look():
        assert checkpoint_of(str(out)) == str(out / "checkpoints" / "step_00000004")
        verify(out / "checkpoints" / "step_00000004")
        trainer.state.step = 5
        assert trainer.state.roll_back(until=trainer.step).name == "step_00000004"
        raise KeyboardInterrupt

    trainer.start_step = look
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert Trainer(c, resume="auto").step == 4


def test_a_save_prunes_only_what_is_earlier(run):
    """Also of a trainer that never called `train`, which moves nothing."""
    c, out = run
    trainer = Trainer(c, resume=str(out / "checkpoints" / "best"))
    trainer.train_step()
    path = trainer.save()
    verify(path)
    assert names(out / "checkpoints") == ["best", "step_00000005", "step_00000010", "step_00000012"]
    assert trainer.state.roll_back(until=trainer.step) == path


def test_a_later_best_is_moved_and_an_earlier_one_marked_again(run):
    c, out = run
    c = dataclasses.replace(c, steps=14)
    (out / "checkpoints" / "best").rename(out / "elsewhere")
    trainer = evaluating(c, [0.5], resume=str(out / "checkpoints" / "step_00000012"))
    trainer.train()
    assert step_of(out / "checkpoints" / "best") == 14
    Trainer(dataclasses.replace(c, steps=12), resume=str(out / "checkpoints" / "step_00000012")).train()
    assert names(out / "checkpoints") == ["step_00000012"]  # the best at step 12 was 4, which is gone
    assert names(out / "abandoned" / "from_step_00000012_1" / "checkpoints") == ["best", "step_00000014"]
    assert set_aside(out, 12, best_step=12) is None
    assert step_of(out / "checkpoints" / "best") == 12


def test_a_crash_leaves_rows_that_are_kept_too(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2, "event": "x"}\n{"step": 3}\n{"step": 4}\n{"st')
    (tmp_path / "checkpoints" / ".partial_step_00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".old_best").mkdir()
    (tmp_path / "checkpoints" / ".old_best" / "run.json").write_text('{"step": 1}')
    done = set_aside(tmp_path, 2)
    assert (done.folder.name, done.checkpoints, done.rows) == ("from_step_00000002_1", [], 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2, "event": "x"}\n'
    assert steps(done.folder / "metrics.jsonl") == [3, 4]
    assert names(tmp_path / "checkpoints") == ["best"]  # killed between two renames: the old one is the best there is
    assert set_aside(tmp_path, 2) is None
    log.write_text(log.read_text() + '{"step": 3}\n')
    assert set_aside(tmp_path, 2).folder.name == "from_step_00000002_2"


def test_killed_in_the_middle_of_moving(run, monkeypatch):
    _, out = run
    rename, count = branches.os.rename, iter(range(99))

    def killed(a, b):
        if next(count) == 3:
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(branches.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        set_aside(out, 4)
    monkeypatch.undo()
    assert latest_checkpoint(out / "checkpoints").name == "step_00000012"  # as if it had not begun
    assert steps(out / "metrics.jsonl") == list(range(13))
    set_aside(out, 4)
    assert names(out / "checkpoints") == ["best", "step_00000004"]
    assert steps(out / "metrics.jsonl") == list(range(5))
    kept = [p.name for p in (out / "abandoned").glob("*/checkpoints/*")]
    assert sorted(kept) == ["step_00000010", "step_00000012"]


def test_a_checkpoint_of_another_run_needs_a_directory_of_its_own(run):
    c, out = run
    Trainer(c, resume=str(out / "checkpoints" / "best")).train()
    old = out / "abandoned" / "from_step_00000004_1" / "checkpoints" / "step_00000010"
    with pytest.raises(FileExistsError, match=r"holds a run that .*step_00000010 is no checkpoint of: choose another"):
        Trainer(c, resume=str(old))
    elsewhere = dataclasses.replace(c, out=c.out + "2")
    Trainer(elsewhere, resume=str(old)).train()
    assert steps(Path(elsewhere.out) / "metrics.jsonl") == [11, 12]


def test_advice_at_damage_names_what_is_earlier(run):
    _, out = run
    root = out / "checkpoints"
    for name, wanted in (("step_00000012", "step_00000010"), ("step_00000010", "best")):
        (root / name / "trainer.pt").write_bytes(b"")
        with pytest.raises(ValueError, match="damaged") as e:
            verify(root / name)
        assert str(e.value).endswith(f"The one before it is {root / wanted}: resume with --resume {root / wanted}")
    (root / "best" / "trainer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="No earlier checkpoint is left"):
        verify(root / "best")


# --- --resume auto --------------------------------------------------------------------------------------------------


def test_auto_starts_afresh_where_a_run_was_killed_before_its_first_checkpoint(config):
    trainer = Trainer(config, resume="auto")  # nothing there at all
    start = trainer.start_step

    def killed():
        if trainer.step == 2:
            raise KeyboardInterrupt
        return start()

    trainer.start_step = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    out = Path(config.out)
    assert steps(out / "metrics.jsonl") == [0, 1, 2]
    assert (out / "config.toml").exists()
    Trainer(config, resume="auto").train()
    assert steps(out / "metrics.jsonl") == list(range(9))
    assert steps(out / "abandoned" / "from_step_00000000_1" / "metrics.jsonl") == [0, 1, 2]
    assert Trainer(config, resume="auto").step == 8


def test_auto_reads_the_config_of_the_run_there(run):
    """12 steps of 12 are done; the tiny model and its data come from RUN/config.toml."""
    _, out = run
    result = CliRunner().invoke(main, ["train", "--resume", "auto", "--out", str(out), "--steps", "13"])
    assert result.exit_code == 0, result.output
    assert steps(out / "metrics.jsonl") == list(range(14))


# --- Weights & Biases -----------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """What was asked of a stand-in for the client: the arguments of every `init`, with the steps logged to it."""
    started = []

    def init(**arguments):
        logged = []
        started.append((arguments, logged))
        return types.SimpleNamespace(log=lambda numbers, step: logged.append(step), finish=lambda: None)

    module = types.ModuleType("wandb")
    module.init, module.__spec__ = init, types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return started


def test_wandb_is_one_run_in_all_starts_and_another_on_another_branch(config, wandb):
    c = dataclasses.replace(config, wandb="project")
    Trainer(c).train()
    Trainer(dataclasses.replace(c, steps=12), resume=True).train()
    Trainer(c, resume=str(Path(c.out) / "checkpoints" / "step_00000008")).train()
    ids = [a["id"] for a, _ in wandb]
    assert ids[0] == ids[1] != ids[2]
    assert all(ids)
    assert [a["resume"] for a, _ in wandb] == ["allow"] * 3
    assert [logged for _, logged in wandb][1] == [9, 10, 11, 12]
    aside = Path(c.out) / "abandoned" / "from_step_00000008_1"
    assert (aside / "wandb_id").read_text().strip() == ids[0]
    assert json.loads((aside / "metrics.jsonl").read_text().splitlines()[0])["step"] == 9
