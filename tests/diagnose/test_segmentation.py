"""Chunking rules."""

import numpy as np
import pytest

from .logs import after, findings, healthy_rows, ratio_loss, write_run


def set_rate(rows, f, g, target=4.0, stage=0):
    """F and G of a stage as functions of the step."""
    rng = np.random.default_rng(2)
    for r in after(rows, 0):
        share = min(f(r["step"]) * (1 + 0.02 * rng.standard_normal()), 1.0)
        mean = g(r["step"])
        r |= {f"stage{stage}/F": share, f"stage{stage}/G": mean, f"stage{stage}/target": target}
        r[f"stage{stage}/ratio_loss"] = ratio_loss(share, mean, target)
    return rows


def test_collapse_to_one_byte_a_chunk(tmp_path):
    rows = set_rate(healthy_rows(), lambda s: min(0.3 + s / 200, 0.999), lambda s: 0.3)
    f = findings(write_run(tmp_path / "a", rows))["collapse_open"]
    assert (f.severity, f.stage) == ("critical", 0)
    assert f.keys == {"ratio_weight": 2.0, "rate_control": "bias"}


def test_collapse_to_one_chunk_a_document(tmp_path):
    rows = set_rate(healthy_rows(), lambda s: 0.0011, lambda s: 0.2)
    found = findings(write_run(tmp_path / "a", rows))
    assert found["collapse_closed"].severity == "critical"
    assert "1.1 chunks a sequence of 1024 bytes" in found["collapse_closed"].evidence[0]
    assert "target_missed" not in found


def test_collapse_of_an_inner_stage_counts_in_its_own_positions(tmp_path):
    """F = 1/100 of stage 1 behind 10 bytes a chunk at 1024-byte sequences is one chunk a document."""
    rows = set_rate(healthy_rows(), lambda s: 0.1, lambda s: 0.12, target=10.0)
    set_rate(rows, lambda s: 0.012, lambda s: 0.2, target=3.0, stage=1)
    found = findings(write_run(tmp_path / "a", rows, compression=[10.0, 3.0], preset="small_2stage"))
    assert found["collapse_closed"].stage == 1


def test_guard_events_of_a_collapse_that_passed(tmp_path):
    rows = healthy_rows()
    rows.insert(100, {"step": 99, "event": "collapse_open", "message": "F 0.97"})
    f = findings(write_run(tmp_path / "a", rows))["collapse_open"]
    assert f.severity == "warning"
    assert "F 0.97" in f.evidence[0]


def test_missed_target_behind_a_ratio_loss_of_one(tmp_path):
    rows = set_rate(healthy_rows(), lambda s: 0.36, lambda s: 0.25)
    f = findings(write_run(tmp_path / "a", rows))["target_missed"]
    assert f.severity == "critical"
    assert "though its ratio loss is near 1" in f.title
    assert "target 4 (-31%)" in f.evidence[0]
    assert "L - 1 = N^2/(N-1) (F - 1/N)(G - 1/N)" in f.evidence[1]
    assert f.keys["ratio_weight"] > 0.5
    assert f.keys["rate_control"] == "bias"
    f = findings(write_run(tmp_path / "b", set_rate(rows, lambda s: 0.5, lambda s: 0.6)))["target_missed"]
    assert "though" not in f.title  # here the loss says it
    rows = set_rate(rows, lambda s: 0.29, lambda s: 0.25)  # 14 % off
    assert "target_missed" not in findings(write_run(tmp_path / "c", rows))


def test_target_of_a_log_with_bytes_per_chunk_alone(tmp_path):
    """bytes_per_chunk counts from the bytes: 4 and 8 are 4 and 2 positions a chunk."""
    rows = healthy_rows()
    for r in after(rows, 0):
        del r["stage0/F"], r["stage0/G"]
        r |= {"stage0/bytes_per_chunk": 4.0, "stage1/bytes_per_chunk": 8.0, "stage1/target": 3.0}
    f = findings(write_run(tmp_path / "a", rows, compression=[4.0, 3.0], preset="small_2stage"))["target_missed"]
    assert f.stage == 1
    assert "2.00 positions a chunk" in f.evidence[0]


def test_drift(tmp_path):
    rows = set_rate(healthy_rows(), lambda s: 0.25, lambda s: 0.26 + 0.0008 * s)
    f = findings(write_run(tmp_path / "a", rows))["drift"]
    assert f.severity == "warning"
    rows = set_rate(healthy_rows(), lambda s: 0.25, lambda s: 0.44)  # far apart but steady: usual for small models
    assert "drift" not in findings(write_run(tmp_path / "b", rows))


def test_budget(tmp_path):
    rows = healthy_rows()
    rows.insert(10, {"step": 9, "event": "budget_overflow", "message": "12 boundaries dropped"})
    assert "12 boundaries dropped" in findings(write_run(tmp_path / "a", rows))["budget_overflow"].evidence[0]


@pytest.mark.parametrize("given", [[256, 256], "256 256", "256,256"])
def test_widths_that_do_not_grow(given, tmp_path):
    f = findings(write_run(tmp_path / "a", healthy_rows(), d_model=given))["widths"]
    assert "256 256" in f.evidence[0]
    assert f.keys["d_model"] == [256, 384]
    assert "widths" not in findings(write_run(tmp_path / "b", healthy_rows(), d_model=[256, 512]))
