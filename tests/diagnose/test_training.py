"""Loss and gradient rules: each on a run that provokes it; the healthy run provokes none."""

import math

import numpy as np
import pytest

from hnet.diagnose.report import diagnose
from hnet.diagnose.runs import read_log

from .logs import after, findings, healthy_rows, write_run


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_has_no_findings(tmp_path, seed):
    run = write_run(tmp_path / "run", healthy_rows(seed=seed))
    assert [f.name for f in diagnose(read_log(run)) if f.severity != "note"] == []


def test_non_finite_to_the_end_is_an_error_and_passing_is_a_warning(tmp_path):
    rows = healthy_rows()
    for r in after(rows, 300):
        r["loss"] = r["ce"] = r["bpb"] = None
    f = findings(write_run(tmp_path / "a", rows))["non_finite"]
    assert f.severity == "critical"
    assert f.steps == (301, 400)
    assert "step 300" in " ".join(f.evidence)
    rows = healthy_rows()
    rows[200]["grad_norm"] = None
    rows.insert(201, {"step": 200, "event": "non_finite", "message": "step skipped"})
    f = findings(write_run(tmp_path / "b", rows))["non_finite"]
    assert f.severity == "warning"
    assert "skipped 1 update," in " ".join(f.evidence)


def bump(rows, at, height, width):
    for r in rows:
        if r["step"] >= at and "ce" in r:
            more = height * math.exp(-(r["step"] - at) / width) if math.isfinite(width) else height
            r["ce"] += more
            r["loss"] += more
            r["bpb"] += more / math.log(2)


def test_loss_spike(tmp_path):
    rows = healthy_rows()
    bump(rows, 200, 2.0, 5)
    f = findings(write_run(tmp_path / "a", rows))["loss_spike"]
    assert f.severity == "warning"
    assert f.steps is not None
    assert f.steps[0] == 200
    rows = healthy_rows()
    bump(rows, 200, 2.0, math.inf)
    f = findings(write_run(tmp_path / "b", rows))["loss_spike"]
    assert f.severity == "critical"
    assert "checkpoint before step 200" in " ".join(f.change)


def test_rollback_events_are_told(tmp_path):
    rows = healthy_rows()
    rows.insert(151, {"step": 150, "event": "rollback", "message": "to step 140"})
    assert "step 150: rollback to step 140" in findings(write_run(tmp_path / "a", rows))["loss_spike"].evidence


def test_too_little_warmup(tmp_path):
    rows = healthy_rows()
    f = findings(write_run(tmp_path / "note", rows, warmup_steps=2))["warmup"]
    assert f.severity == "note"
    for r in after(rows, 0)[:10]:
        r["grad_norm"] *= 60
    for r in after(rows, 0)[10:30]:
        r["ce"] += 3
    f = findings(write_run(tmp_path / "a", rows, warmup_steps=2))["warmup"]
    assert f.severity == "warning"
    assert f.title == "Too little warm-up"
    assert len(f.evidence) == 3
    assert f.advice == ["--warmup-steps 50"]
    f = findings(write_run(tmp_path / "b", rows, warmup_steps=40))["warmup"]
    assert f.title == "The first steps are unstable in spite of the warm-up"


def test_exploding_gradient_of_a_stage_names_its_multiplier(tmp_path):
    rows = healthy_rows()
    for r in after(rows, 200):
        r["stage0/grad_norm"] *= 1.05 ** (r["step"] - 200)
    f = findings(write_run(tmp_path / "a", rows, lr_multipliers=[4.0, 1.0]))["grad_explosion"]
    assert f.severity == "critical"
    assert f.stage == 0
    assert f.keys == {"lr_multipliers": [2.0, 1.0], "learning_rate": 0.00067}
    rows = healthy_rows()
    for s in (150, 200, 250, 300):
        rows[s]["stage1/grad_norm"] *= 100
    f = findings(write_run(tmp_path / "b", rows))["grad_explosion"]
    assert (f.severity, f.stage) == ("warning", 1)
    rows = healthy_rows()
    rows.insert(300, {"step": 299, "event": "grad_explosion", "message": "stage 0: 50 times its median"})
    assert "stage 0: 50 times" in findings(write_run(tmp_path / "c", rows))["grad_explosion"].evidence[0]


def with_evaluations(values, every=20):
    rows = [r for r in healthy_rows(every * len(values)) if r["step"] > 0]
    for r in rows:
        r.pop("val_ce", None)
        r.pop("val_bpb", None)
    for i, v in enumerate(values):
        rows[(i + 1) * every - 1] |= {"val_ce": v, "val_bpb": v / math.log(2)}
    return rows


