"""A sweep of real processes, killed with SIGKILL: it ends with the numbers of the runs alone."""

import os
import signal
import time
from pathlib import Path

import pytest

from hnet.metrics_log import read_metrics
from hnet.sweep.process import locked
from hnet.train.loop import Trainer

from ..train.conftest import one_thread  # noqa: F401 (a fixture)

pytest.importorskip("optuna")  # a borrowed GPU machine may lack it
from hnet.sweep.search import Search
from hnet.sweep.study import open_study


def wait_for_step(folder: Path, step: int) -> None:
    until = time.monotonic() + 60
    log = folder / "metrics.jsonl"
    while not log.exists() or not any(r["step"] >= step for r in read_metrics(log)):
        assert time.monotonic() < until
        time.sleep(0.01)


def begin(sweep) -> int:
    """The sweep in a process of its own, which has all imports already."""
    if child := os.fork():
        return child
    try:
        with locked(sweep.folder) as lock:
            Search(sweep, open_study(sweep), lock).run()
    finally:
        os._exit(0)


def children(process: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_kill_9(make, monkeypatch):
    monkeypatch.setattr("hnet.sweep.search.LOOK_EVERY", 0.05)
    sweep = make("seed = [1]", 'sampler = "grid"\nthreads = 1').spelled_out()
    sweep.values |= {"steps": 60, "eval_every": 10, "checkpoint_every": 20}
    folder = sweep.folder / "trials" / "0000"

    search = begin(sweep)
    wait_for_step(folder, 22)
    os.kill(search, signal.SIGKILL)  # its worker saves and stops, and holds the lock until then
    os.waitpid(search, 0)

    search = begin(sweep)
    wait_for_step(folder, 42)
    workers = children(search)
    os.kill(search, signal.SIGKILL)
    for w in workers:  # at once: nothing is saved
        os.kill(w, signal.SIGKILL)
    os.waitpid(search, 0)

    with locked(sweep.folder) as lock:
        study = open_study(sweep)
        assert [t.state.name for t in study.trials] == ["RUNNING"]
        assert Search(sweep, study, lock).run()
    (trial,) = study.trials
    rows = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(61))
    restarts = [p.name for p in (folder / "abandoned").iterdir()]
    assert restarts
    assert all(int(name.split("_")[2]) >= 22 for name in restarts)  # never from the start again
    alone = sweep.run_of(trial.params, sweep.folder.parent / "alone")
    assert trial.value == pytest.approx(Trainer(alone).train()["val_bpb"], abs=1e-6)
