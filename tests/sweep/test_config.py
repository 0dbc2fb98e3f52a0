"""A sweep's file: what it means, what is refused."""

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from hnet.cli import main
from hnet.sweep.config import read_sweep
from hnet.train.config import TrainConfig

from .conftest import RUN

READY = sorted((Path(__file__).parents[2] / "configs" / "sweeps").glob("*.toml"))


def test_grid_is_every_combination(make):
    sweep = make("learning_rate = [1e-3, 1e-2]\ncompression = {low = 2, high = 4.5, step = 1}", 'sampler = "grid"')
    points = list(sweep.validate().points())
    assert points == [
        {"learning_rate": a, "compression": b} for a in ("0.001", "0.01") for b in ("2", "3", "4")
    ]  # fmt: skip
    assert sweep.wanted == sweep.size == 6
    runs = [sweep.run_of(p, "x") for p in points]
    assert [(r.learning_rate, r.compression) for r in runs] == [
        (a, [b]) for a in (1e-3, 1e-2) for b in (2.0, 3.0, 4.0)
    ]  # fmt: skip
    assert not runs[0].plots


def test_one_at_a_time_is_the_base_and_each_choice_alone(make):
    sweep = make(
        'seed = [0, 1, 2]\nlearning_rate = [1e-2]\n'
        'alpha = [{ratio_weight = 2, ratio_warmup = 4}, {label = "x", dropout = 0.1}]',
        'sampler = "one_at_a_time"', run="learning_rate = 0.003",
    ).validate()  # fmt: skip
    runs = [sweep.run_of(p, "x") for p in sweep.points()]
    base = runs[0]
    changed = [
        {k: v for k, v in dataclasses.asdict(r).items() if v != getattr(base, k)} for r in runs
    ]  # fmt: skip
    assert changed == [
        {}, {"seed": 1}, {"seed": 2}, {"learning_rate": 0.01}, {"ratio_weight": 2.0, "ratio_warmup": 4},
        {"dropout": 0.1},
    ]  # fmt: skip
    assert (base.seed, base.learning_rate, base.dropout) == (0, 0.003, 0.0)
    assert sweep.base_point() == {"seed": "0", "learning_rate": "0.003", "alpha": "base"}


def test_a_base_file_and_what_beats_it(tmp_path):
    (tmp_path / "base.toml").write_text('data = ["a"]\nsteps = 5\ndropout = 0.2\nout = "runs/elsewhere"\n')
    (tmp_path / "sweep.toml").write_text(
        'base = "base.toml"\n[run]\nepochs = 2.0\n[parameters]\nlearning_rate = {low = 1, high = 2}\n'
    )
    sweep = read_sweep(tmp_path / "sweep.toml", {"workers": 3}, {"data": "b"})
    run = sweep.run_of({"learning_rate": 1.5}, "here")
    assert (run.data, run.epochs, run.dropout, run.out, run.learning_rate) == (["b"], 2.0, 0.2, "here", 1.5)
    assert sweep.workers == 3


def test_its_copy_is_the_sweep(make, tmp_path):
    """One file, without the base; with ranges, tables, lists and options."""
    sweep = make(
        'learning_rate = {low = 1e-4, high = 1e-2, log = true}\ncompression = [3, 4.5]\n'
        'warmup_steps = {low = 0, high = 5}\n'
        'size = [{arch = "m1 T1", d_model = [64, 64]}, {label = "b", preset = "tiny"}]\n',
        'pruner = "median"\ntrials = 7', "[pruner_options]\nn_startup_trials = 2",
    ).validate()  # fmt: skip
    (tmp_path / "copy.toml").write_text(sweep.to_toml())
    assert read_sweep(tmp_path / "copy.toml").validate() == sweep
    ablation = make("seed = [1, 2]\nlearning_rate = [0.1]", 'sampler = "one_at_a_time"').validate()
    (tmp_path / "copy.toml").write_text(ablation.to_toml())
    assert read_sweep(tmp_path / "copy.toml").validate() == ablation


