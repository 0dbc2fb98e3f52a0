"""Trials begun, told, pruned, repeated and taken up again, with made-up workers; one sweep that really trains."""

import json
import os
import re
import signal
from io import StringIO
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

pytest.importorskip("optuna")  # a borrowed GPU machine may lack it

import optuna
from optuna.storages import RDBStorage
from rich.console import Console

from hnet.cli import main
from hnet.config.keys import read_toml
from hnet.errors import PathTaken
from hnet.sweep import worker
from hnet.sweep.console import table
from hnet.sweep.keys import PRUNERS
from hnet.sweep.process import Tail, locked
from hnet.sweep.report import write_report
from hnet.sweep.study import METRICS, REASON, SAME, make_pruner, make_sampler, real_trials
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

from .conftest import Worker, launcher, row, search


class Killed(BaseException):
    pass


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr("hnet.sweep.report.plot_sweep", lambda *args, **options: [])


def rows(shown):
    """The first cells of what a terminal of 80 columns shows."""
    file = StringIO()
    Console(file=file, width=80).print(shown)
    return [line.split()[:5] for line in file.getvalue().splitlines() if re.match(r"\s*\d", line)][1:]


def states(study):
    return [t.state.name for t in study.trials]


@pytest.mark.usefixtures("no_plots")
def test_values_and_the_best(make):
    """objective by hand: |lr - 3| + 0.5 |chunk / 3 - 1|"""
    sweep = make(
        "learning_rate = [1, 2, 4]\ncompression = [3, 6]",
        'sampler = "grid"\nobjective = "val_bpb + 0.5 * abs(val_bytes_per_chunk / target - 1)"',
    )
    study, over = search(
        sweep, lambda c: [row(4, 9.0), row(8, abs(c.learning_rate - 3), chunk=c.compression[0])]
    )  # fmt: skip
    assert over
    assert [t.value for t in study.trials] == [2.0, 2.5, 1.0, 1.5, 1.0, 1.5]
    assert states(study) == ["COMPLETE"] * 6
    write_report(sweep, study)
    best = TrainConfig(**read_toml(sweep.folder / "best.toml", TrainConfig)).validate()
    assert (best.learning_rate, best.compression, best.out) == (2.0, [3.0], str(sweep.folder / "best"))
    assert best.plots  # the quiet of the trials is not the winner's
    text = (sweep.folder / "report.md").read_text()
    assert "**Best: trial 2**, objective 1, 1.0000 held-out bits per byte, 3.00 bytes a chunk" in text
    assert "Of 6 trials: 6 complete, 0 pruned, 0 failed, 0 unfinished, 0 not begun" in text


def test_at_the_best_evaluation_and_upwards(make):
    sweep = make("seed = [0]", 'sampler = "grid"\ndirection = "maximize"\nat = "best"\nobjective = "step - val_bpb"')
    study, _ = search(sweep, lambda c: [row(4, 3.0), row(6, 1.0), row(8, 2.0)])
    assert study.trials[0].value == 5.0
    assert study.trials[0].user_attrs[METRICS]["step"] == 6


@pytest.mark.usefixtures("no_plots")
def test_what_fails_is_recorded_and_ends_nothing(make):
    sweep = make("seed = [0, 1, 2, 3]\nd_model = [[64, 96], []]", 'sampler = "grid"')  # d_model without arch is refused

    def script(c):
        ends = {0: {"failed": "diverged"}, 1: -9, 2: {"finished": 8}, 3: {"finished": 8}}
        rows = [row(8, float("nan") if c.seed == 2 else 1.0)]
        return [{**r, "val_bpb": None if c.seed == 2 else 1.0} for r in rows], ends[c.seed]

    begun, said = [], []
    study, over = search(sweep, script, begun, said)
    assert over
    reasons = [t.user_attrs.get(REASON, "") for t in study.trials]
    assert states(study) == ["FAIL"] * 7 + ["COMPLETE"]
    assert all("d_model must be left out unless arch is given" in r for r in reasons[::2])
    assert reasons[1] == "diverged"
    assert reasons[3] == "killed by SIGKILL (out of memory?)"
    assert reasons[5] == "objective 'val_bpb': val_bpb is not a number in step 8"
    assert begun == [1, 3, 3, 5, 7]  # killed once, it was tried again
    assert any("goes on from its checkpoint" in line for line in said)
    write_report(sweep, study)
    assert "| 0001 | 0 | none | diverged |" in (sweep.folder / "report.md").read_text()


