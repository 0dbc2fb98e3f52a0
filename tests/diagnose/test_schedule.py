"""Learning rate, resuming, cutoffs."""

import math
import re

import pytest

from hnet.train.schedule import Schedule

from .logs import after, findings, healthy_rows, write_run


def test_learning_rate_ends_high(tmp_path):
    rows = healthy_rows()
    for r in after(rows, 40):
        r["lr"] = 8e-4
    f = findings(write_run(tmp_path / "a", rows))["lr_end"]
    assert f.severity == "warning"
    assert "80 % of the peak" in f.evidence[0]
    unfinished = findings(write_run(tmp_path / "b", rows, steps=1000))
    assert "lr_end" not in unfinished
    run = write_run(tmp_path / "c", rows)
    (run / "config.toml").unlink()  # then the run may not be over
    assert findings(run)["lr_end"].severity == "note"


def resumed(at=300, back_to=250):
    """A log that was killed at one step and taken up again at an earlier one, exactly."""
    rows = healthy_rows()
    return [r for r in rows if r["step"] <= at] + [dict(r) for r in rows if r["step"] > back_to]


def test_exact_resume_is_only_told(tmp_path):
    found = findings(write_run(tmp_path / "a", resumed()))
    assert found["step_regressed"].severity == "warning"
    assert "from step 300 to 251" in found["step_regressed"].evidence[0]
    assert not {"resume_lr", "resume_loss", "lr_jump", "lr_restart", "loss_spike"} & found.keys()


def test_rollback_is_no_resume(tmp_path):
    rows = resumed()
    i = [r["step"] for r in rows].index(300) + 1
    rows.insert(i, {"step": 300, "event": "rollback", "message": "to 250"})
    assert "step_regressed" not in findings(write_run(tmp_path / "a", rows))


def test_resume_with_another_learning_rate_and_loss(tmp_path):
    rows = resumed()
    i = [r["step"] for r in rows].index(300) + 1
    for r in rows[i:]:
        r["lr"] *= 1.3
    f = findings(write_run(tmp_path / "a", rows))["resume_lr"]
    assert f.severity == "critical"
    rows = resumed()
    for r in rows[i:]:
        r["ce"] += 0.5 * math.exp(-(r["step"] - 250) / 30)
    f = findings(write_run(tmp_path / "b", rows))["resume_loss"]
    assert f.severity == "critical"


def test_resume_that_restarts_the_warmup_without_going_back(tmp_path):
    rows = healthy_rows()
    for r in after(rows, 200):
        r["lr"] = 1e-3 * min(1, (r["step"] - 200) / 40)
    rows.insert(201, {"step": 200, "event": "resume", "message": "Resumed"})
    f = findings(write_run(tmp_path / "a", rows))["resume_lr"]
    assert f.severity == "critical"
    assert "0.001 before and 2.5e-05 after" in f.evidence[0]


def test_restart_that_lasts_one_step(tmp_path):
    rows = healthy_rows()
    for r in after(rows, 0):
        r["lr"] = 1e-3 * (1 - r["step"] / 500)
    run = write_run(tmp_path / "a", rows)
    assert "lr_restart" not in findings(run)
    rows[300]["lr"] = rows[350]["lr"] = 1e-3
    f = findings(write_run(tmp_path / "b", rows))["lr_restart"]
    assert f.severity == "critical"
    assert "2 times, first at step 300: 0.000402, 0.001, 0.000398" in f.evidence[0]
    assert "lr_jump" not in findings(write_run(tmp_path / "c", rows))


def test_unexplained_jump(tmp_path):
    rows = healthy_rows()
    for r in after(rows, 0):
        r["lr"] = 1e-3 * (1 - (r["step"] % 200) / 250)
    found = findings(write_run(tmp_path / "a", rows))
    assert found["lr_jump"].severity == "warning"
    assert "lr_jump" not in findings(write_run(tmp_path / "b", rows, schedule="restarts"))
    rows.insert(200, {"step": 200, "event": "lr_restart", "message": ""})
    for i in (400, 399):  # the log ends with another jump, which the event does not cover
        rows = [r for r in rows if r["step"] != i]
    assert "lr_jump" not in findings(write_run(tmp_path / "c", rows))


EPOCH = 200


