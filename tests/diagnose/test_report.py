"""The command: console, JSON, files, exit codes."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from hnet.cli.diagnose import diagnose, plot
from hnet.diagnose.findings import Finding, by_severity
from hnet.diagnose.report import diagnose as diagnose_log
from hnet.diagnose.runs import read_log

from .logs import after, healthy_rows, write_run


def run(*args):
    return CliRunner().invoke(diagnose, [str(a) for a in args])


@pytest.fixture
def good(tmp_path):
    return write_run(tmp_path / "good", healthy_rows())


@pytest.fixture
def bad(tmp_path):
    rows = healthy_rows()
    for r in after(rows, 0):
        r["stage0/F"] = 0.999
    for r in after(rows, 40):
        r["lr"] = 1e-3
    return write_run(tmp_path / "bad", rows)


def test_exit_codes_and_order(good, bad, tmp_path):
    r = run(good)
    assert r.exit_code == 0, r.output
    assert "critical " not in r.output
    r = run(good, bad)
    assert r.exit_code == 1
    text = r.output[r.output.index(str(bad.name)) :]
    assert 0 < text.index("critical ") < text.index("warning ")
    assert "collapsed to one chunk per position" in text
    assert "-> " in text
    novel = tmp_path / "novel.txt"
    novel.write_text("Call me Ishmael.")
    for args in ((novel,), (good, novel), (tmp_path / "missing",)):
        r = run(*args)
        assert r.exit_code == 2
        assert len(r.stderr.strip().splitlines()) == 1
        assert r.stdout == ""


def test_json(good, bad):
    r = run(bad, good, "--json")
    assert r.exit_code == 1
    first, second = json.loads(r.stdout)
    assert first["counts"]["critical"] == 1
    assert first["kind"] == "run"
    assert first["summary"]["last_step"] == 400
    assert first["findings"][0]["id"] == "collapse_open"
    assert first["findings"][0]["severity"] == "critical"
    assert first["findings"][0]["stage"] == 0
    assert second["counts"]["critical"] == 0


def test_out_writes_a_report_and_plots(good, bad, tmp_path):
    out = tmp_path / "report"
    assert run(bad, "--out", out).exit_code == 1
    text = (out / "report.md").read_text()
    assert "### critical: Stage 0 collapsed" in text
    for name in ("loss_curves", "learning_rates", "grad_norms", "compression"):
        assert f"({name}.png)" in text
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    several = tmp_path / "several"
    run(good, bad, "--out", several)
    assert sorted(p.name for p in several.iterdir()) == ["0_good", "1_bad"]


def test_plot_command(good):
    r = CliRunner().invoke(plot, [str(good)])
    assert r.exit_code == 0, r.output
    assert len(r.output.split()) == 4
    assert (good / "plots" / "loss.png").exists()


def test_findings_are_checked_and_sorted():
    with pytest.raises(ValueError, match="severity must be one of"):
        Finding("bad", "widths", "x", [])
    found = [Finding(s, "widths", s, []) for s in ("note", "critical", "warning")]
    assert [f.severity for f in by_severity(found)] == ["critical", "warning", "note"]


@pytest.mark.parametrize("seed", range(12))
def test_no_rule_breaks_on_missing_pieces(seed, tmp_path):
    """Random columns, rows and values taken away."""
    rng = np.random.default_rng(seed)
    rows = healthy_rows(int(rng.integers(1, 150)))
    gone = {k for r in rows for k in r if k != "step" and rng.random() < 0.02}
    kept = [{k: v for k, v in r.items() if k not in gone} for r in rows if rng.random() < 0.9]
    for r in kept:
        for k in r:
            if k != "step" and rng.random() < 0.2:
                r[k] = rng.choice([0.0, 1e30, -1.0]) if rng.random() < 0.5 else None
    kept += [
        {"step": 5, "event": e} for e in ("early_stop", "rollback", "lr_restart", "resume", "odd") if rng.random() < 0.5
    ]
    found = diagnose_log(read_log(write_run(tmp_path / "run", [*kept, {"step": 151, "loss": 1.0}])))
    assert all(f.title and f.evidence for f in found)


def test_a_single_row(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("step 1 loss 2.0 lr 0.1 grad_norm 3 F 0.2 cutoff 128")
    assert diagnose_log(read_log(path)) == []