def test_killed_anywhere_it_repeats_nothing(make, monkeypatch):
    """Killed at every call into the database in turn: each trial trains to its end once, under the same point."""
    parameters, top = (
        "learning_rate = {low = 1, high = 2}\ndropout = {low = 0, high = 0.5}",
        'sampler = "random"\ntrials = 3',
    )
    straight, _ = search(make(parameters, top), lambda c: [row(8, c.learning_rate)])
    wanted = [(t.params, t.value) for t in straight.trials]
    sweep = make(parameters, top + "\nworkers = 2")
    sweep.out += "2"
    calls = [0]  # that are let through; below 0 all are

    def mortal(whole):
        def call(*args, **kwargs):
            calls[0] -= 1
            if calls[0] == -1:
                raise Killed
            return whole(*args, **kwargs)

        return call

    writes = ("create_new_trial", "set_trial_param", "set_trial_user_attr", "set_trial_intermediate_value")
    for name in (*writes, "set_trial_state_values", "set_study_user_attr"):
        monkeypatch.setattr(RDBStorage, name, mortal(getattr(RDBStorage, name)))
    ended, kills, study = [], 0, None

    def script(c):
        ended.append(c.out)
        return [row(8, c.learning_rate)]

    while study is None:
        calls[0] = 1 + kills % 4
        try:
            study, over = search(sweep, script)
        except Killed:
            kills += 1
            assert kills < 60
    assert over
    assert kills > 5
    assert [(t.params, t.value) for t in study.trials] == wanted
    assert len(list((sweep.folder / "trials").iterdir())) == 3
    finished = [d for d in (sweep.folder / "trials").iterdir() if (d / "outcome.json").exists()]
    assert len(finished) == 3
    begun = len(ended)
    search(sweep, script)  # all over: nothing is begun
    assert len(ended) == begun


def test_what_ended_untold_is_told_without_training(make):
    sweep = make("seed = [0, 1]", 'sampler = "grid"')

    def launch(folder, threads, lock):
        w = launcher(lambda c: [row(8, 1.0 + c.seed)])(folder, threads, lock)
        while w.poll() is None:
            pass
        raise Killed  # between its end and the telling

    with pytest.raises(Killed):
        search(sweep, None, launch=launch)
    begun = []
    study, _ = search(sweep, lambda c: [row(8, 1.0 + c.seed)], begun)
    assert begun == [1]
    assert [t.value for t in study.trials] == [1.0, 2.0]


def test_stopped_it_goes_on(make):
    sweep = make("seed = [0, 1, 2]", 'sampler = "grid"\nworkers = 2')
    begun = []
    launch = launcher(lambda c: [row(4, 2.0), row(8, 1.0)], begun)

    def interrupted(folder, threads, lock):
        if len(begun) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return launch(folder, threads, lock)

    study, over = search(sweep, None, launch=interrupted)
    assert not over
    assert states(study) == ["RUNNING", "RUNNING"]
    study, over = search(sweep, None, launch=launch)
    assert over
    assert begun == [0, 1, 0, 1, 2]
    assert states(study) == ["COMPLETE"] * 3


