"""Sweeps whose workers are made up: what a trial reports is a function of its configuration."""

import json
from pathlib import Path

import pytest

from hnet.config.keys import read_toml
from hnet.sweep.config import read_sweep
from hnet.sweep.process import locked
from hnet.train.config import TrainConfig

from ..train.conftest import STDLIB

RUN = f"""
data = ["{STDLIB / "email"}"]
pattern = "*.py"
preset = "tiny"
device = "cpu"
compression = [3.0]
steps = 8
seq_len = 128
batch_bytes = 512
warmup_steps = 2
eval_every = 4
eval_bytes = 1024
checkpoint_every = 4
"""


@pytest.fixture(autouse=True)
def fast_database():
    """Without waiting for the disk, which only a loss of power would need."""
    sqlalchemy = pytest.importorskip("sqlalchemy")  # of Optuna

    def connected(connection, record):
        connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", connected)
    yield
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", connected)


def row(step, bpb, chunk=3.0, **more):
    return {
        "step": step, "time": step / 10, "val_bpb": bpb, "val_ce": bpb * 0.7, "stage0/target": 3.0,
        "stage0/val_bytes_per_chunk": chunk, **more,
    }  # fmt: skip


class Worker:
    """Writes a row at every poll; stopped, it ends without an outcome."""

    def __init__(self, folder, rows, outcome):
        self.folder, self.rows, self.outcome, self.stopped = folder, list(rows), outcome, False

    def poll(self):
        if self.stopped:
            return 0
        if self.rows:
            with (self.folder / "metrics.jsonl").open("a") as f:
                f.write(json.dumps(self.rows.pop(0)) + "\n")
            return None
        if isinstance(self.outcome, dict):
            (self.folder / "outcome.json").write_text(json.dumps(self.outcome))
            return 0
        return self.outcome

    def stop(self):
        self.stopped = True

    kill = stop


def launcher(script, begun=None):
    """script(config): rows, or (rows, outcome), where the outcome is outcome.json's content or an exit code."""

    def launch(folder, threads, lock):
        config = TrainConfig(**read_toml(folder / "config.toml", TrainConfig))
        if begun is not None:
            begun.append(int(folder.name))
        found = script(config)
        rows, outcome = found if isinstance(found, tuple) else (found, {"finished": config.steps})
        return Worker(folder, rows, outcome)

    return launch


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(parameters, top="", tables="", run=""): a sweep read from a file, not validated, in tmp_path/out."""
    monkeypatch.setattr("hnet.sweep.search.LOOK_EVERY", 0.0)

    def make(parameters, top="", tables="", run="", name="sweep.toml"):
        path = tmp_path / name
        path.write_text(f'out = "{tmp_path / "out"}"\n{top}\n[run]\n{RUN}{run}\n[parameters]\n{parameters}\n{tables}\n')
        return read_sweep(path)

    return make


def search(sweep, script, begun=None, said=None, launch=None):
    """Runs a sweep to its end: (study, whether all trials are over)."""
    from hnet.sweep.search import Search
    from hnet.sweep.study import check_folder, open_study

    check_folder(sweep.spelled_out())
    with locked(Path(sweep.out)) as lock:
        study = open_study(sweep)
        say = said.append if said is not None else lambda line: None
        return study, Search(sweep, study, lock, launch=launch or launcher(script, begun), say=say).run()
