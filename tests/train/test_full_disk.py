"""A full disk: a real one where that can be mounted, and files that fail as theirs do."""

import dataclasses
import errno
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from hnet.cli.main import main
from hnet.disk import full_disk, replacing
from hnet.metrics_log import read_metrics
from hnet.train.checkpoint import NotWritten, latest_checkpoint, list_checkpoints, mark_best, verify
from hnet.train.loop import Trainer
from hnet.train.metrics import MetricsFile

from .conftest import fill, make_room, tiny
from .processes import found, job, run
from .test_guards import before_step, events
from .test_resume import equal

FULL = OSError(errno.ENOSPC, "No space left on device")


class Limited:
    """A file that takes so many bytes more: the last write that begins within them ends short, the next raises."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        data = memoryview(data).cast("B")[: self.room]
        if not len(data):
            raise FULL
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def nested(outer: BaseException, inner: BaseException) -> BaseException:
    outer.__context__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FULL, errno.ENOSPC),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), errno.ENOSPC),
        (nested(RuntimeError("unexpected pos 5 vs 4"), OSError(errno.EDQUOT, "")), errno.EDQUOT),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), errno.EDQUOT),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]), errno.ENOSPC),
        (CheckpointException("", {0: (nested(RuntimeError("unexpected pos 5 vs 4"), FULL), None)}), errno.ENOSPC),
        (nested(RuntimeError("unexpected pos 5 vs 4"), OSError(errno.EIO, "")), 0),
        (OSError(errno.EACCES, "Permission denied"), 0),
        (RuntimeError("CUDA error"), 0),
        (SafetensorError("I/O error: Input/output error (os error 5)"), 0),
    ],
)
def test_what_lies_under_an_error(error, code):
    assert full_disk(error) == code


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def write():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise FULL

    with pytest.raises(OSError, match="No space"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_torch_save_into_a_file_that_fills_up(config, monkeypatch):
    """What it raises is a RuntimeError; the run goes on to its last checkpoint."""
    trainer, save = Trainer(config), torch.save
    raised = []

    def limited(state, file):
        try:
            save(state, Limited(file, 1000))
        except Exception as e:
            raised.append(type(e))
            raise

    before_step(trainer, 2, lambda: monkeypatch.setattr("hnet.train.distributed.torch.save", limited))
    before_step(trainer, 6, lambda: monkeypatch.setattr("hnet.train.distributed.torch.save", save))
    trainer.train()
    assert raised == [RuntimeError]
    (event,) = events(config, "disk_full")
    assert event["step"] == 4
    root, said = Path(config.out) / "checkpoints", "checkpoint of step 4 not written: No space left on device"
    assert event["message"] == f"{said}; there is none before it ({root})"
    assert sorted(p.name for p in root.iterdir()) == ["best", "step_00000008"]
    verify(root / "step_00000008")


def test_a_background_save_that_fails_costs_neither_the_next_nor_a_rollback(config, monkeypatch):
    config = dataclasses.replace(config, steps=12, async_checkpoints=True)
    trainer, save = Trainer(config), torch.save

    def full(*_):
        raise FULL

    def roll_back(until=trainer.step):
        assert trainer.state.roll_back(until=trainer.step).name == "step_00000004"

    before_step(trainer, 6, lambda: monkeypatch.setattr("hnet.train.distributed.torch.save", full))
    before_step(trainer, 9, roll_back)
    before_step(trainer, 10, lambda: monkeypatch.setattr("hnet.train.distributed.torch.save", save))
    trainer.train()
    (event,) = events(config, "disk_full")
    assert "checkpoint of step 8 not written" in event["message"]
    assert "the one before it, step_00000004, is whole" in event["message"]
    assert [p.name for p in list_checkpoints(Path(config.out) / "checkpoints")] == ["step_00000004", "step_00000012"]


def test_metrics_wait_for_room(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    assert metrics.write({"step": 1})
    file = metrics.file
    metrics.file = Limited(file, 8)  # half of the next line
    assert not metrics.write({"step": 2})
    assert not metrics.write({"step": 3})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n'
    metrics.file = file
    assert metrics.write({"step": 4})
    metrics.close()
    assert [r["step"] for r in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3, 4]


def test_best_that_cannot_be_linked_leaves_the_old_one(config, monkeypatch):
    Trainer(config).train()
    root = Path(config.out) / "checkpoints"
    before = (root / "best" / "manifest.json").read_text()

    def full(*_):
        raise FULL

    monkeypatch.setattr("hnet.train.checkpoint._link", full)
    with pytest.raises(OSError, match="No space left"):  # shutil.Error, with all files in one text
        mark_best(root / "step_00000004")
    assert (root / "best" / "manifest.json").read_text() == before
    assert not list(root.glob(".*"))


# --- on a real one --------------------------------------------------------------------------------------------------


def test_wherever_the_disk_ends_a_save_leaves_what_was_there(config, small_disk):
    """The end of the disk is put into every file of a checkpoint in turn."""
    trainer = Trainer(dataclasses.replace(config, out=str(small_disk / "run"), weight_ema=0.9))
    trainer.train_step()
    first = trainer.save()
    size = sum(p.stat().st_size for p in first.iterdir())
    trainer.train_step()
    whole = []
    for left in range(0, size, max(size // 25, 4096)):
        fill(small_disk, left)
        with pytest.raises(NotWritten, match="of step 2 not written: No space left on device; the one before it"):
            trainer.save()
        assert [p.name for p in trainer.state.root.iterdir()] == ["step_00000001"]
        verify(first)
        whole.append(left)
    assert len(whole) > 10
    make_room(small_disk)
    verify(trainer.save())


def test_a_run_goes_on_and_catches_up(config, small_disk):
    """Full from step 3 to 7: a checkpoint, two samples and the rows between do not fit; the rows come when they do."""
    out = small_disk / "run"
    config = dataclasses.replace(config, out=str(out), sample_bytes=4, eval_every=2, steps=10, plots=True)
    trainer = Trainer(config)
    before_step(trainer, 3, lambda: fill(small_disk))
    before_step(trainer, 7, lambda: make_room(small_disk))
    trainer.train()
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl") if "event" not in r] == list(range(11))
    said = " | ".join(e["message"] for e in events(config, "disk_full"))
    for what in ("rows wait", "sample of step 4", "sample of step 6", "checkpoint of step 4 not written"):
        assert what in said
    assert sorted(p.name for p in (out / "samples").iterdir()) == [f"step_{s:08d}.txt" for s in (2, 8, 10)]
    assert latest_checkpoint(out / "checkpoints").name == "step_00000010"
    assert Trainer(config, resume=True).step == 10


def test_the_last_checkpoint_is_not_optional(config, small_disk):
    out = small_disk / "run"
    config = dataclasses.replace(config, out=str(out), plots=True)
    trainer = Trainer(config)
    before_step(trainer, 6, lambda: fill(small_disk))
    with pytest.raises(NotWritten, match="checkpoint of step 8 not written.*before it, step_00000004, is whole"):
        trainer.train()
    assert [p.name for p in list_checkpoints(out / "checkpoints")] == ["step_00000004"]
    assert (out / "metrics.jsonl").read_bytes().endswith(b"}\n")
    steps = [r["step"] for r in read_metrics(out / "metrics.jsonl")]
    assert steps[:7] == list(range(7))
    make_room(small_disk)
    assert Trainer(config, resume=True).step == 4


@pytest.mark.parametrize("room", [0, 200_000])
def test_the_command_ends_with_one_line(config, small_disk, room):
    """No room at all, for config.toml neither; and room for all but a checkpoint."""
    out = small_disk / "run"
    path = small_disk.parent / "config.toml"
    path.write_text(dataclasses.replace(config, out=str(out)).to_toml())
    fill(small_disk, room)
    result = CliRunner().invoke(main, ["train", str(path)])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "No space left on device" in line
    assert str(out) in line
    assert not list(out.rglob(".partial*"))
    assert list_checkpoints(out / "checkpoints") == []


def test_a_full_disk_costs_a_checkpoint_on_all_processes(tmp_path, small_disk):
    """Once where all write (no room at all), once where one does (room for the shards alone); then the last save."""
    base = dataclasses.replace(tiny(tmp_path), parallel="fsdp", weight_ema=0.9, steps=4, checkpoint_every=2)
    jobs = []
    for left in (0, 3 << 20):
        c = dataclasses.replace(base, out=str(small_disk / f"run{left}"))
        at = {1: "fill", 3: "make room"}
        jobs.append(job(f"goes-on{left}", c, "train", at=at, disk=str(small_disk), left=left))
    c = dataclasses.replace(base, out=str(small_disk / "last"))
    jobs.append(job("last", c, "train", at={3: "fill"}, disk=str(small_disk), left=3 << 20, fails=True))
    assert run(tmp_path, jobs) == [0, 0]
    for left in (0, 3 << 20):
        root = small_disk / f"run{left}" / "checkpoints"
        assert sorted(p.name for p in root.iterdir()) == ["best", "step_00000004"]
        verify(root / "step_00000004")
        rows = read_metrics(root.parent / "metrics.jsonl")
        assert [r["step"] for r in rows if "event" not in r] == list(range(5))
        assert "checkpoint of step 2 not written" in next(r for r in rows if r.get("event") == "disk_full")["message"]
        equal(*(found(tmp_path, f"goes-on{left}", rank)["state"] for rank in (0, 1)))
    assert [p.name for p in (small_disk / "last" / "checkpoints").iterdir()] == ["step_00000002"]
    assert "NotWritten: checkpoint of step 4 not written" in (tmp_path / "last.0.error").read_text()