def test_more_trials_may_be_asked_for(make):
    parameters = "learning_rate = {low = 1, high = 2}"
    first, _ = search(make(parameters, 'trials = 2\nsampler = "random"'), lambda c: [row(8, c.learning_rate)])
    points = [t.params for t in first.trials]
    begun = []
    more, _ = search(make(parameters, 'trials = 4\nsampler = "random"'), lambda c: [row(8, c.learning_rate)], begun)
    assert begun == [2, 3]
    assert [t.params for t in more.trials][:2] == points
    assert len({t.params["learning_rate"] for t in more.trials}) == 4


def test_a_point_is_tried_once(make):
    sweep = make("seed = {low = 0, high = 2}\ncompression = [2, 3]", 'trials = 10\nsampler = "random"')
    begun = []
    study, over = search(sweep, lambda c: [row(8, 1.0 + c.seed)], begun)
    assert over
    assert sweep.wanted == len(begun) == len(real_trials(study)) == 6
    repeated = [t for t in study.trials if SAME in t.user_attrs]
    assert repeated
    assert all(t.value == study.trials[t.user_attrs[SAME]].value for t in repeated)


@pytest.mark.usefixtures("no_plots")
def test_pruned_by_the_median(make):
    """Of trials with 3, 2, 1, 4 at step 4, the median pruner lets 1 go on after two, and stops 4."""
    sweep = make("seed = [3, 2, 1, 4]", 'sampler = "grid"\npruner = "median"', "[pruner_options]\nn_startup_trials = 2")
    study, _ = search(sweep, lambda c: [row(4, c.seed), row(6, c.seed), row(8, c.seed - 0.5)])
    assert states(study) == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED"]
    assert [t.value for t in study.trials] == [2.5, 1.5, 0.5, 4.0]
    assert study.trials[3].user_attrs[METRICS]["step"] == 4
    assert rows(table(SimpleNamespace(sweep=sweep, study=study, active=[]), 3)) == [
        ["2", "best", "1", "8", "0.5000"], ["1", "complete", "2", "8", "1.5000"], ["0", "complete", "3", "8", "2.5000"],
    ]  # fmt: skip
    assert rows(table(SimpleNamespace(sweep=sweep, study=study, active=[]), 9))[3] == [
        "3",
        "pruned",
        "4",
        "4",
        "4.0000",
    ]
    write_report(sweep, study)
    assert "## Pruned" in (sweep.folder / "report.md").read_text()


def test_samplers_and_pruners_are_optunas(make):
    kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    for name, kind in kinds.items():
        assert type(make_sampler(make("seed = [0]", f'sampler = "{name}"'), 3)) is kind
    given = {"percentile": "percentile = 25.0", "patient": "patience = 2", "threshold": "upper = 9.0"}
    for name in PRUNERS:
        options = f"[pruner_options]\n{given.get(name, '')}"
        made = make_pruner(make("seed = [0]", f'pruner = "{name}"', options))
        assert type(made).__name__.lower() == name.replace("none", "nop").replace("_", "") + "pruner"


