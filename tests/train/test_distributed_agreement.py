"""Two processes stop together, and go on from the same checkpoint or not at all."""

import dataclasses
from pathlib import Path

import pytest

from hnet.metrics_log import read_metrics
from hnet.train.checkpoint import latest_checkpoint
from hnet.train.config import TrainConfig

from .conftest import tiny
from .processes import RUN, found, job, run
from .test_resume import equal


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of every run that leaves results, in one pair of processes."""
    folder = tmp_path_factory.mktemp("together")
    base = tiny(folder / "run")
    jobs = []
    for p in ("ddp", "fsdp"):
        c = dataclasses.replace(base, **RUN, parallel=p)
        c = dataclasses.replace(c, steps=50, checkpoint_every=50, eval_every=50, out=str(folder / f"stopped-{p}"))
        jobs.append(job(f"stopped-{p}", c, "train", at={2: "interrupt"}))
    assert run(folder, jobs + agreeing(folder, base)) == [0, 0]
    return folder


def agreeing(folder: Path, base: TrainConfig) -> list[dict]:
    """Directories that only one process sees; and a run killed before its first checkpoint."""
    base = dataclasses.replace(base, steps=4, checkpoint_every=2, out=str(folder / "killed"))
    apart = [str(folder / "node0"), str(folder / "node1")]
    (folder / "killed").mkdir()
    (folder / "killed" / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    local = [f"{out}/checkpoints/step_00000002" for out in apart]
    return [
        job("back", base, "train", at={3: "roll back"}, out_by_process=apart, fails=True),
        job("latest", base, "load", resume="auto", out_by_process=apart, fails=True),
        job("path", base, "load", resume_by_process=local, out_by_process=apart, fails=True),
        job("fresh", base, "train", resume="auto"),
        job("again", base, "load", resume="auto"),
    ]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_interrupt_of_one_process_stops_all_at_the_same_step(ran, parallel):
    for rank in (0, 1):
        assert [r["step"] for r in found(ran, f"stopped-{parallel}", rank)["rows"]] == [1, 2, 3]
    assert latest_checkpoint(ran / f"stopped-{parallel}" / "checkpoints").name == "step_00000003"


def test_an_error_of_one_process_ends_the_others(config, tmp_path):
    codes = run(tmp_path, [job("wrong", config, "train", at={2: "raise"})])
    assert codes[0] != 0
    assert codes[1] == 1


@pytest.mark.parametrize("name", ["back", "latest", "path"])
def test_processes_that_see_different_checkpoints_stop(ran, name):
    for rank in (0, 1):
        error = (ran / f"{name}.{rank}.error").read_text()
        assert error.startswith("RunFailed: the processes see different checkpoints in ")
        assert error.endswith("process 0 sees step_00000002; process 1 sees none")


def test_auto_starts_all_processes_afresh_where_a_run_was_killed_before_its_first_checkpoint(ran):
    folder = ran / "killed"
    assert [r["step"] for r in found(ran, "fresh", 1)["rows"]] == [1, 2, 3, 4]
    assert read_metrics(folder / "abandoned" / "from_step_00000000_1" / "metrics.jsonl")[-1]["step"] == 1
    equal(found(ran, "fresh", 0)["state"], found(ran, "again", 1)["state"])
