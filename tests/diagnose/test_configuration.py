"""Rules that need no step."""

import pytest

from hnet.diagnose.runs import read_log

from .logs import CONFIG, findings, healthy_rows, write_run


def of(tmp_path, **config):
    return findings(write_run(tmp_path, [], **config) / "config.toml")


def test_good_config(tmp_path):
    assert [n for n, f in of(tmp_path).items() if f.severity != "note"] == []


@pytest.mark.parametrize(
    ("config", "name", "severity"),
    [
        ({"warmup_steps": 400}, "warmup_all", "critical"),
        ({"warmup_steps": 200, "decay_fraction": 0.8}, "warmup_decay", "warning"),
        ({"warmup_steps": 1}, "warmup", "warning"),
        ({"schedule": "constant"}, "lr_end", "warning"),
        ({"min_lr": 0.5}, "lr_end", "warning"),
        ({"learning_rate": 0.02}, "lr_high", "warning"),
        ({"learning_rate": 3e-3, "lr_multipliers": [3.0, 1.0]}, "lr_high", "warning"),
        ({"lr_multipliers": [1.0, 2.0]}, "lr_multipliers", "warning"),
        ({"lr_multipliers": [8.0, 1.0]}, "lr_multipliers", "note"),
        ({"max_grad_norm": 0.0}, "no_clipping", "warning"),
        ({"ratio_weight": 0.03}, "ratio_weight", "warning"),
        ({"ratio_weight": 40.0}, "ratio_weight", "warning"),
        ({"weight_decay": 5.0}, "weight_decay", "warning"),
        ({"weight_decay": 3.0, "lr_multipliers": [2.0, 1.0]}, "weight_decay", "warning"),
        ({"betas": [0.999, 0.9]}, "betas", "warning"),
        ({"betas": [0.9, 0.5]}, "betas", "warning"),
        ({"dropout": 0.9}, "dropout", "warning"),
        ({"compression": [40.0]}, "target_range", "note"),
        ({"patience": 2}, "patience", "warning"),
        ({"early_stop_metric": "val_loss"}, "early_stop_metric", "critical"),
        ({"eval_bytes": 1000}, "eval_bytes", "note"),
        ({"eval_every": 300}, "eval_every", "note"),
        ({"batch_bytes": 2048}, "small_batch", "note"),
        ({"split": "tail"}, "split_tail", "warning"),
        ({"d_model": [256, 256]}, "widths", "warning"),
    ],
)
def test_rules(config, name, severity, tmp_path):
    assert name not in of(tmp_path / "good") or severity == "note"
    assert of(tmp_path / "bad", **config)[name].severity == severity


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": "muon", "learning_rate": 0.02, "lr_multipliers": []},
        {"ratio_weight": 0.03, "rate_control": "bias"},
        {"lr_multipliers": "auto"},
        {"ratio_weight": "auto"},
        {"clip": "adaptive", "max_grad_norm": 0.0},
        {"preset": "of tomorrow"},
        {"data": "one/path"},
        {"compression": "1 3 9", "warmup_steps": "many", "patience": "long"},
    ],
)
def test_no_false_alarm_and_no_crash_on_other_values(config, tmp_path):
    assert [n for n, f in of(tmp_path, **config).items() if f.severity != "note"] == []


def test_tables_and_unknown_keys(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("tomorrow = 1\n[train]\nsteps = 100\nwarmup_steps = 100\n[model]\nd_model = [64, 64]\n")
    assert {"warmup_all", "widths"} <= findings(path).keys()


def test_the_log_beats_the_config_where_it_shows_more(tmp_path):
    """schedule = constant, but the logged rate came down."""
    assert "lr_end" not in findings(write_run(tmp_path / "a", healthy_rows(), schedule="constant"))
    assert CONFIG["schedule"] == "wsd"


def test_epochs_of_a_config_are_not_taken_for_the_default_steps(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("data = ['x']\nepochs = 3\nwarmup_steps = 1500\n")
    assert "steps" not in read_log(path).config
    assert "warmup_all" not in findings(path)
    path.write_text("data = ['x']\nwarmup_steps = 1500\n")
    assert "warmup_all" in findings(path)


@pytest.mark.parametrize(
    ("config", "name", "severity"),
    [
        ({"zero_grad_every": 100, "accumulation": 8}, "zero_grad", "critical"),
        ({"zero_grad_every": 2}, "zero_grad", "critical"),
        ({"zero_grad_every": 8, "accumulation": 8}, "zero_grad", None),
        ({"packing": True}, "leak", "warning"),
        ({"packing": True, "cu_seqlens": False}, "leak", "critical"),
        ({"packing": "greedy", "cu_seqlens": "none"}, "leak", "critical"),
        ({"packing": True, "cu_seqlens": True}, "leak", None),
        ({"packing": "off"}, "leak", None),
        ({"temperature": 1.0, "top_p": 1.0}, "sampling", "warning"),
        ({"temperature": 1.2, "top_p": 0.99}, "sampling", "warning"),
        ({"temperature": 0.8, "top_p": 1.0}, "sampling", None),
        ({"temperature": 1.0, "top_p": 0.9}, "sampling", None),
    ],
)
def test_another_trainers_keys(config, name, severity, tmp_path):
    f = of(tmp_path, **config).get(name)
    assert (f and f.severity) == severity


def test_a_penalty_that_is_there_is_not_asked_for(tmp_path):
    f = of(tmp_path, temperature=1.0, top_p=1.0, repetition_penalty=1.2)["sampling"]
    assert "repetition_penalty" not in f.sampling
    assert f.sampling["temperature"] == 0.8


def test_stage_norms(tmp_path):
    rows = healthy_rows()
    assert "stage_norms" not in findings(write_run(tmp_path / "a", rows))
    joined = [{k: v for k, v in r.items() if not k.endswith("/grad_norm")} for r in rows]
    assert findings(write_run(tmp_path / "b", joined))["stage_norms"].severity == "note"
    assert "stage_norms" not in findings(write_run(tmp_path / "c", joined, lr_multipliers=[1.0, 1.0]))


def test_sequences_longer_than_the_loader_makes_them(tmp_path):
    rows = [{**r, "stage0/chunks_per_sequence": 200.0} for r in healthy_rows()]  # of 4 bytes: 800 of 1,024
    assert "leak" not in findings(write_run(tmp_path / "a", rows))
    for r in rows:
        r["stage0/chunks_per_sequence"] = 2048.0
    f = findings(write_run(tmp_path / "b", rows))["leak"]
    assert f.severity == "critical"
    assert "seq_len is 1024" in f.evidence[0]