MISTAKES = [
    # parameters, keys above, tables below, what the one line says
    ("learning_rat = [1]", "", "", "a run has no key 'learning_rat', the closest is 'learning_rate'"),
    ("learning_rate = []", "", "", "learning_rate must list at least one choice"),
    ("learning_rate = [1, 1.0]", "", "", "learning_rate lists 1 twice"),
    ("a = [{dropout = 0.1}, {dropout = 0.1}]", "", "", "lists dropout 0.1 twice"),
    ("a = [{}]", "", "", "must set at least one key"),
    ("a = [{dropot = 0.1}]", "", "", "the closest is 'dropout'"),
    ("dropout = [0.1]\na = [{dropout = 0.2}]", "", "", "parameters dropout and a both set dropout"),
    ("learning_rate = 0.1", "", "", "must be a list of choices or a table {low, high, log, step}"),
    ("learning_rate = ['x']", "", "", "learning_rate must be float, got 'x'"),
    ("dropout = [1.5]", "", "", "dropout must be in [0, 0.99999], got 1.5"),
    ("dropout = {low = 0, high = 1.5}", "", "", "dropout must be in [0, 0.99999], got 1.5"),
    ("learning_rate = {low = 1}", "", "", "learning_rate must have a high"),
    ("learning_rate = {low = 2, high = 1}", "", "", "low must be below high"),
    ("learning_rate = {low = 1, hihg = 2}", "", "", "unknown 'hihg', the closest is 'high'"),
    ("learning_rate = {low = 0, high = 1, log = true}", "", "", "low must be positive"),
    ("learning_rate = {low = 1, high = 2, step = 0}", "", "", "step must be above 0"),
    ("learning_rate = {low = 1, high = nan}", "", "", "high must be a number, got nan"),
    ("steps = {low = 1.5, high = 3}", "", "", "must be integers, as steps is"),
    ("preset = {low = 1, high = 3}", "", "", "preset is no number"),
    ("learning_rate = {low = 1, high = 2}", 'sampler = "grid"', "", "must be a list, or have a step, to be enumerated"),
    ("out = ['x']", "", "", "out must be left out"),
    ("", "", "", "[parameters] must name at least one key"),
    ("seed = [1]", "tirals = 3", "", "a sweep has no key 'tirals', the closest is 'trials'"),
    ("seed = [1]", "trials = -1", "", "trials must be at least 0"),
    ("seed = [1]", 'sampler = "magic"', "", "sampler must be one of tpe, random, grid, one_at_a_time"),
    (
        "seed = [1]",
        'objective = "val_pbb"',
        "",
        "metric 'val_pbb', the closest is 'val_bpb'; known are bpb, bytes",
    ),
    ("seed = [1]", 'objective = "open(1)"', "", "no function open()"),
    (
        "seed = [1]",
        'pruner = "median"',
        "[pruner_options]\nstartup = 1",
        "'median' has no 'startup'; known are n_st",
    ),
    ("seed = [1]", 'pruner = "percentile"', "", "pruner 'percentile': "),
    ("seed = [1]", "", "[sampler_options]\nmagic = 1", "sampler 'tpe' has no 'magic'"),
    ("seed = [1]", 'base = "/nowhere.toml"', "", "/nowhere.toml does not exist"),
    ("compression = [0.5]", "", "", "the first configuration of the sweep is refused: compression must be above 1"),
    ("seed = {low = 0, high = 200000}", 'sampler = "grid"', "", "at most 10,000 values"),
]


@pytest.mark.parametrize(("parameters", "top", "tables", "says"), MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(parameters, top, tables, says, tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(f'out = "{tmp_path / "out"}"\n{top}\n[run]\n{RUN}\n[parameters]\n{parameters}\n{tables}')
    r = CliRunner().invoke(main, ["sweep", str(path)])
    assert isinstance(r.exception, SystemExit), r.exception
    assert r.exit_code == 1
    assert says in r.stderr
    assert r.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.toml"]


def test_without_optuna_the_extra_is_named(make, monkeypatch, tmp_path):
    make("seed = [1]")
    for name in ("hnet.sweep.study", "hnet.sweep.search", "hnet.sweep.console", "hnet.sweep.report"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    r = CliRunner().invoke(main, ["sweep", str(tmp_path / "sweep.toml")])
    assert r.exit_code == 1
    assert "pip install 'hnet-kernels[sweep]'" in r.stderr


@pytest.mark.parametrize("path", READY, ids=lambda p: p.stem)
def test_ready_sweeps(path, tmp_path):
    """Every configuration validates; nothing is written."""
    args = ["sweep", str(path), "--dry-run", "--out", str(tmp_path / "out"), "--set", f"data={tmp_path}"]
    r = CliRunner().invoke(main, args)
    assert r.exit_code == 0, r.output
    assert "REFUSED" not in r.output
    assert list(tmp_path.iterdir()) == []


def test_the_guide_has_its_experiments():
    """Those of the guide, one at a time: what each run changes in the base."""
    sweep = read_sweep(next(p for p in READY if p.stem == "guide"), run={"data": "x"}).spelled_out()
    runs = [sweep.run_of(p, "x") for p in sweep.points()]
    base = runs[0]
    assert all(isinstance(r.validate(), TrainConfig) for r in runs)

    def values(*names):
        return {tuple(str(getattr(r, n)) for n in names) for r in runs}

    assert values("patience") == {("2",), ("5",), ("10",)}
    assert {r.batch_bytes // r.seq_len for r in runs} == {32, 64, 128}
    assert {r.batch_bytes * r.steps for r in runs} == {base.batch_bytes * base.steps}
    assert {1e-4, 3e-4, 5e-4} <= {r.learning_rate for r in runs}
    assert {r.weight_decay for r in runs} == {0.01, 0.1}
    assert {r.schedule for r in runs} == {"wsd", "cosine", "plateau"}
    pairs = {(r.ratio_weight, r.ratio_warmup > 0) for r in runs}
    assert {(a, w) for a in (0.03, 1.0, 2.0, 5.0) for w in (True, False)} <= pairs
    assert {3.0, 5.0, 7.0} <= {r.compression[0] for r in runs}
    assert {tuple(r.d_model) for r in runs} == {(256, 256), (256, 512), (256, 768)}
    assert {r.arch for r in runs} == {"m2 T4", "m4 T4", "m4 T8"}
    assert values("surprisal_weight", "entropy_weight") == {("[0.0]", "[0.0]"), ("[0.1]", "[0.2]")}
    assert len(runs) == len({r.to_toml() for r in runs}) == 26