def chunk_lm(raise_at=(400,), lr_restarts=True, recovers=True):
    rows, cutoff, since = [], 128, 0
    for s in range(1, 801):
        if s in raise_at:
            cutoff, since = 2 * cutoff, s
        start = since if lr_restarts else 0
        lr = 2e-4 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min((s - start) / 400, 1))))
        bump = 0.0 if not since else (0.5 if not recovers else 0.5 * math.exp(-(s - since) / 20))
        loss = 2.5 + 2 * math.exp(-s / 100) - 0.0005 * s + bump + 0.01 * math.sin(7 * s)
        rows.append({"step": s, "loss": loss, "ce": loss, "lr": lr, "cutoff": cutoff, "epoch": 1 + (s - 1) // EPOCH})
    return rows


CHUNK_LM = {"steps": 800, "cutoffs": [128, 256, 512], "steps_per_epoch": EPOCH}


def test_a_good_curriculum(tmp_path):
    found = findings(write_run(tmp_path / "a", chunk_lm(), **CHUNK_LM))
    assert [n for n, f in found.items() if f.severity != "note"] == []


@pytest.mark.parametrize("with_config", [True, False])
def test_raise_away_from_the_peak_and_without_recovery(tmp_path, with_config):
    run = write_run(tmp_path / "a", chunk_lm(lr_restarts=False), **CHUNK_LM)
    if not with_config:
        (run / "config.toml").unlink()
    found = findings(run)
    assert "128 -> 256 at step 400: learning rate 2e-05, 10 % of the peak" in found["cutoff_lr"].evidence[0]
    assert "cutoff_loss" not in found
    run = write_run(tmp_path / "b", chunk_lm(recovers=False), **CHUNK_LM)
    if not with_config:
        (run / "config.toml").unlink()
    found = findings(run)
    assert "within 200 steps" in found["cutoff_loss"].evidence[0]
    assert "cutoff_lr" not in found


def test_cutoff_that_goes_back(tmp_path):
    rows = chunk_lm()
    for r in rows[600:]:
        r["cutoff"] = 128
    f = findings(write_run(tmp_path / "a", rows, **CHUNK_LM))["cutoff_regressed"]
    assert f.severity == "critical"
    assert "256 at step 600, 128 at step 601" in f.evidence[0]


def test_the_printed_log_of_the_public_script(tmp_path):
    """As in issue 5: a raise at 71 % of the peak, then a resume that lowers the cutoff."""
    lines = []
    for e, cutoff in enumerate((128, 128, 256, 128)):
        if e == 2:
            lines.append("Epoch 2 🚀 CUTOFF RAISED: 128 -> 256 (loss plateaued, opening frequency gates)")
        for s in range(10, 1001, 10):
            lr = 2e-4 * (1 - 0.145 * (e % 3) - 0.0001 * s)
            lines.append(f"  step {s}/1000 loss={3 - 0.2 * e - 1e-4 * s:.4f} lr={lr:.2e} cutoff={cutoff}")
        lines.append(f"Epoch {e + 1} avg_loss={3 - 0.2 * e:.2f} cutoff={cutoff}/1025")
    path = tmp_path / "train.log"
    path.write_text("\n".join(lines))
    found = findings(path)
    assert "128 -> 256 at step 2010: learning rate 0.000142, 71 % of the peak" in found["cutoff_lr"].evidence[0]
    assert found["cutoff_regressed"].steps == (3010, 3010)


@pytest.mark.parametrize(
    ("kind", "decay", "plan", "told"),
    [("wsd", 0.3, 400, False), ("cosine", 0.0, 400, False), ("wsd", 1.0, 400, False), ("wsd", 0.3, 200, True),
     ("cosine", 0.0, 300, True)],
)  # fmt: skip
def test_a_rate_that_is_gone_before_the_end(kind, decay, plan, told, tmp_path):
    """The schedule of a run of `plan` steps, in one of 400."""
    schedule = Schedule(kind, plan, warmup_steps=20, decay_fraction=decay)
    rows = healthy_rows()
    for r in after(rows, 0):
        r["lr"] = 1e-3 * schedule.factor(min(r["step"] - 1, plan))
    found = findings(write_run(tmp_path / "a", rows))
    assert ("lr_gone" in found) is told
    if told:
        first = int(re.search(r"After step (\d+)", found["lr_gone"].evidence[0])[1])
        assert plan - 60 < first <= plan


def test_a_rate_of_zero(tmp_path):
    rows = healthy_rows()
    for r in after(rows, 0):
        r["lr"] = 0.0
    assert findings(write_run(tmp_path / "a", rows))["lr_gone"].severity == "critical"