def test_early_stop_on_noise(tmp_path):
    rng = np.random.default_rng(1)
    values = 2 - 0.004 * np.arange(30) + 0.03 * rng.standard_normal(30)
    values[-4] = values.min() - 0.02  # a lucky evaluation, then three that miss it
    rows = with_evaluations(values.tolist())
    rows.append({"step": 600, "event": "early_stop", "message": "patience"})
    f = findings(write_run(tmp_path / "a", rows, patience=3, steps=5000))["early_stop_noise"]
    assert f.severity == "warning"
    assert f.keys["patience"] >= 10
    flat = [2 - 0.05 * min(i, 12) + 0.004 * max(i - 12, 0) for i in range(24)]  # stopped for a reason
    rows = [*with_evaluations(flat), {"step": 480, "event": "early_stop", "message": "patience"}]
    found = findings(write_run(tmp_path / "b", rows, patience=10, steps=5000))
    assert not {"early_stop_noise", "early_stop_metric"} & found.keys()


def test_early_stop_on_cross_entropy_plus_ratio_loss(tmp_path):
    rows = with_evaluations([2 - 0.02 * i for i in range(20)])
    for r in rows:
        r["ratio_loss"] = 1 + 0.002 * r["step"]
    rows.append({"step": 400, "event": "early_stop", "message": "val loss"})
    f = findings(write_run(tmp_path / "a", rows, patience=5, steps=5000))["early_stop_metric"]
    assert f.severity == "critical"
    assert "ratio loss went from" in " ".join(f.evidence)


def test_overfitting(tmp_path):
    values = [2 - 0.1 * i for i in range(8)] + [1.3 + 0.03 * i for i in range(12)]
    rows = with_evaluations(values)
    f = findings(write_run(tmp_path / "a", rows))["overfitting"]
    assert "step 160" in f.evidence[0]
    for r in rows:  # the training loss rises too: something else
        r["ce"] = 1 + r["step"] / 100
    assert "overfitting" not in findings(write_run(tmp_path / "b", rows))


def test_plateau_only_while_the_learning_rate_is_high(tmp_path):
    rows = healthy_rows()
    rng = np.random.default_rng(0)
    for r in after(rows, 100):
        r["ce"] = 1.5 * (1 + 0.03 * rng.standard_normal())
    assert "plateau" not in findings(write_run(tmp_path / "a", rows))
    for r in after(rows, 100):
        r["lr"] = 1e-3
    f = findings(write_run(tmp_path / "b", rows, schedule="constant"))["plateau"]
    assert "100 % of its peak" in " ".join(f.evidence)


@pytest.mark.parametrize("name", ["out_of_memory", "disk_full"])
def test_failures(name, tmp_path):
    rows = [*healthy_rows(100), {"step": 100, "event": name, "message": "at stage 1"}]
    f = findings(write_run(tmp_path / "a", rows))[name]
    assert f.severity == "critical"
    assert "at stage 1" in f.evidence[0]


def test_not_learning(tmp_path):
    def flat(level, first, fall=0.001):
        rows = healthy_rows()
        for r in after(rows, 0):
            share = r["step"] / rows[-1]["step"] if not first else 1
            r["step"] += first
            r["ce"] = r["loss"] = level * (1 - fall * share) + 0.01 * math.sin(r["step"])
            r.pop("bpb")
        return rows[1:]

    f = findings(write_run(tmp_path / "a", flat(5.5, 0), learning_rate=1e-6))["not_learning"]
    assert f.severity == "critical"
    assert f.keys == {"learning_rate": 1e-3}
    fine = {"fine-tuned": flat(1.2, 0), "a part": flat(5.5, 5000), "healthy": healthy_rows()}
    fine["slowly"] = flat(5.5, 0, fall=0.02)  # as a small ChunkLM does in its first 80 steps
    for name, rows in fine.items():
        assert "not_learning" not in findings(write_run(tmp_path / name, rows)), name


@pytest.mark.parametrize(("nats", "told"), [(0.02, True), (0.5, False)])
def test_too_good_to_be_true(nats, told, tmp_path):
    rows = healthy_rows()
    for r in rows[1:]:
        if "val_ce" in r:
            r["val_ce"], r["val_bpb"] = nats, nats / math.log(2)
    assert ("too_good" in findings(write_run(tmp_path / "a", rows))) is told
