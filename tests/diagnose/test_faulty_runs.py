"""The library of faulty runs in small: some are trained, judged and tabulated. `python -m benchmarks.faulty_runs`"""

import pytest

from benchmarks.faulty_runs import faults, judge
from benchmarks.faulty_runs.texts import duplicated, invalid, plain
from benchmarks.tables.faulty_runs import faulty_runs_section
from hnet.diagnose.catalogue import CATALOGUE

STEPS = {"steps": 96, "eval_every": 48, "checkpoint_every": 96, "batch_bytes": 1024, "eval_bytes": 2048}
SMALL = [r for r in (*faults.FAULTS, *faults.HEALTHY) if r.small]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("faulty")
    plain(root / "texts" / "plain")
    return root


@pytest.mark.parametrize("run", SMALL, ids=[r.name for r in SMALL])
def test_a_small_run(run, root):
    judge.make(run, root, root / "texts", **STEPS)
    row = judge.judge(run, root)
    assert row["steps"] == 96
    assert bool(row["found"]) != row["healthy"], row
    if row["healthy"]:
        assert "critical" not in row["others"].values()
    assert f"| {run.name} |" in faulty_runs_section({"rows": [row], "machine": MACHINE}) or row["healthy"]


MACHINE = {"cpu": "", "torch": "", "date": "", "command": ""}


def test_the_table_tells_found_from_missed():
    usual = {"run": "a", "healthy": False, "found": {"leak": "critical"}, "others": {}, "seconds": 1.0, "steps": 9}
    rows = [usual, usual | {"found": {}, "others": {"slow": "warning"}}, usual | {"found": {"leak": "note"}}]
    rows += [usual | {"healthy": True, "found": {}, "others": {"leak": "critical"}}]
    text = faulty_runs_section({"rows": rows, "machine": MACHINE})
    assert "2 of 3 faults found (67 %), 1 of them as a note only; 1 of 1 healthy runs with a critical" in text
    assert text.count("**missed**") == text.count("**false alarm**") == 1


def test_faults_that_no_rule_was_made_for_have_a_table_of_their_own():
    row = {"run": "a", "healthy": False, "found": {"leak": "warning"}, "others": {}, "seconds": 1.0, "steps": 9}
    rows = [row | {"run": "b", "unseen": "learnt", "at_first": []}, row | {"unseen": "learnt", "at_first": ["leak"]}]
    rows += [row | {"found": {}, "unseen": "fresh", "at_first": []}]
    text = faulty_runs_section({"rows": [row, *rows], "machine": MACHINE})
    assert "1 of 1 faults found (100 %)" in text
    assert "of 2 faults the rules as they were named 1, and name 2" in text
    assert "of 1 written down after that, 0 are named" in text
    assert "| b | 9 | yes | **missed** | found | `leak` warning |" in text


def test_every_fault_has_a_name_of_ours_and_a_valid_config(tmp_path):
    runs = (*faults.FAULTS, *faults.UNSEEN, *faults.HEALTHY)
    assert len({r.name for r in runs}) == len(runs)
    assert len(faults.HEALTHY) == 6
    for r in runs:
        assert set(r.found_by) <= CATALOGUE.keys()
        assert judge.config(r, tmp_path, tmp_path).validate()
    for spoil in (duplicated, invalid):
        spoil(tmp_path / spoil.__name__)
        assert any((tmp_path / spoil.__name__).iterdir())