def test_of_another_sweep(make, tmp_path):
    search(make("seed = [0]", 'sampler = "grid"'), lambda c: [row(8, 1.0)])
    for parameters, run, says in [
        ("seed = [0, 1]", "", r"parameters.seed was .* there and is .* now"),
        ("seed = [0]", "dropout = 0.1", "run.dropout was nothing there and is 0.1 now"),
    ]:
        with pytest.raises(PathTaken, match=says):
            search(make(parameters, 'sampler = "grid"', run=run), None)
    other = make("seed = [0]")
    other.out = str(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(PathTaken, match=r"holds thesis.tex and no sweep"):
        search(other, None)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_two_at_once(tmp_path):
    with locked(tmp_path), pytest.raises(PathTaken, match="another sweep"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_rows_as_they_come(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.rows() == []
    path.write_text('{"step": 1}\n{"st')
    assert tail.rows() == [{"step": 1}]
    assert tail.rows() == []
    with path.open("a") as f:
        f.write('ep": 2}\n')
    assert tail.rows() == [{"step": 2}]
    (tmp_path / "new").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "new").rename(path)
    assert tail.rows() == [{"step": 1}, {"step": 2}]


def really(folder, threads, lock):
    worker.train(folder)
    return Worker(folder, [], json.loads((folder / "outcome.json").read_text()))


def test_a_sweep_that_trains(make):
    """Values are those of the runs alone; the winner's config file trains to them again; what diverges says so."""
    sweep = make(
        "compression = [2, 3]\nbad = [{seed = 0}, {learning_rate = 9e18, max_bad_steps = 1, warmup_steps = 0}]",
        'sampler = "grid"\nobjective = "val_bpb + 0.1 * abs(val_bytes_per_chunk / target - 1)"',
    ).validate()  # fmt: skip
    study, over = search(sweep, None, launch=really)
    assert over
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE", "FAIL"]
    assert "non-finite" in study.trials[1].user_attrs[REASON]
    written = [p.name for p in write_report(sweep, study)]
    assert written == ["report.md", "parallel.png", "compression.png", "best.toml"]
    best = TrainConfig(**read_toml(sweep.folder / "best.toml", TrainConfig))
    result = Trainer(best).train()
    off = abs(result["stage0/val_bytes_per_chunk"] / best.compression[0] - 1)
    assert min(study.trials[0].value, study.trials[2].value) == pytest.approx(result["val_bpb"] + 0.1 * off, abs=1e-5)


def test_an_early_stop_is_an_end(make):
    """Also where it is found by its last checkpoint."""
    sweep = make("seed = [0]", 'sampler = "grid"', run="patience = 1\nmin_delta = 99.0").validate()
    search(sweep, None, launch=really)
    folder = sweep.folder / "trials" / "0000"
    before = (folder / "metrics.jsonl").read_text()
    assert json.loads((folder / "outcome.json").read_text()) == {"finished": 8}
    (folder / "outcome.json").unlink()
    worker.train(folder)
    assert (folder / "metrics.jsonl").read_text() == before
    assert (folder / "outcome.json").exists()


def test_the_command(make, tmp_path, monkeypatch):
    make("seed = [0, 1]", 'sampler = "one_at_a_time"')
    path = str(tmp_path / "sweep.toml")
    r = CliRunner().invoke(main, ["sweep", path, "--dry-run"])
    assert r.exit_code == 0, r.output
    assert "2 trials in" in r.output
    assert "0001  seed 1" in r.output
    assert not (tmp_path / "out").exists()
    r = CliRunner().invoke(main, ["sweep", path, "--report"])
    assert (r.exit_code, r.stderr) == (1, f"Error: {tmp_path / 'out'} holds no sweep: it has no study.db\n")
    monkeypatch.setattr("hnet.sweep.search.Process", launcher(lambda c: [row(8, 1.0 + c.dropout)]))
    r = CliRunner().invoke(main, ["sweep", path, "--set", "dropout=0.5"])
    assert r.exit_code == 0, r.output
    assert "trial 1 is complete: objective 1.5, seed 1" in r.output
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| seed | 0 (base) | 1.5 |" in report
    assert "| seed | 1 | 1.5 | 1.5000 | 3.00 | 8 | 0.0 | +0.0000 |" in report
    (tmp_path / "out" / "report.md").unlink()
    assert CliRunner().invoke(main, ["sweep", path, "--set", "dropout=0.5", "--report"]).exit_code == 0
    assert (tmp_path / "out" / "report.md").read_text() == report
    for name in ("parallel", "compression", "effects"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000


def test_a_failed_run_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "config.toml").write_text('data = ["/nowhere"]\n')
    worker.train(tmp_path)
    assert worker.read_outcome(tmp_path) == {"failed": "data path /nowhere does not exist"}

    def broken(*args, **kwargs):
        raise KeyError("a bug\nof ours")

    monkeypatch.setattr(worker, "Trainer", broken)
    worker.train(tmp_path)
    assert worker.read_outcome(tmp_path) == {"failed": "KeyError: 'a bug\\nof ours'"}
