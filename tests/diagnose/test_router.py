"""An undecided router is found, and what is said of it is true."""

import re
from dataclasses import fields

import numpy as np
import pytest

from hnet.diagnose.names import canonical
from hnet.diagnose.report import diagnose
from hnet.diagnose.runs import read_log
from hnet.train.config import TrainConfig

from .logs import after, findings, healthy_rows, write_run

EARLY = {"entropy_start": 0.0, "entropy_warmup": 0.1}  # acts in full from step 40 on


def with_p(rows, on, off, stage=0, **more):
    """p on boundaries and elsewhere as functions of the step, F = 1/4, and what follows from them."""
    rng = np.random.default_rng(3)
    s = f"stage{stage}"
    for r in after(rows, 0):
        a, b = (f(r["step"]) + 0.005 * rng.standard_normal() for f in (on, off))
        r |= {f"{s}/p_on": a, f"{s}/p_off": b, f"{s}/F": 0.25, f"{s}/G": 0.25 * a + 0.75 * b, f"{s}/undecided": 0.34}
        r |= {f"{s}/G_minus_F": r[f"{s}/G"] - 0.25, f"{s}/target": 4.0, **{f"{s}/{k}": v for k, v in more.items()}}
        if r["step"] % 20 == 0:
            r[f"{s}/flips"] = 0.5 if r["step"] <= 340 else 0.12
    return rows


def test_an_undecided_router(tmp_path):
    f = findings(write_run(tmp_path / "a", with_p(healthy_rows(), lambda s: 0.63, lambda s: 0.38)))["undecided"]
    assert (f.severity, f.stage) == ("warning", 0)
    assert f.evidence[0].startswith("p is 0.63 on boundaries (but for first positions) and 0.38 elsewhere")
    assert "34 % of positions are within 0.1 of 1/2; G - F is +0.19." in f.evidence[0]
    assert f.evidence[1].startswith("The EMA mixes 37 % of the chunk before into each, ")
    assert "from one evaluation to the next 12 % of the boundaries moved" in f.evidence[1]
    assert "decisiveness.png" in f.evidence[-1]


@pytest.mark.parametrize(("on", "off"), [(0.78, 0.19), (0.92, 0.05), (1.0, 0.0)])
def test_a_decided_router(on, off, tmp_path):
    assert "undecided" not in findings(write_run(tmp_path / "a", with_p(healthy_rows(), lambda s: on, lambda s: off)))


def test_first_positions_decide_nothing(tmp_path):
    """Two chunks a sequence: half of the boundaries have p = 1 because a sequence begins there. 0.82 is 0.64."""
    rows = with_p(healthy_rows(), lambda s: 0.82, lambda s: 0.30, chunks_per_sequence=2.0)
    assert "p is 0.64 on boundaries" in findings(write_run(tmp_path / "a", rows))["undecided"].evidence[0]
    rows = with_p(healthy_rows(), lambda s: 0.82, lambda s: 0.30, chunks_per_sequence=200.0)
    assert "undecided" not in findings(write_run(tmp_path / "b", rows))


def test_the_inner_stage_is_named(tmp_path):
    rows = with_p(with_p(healthy_rows(), lambda s: 0.95, lambda s: 0.1), lambda s: 0.6, lambda s: 0.4, stage=1)
    f = findings(write_run(tmp_path / "a", rows, compression=[4.0, 4.0], preset="small_2stage"))["undecided"]
    assert f.stage == 1


def test_it_is_judged_when_it_can_be(tmp_path):
    """Not in the first quarter; not before the entropy term acts in full; by the end, not by the beginning."""

    def both(step):
        return 0.6 if step < 300 else 0.98, 0.4 if step < 300 else 0.02

    decided_late = with_p(healthy_rows(), lambda s: both(s)[0], lambda s: both(s)[1])
    assert "undecided" not in findings(write_run(tmp_path / "a", decided_late))
    young = write_run(tmp_path / "b", decided_late[:90])
    assert "undecided" not in findings(young)
    assert "undecided" in findings(write_run(tmp_path / "c", decided_late[:290]))
    waits = {"entropy_weight": [0.1], "entropy_start": 0.3, "entropy_warmup": 0.4}  # in full at 280, judged from 320
    assert "undecided" not in findings(write_run(tmp_path / "d", decided_late[:290], **waits))
    late = with_p(healthy_rows(), lambda s: 0.6, lambda s: 0.4)
    f = findings(write_run(tmp_path / "e", late, **waits))["undecided"]
    assert f.steps == (320, 400)
    assert (f.severity, f.keys) == ("note", {})  # the term has acted in full for 120 steps
    assert "acted in full for 120 steps" in " ".join(f.evidence)
    f = findings(write_run(tmp_path / "f", late, entropy_weight=[0.1], **EARLY))["undecided"]
    assert f.severity == "warning"  # 360 steps
    assert f.keys["entropy_weight"] == [0.2]
    assert "entropy_weight is 0.1 now; a smaller entropy_start helps too" in f.change


def test_weights_by_stage(tmp_path):
    rows = with_p(with_p(healthy_rows(), lambda s: 0.6, lambda s: 0.4), lambda s: 0.6, lambda s: 0.4, stage=1)
    run = write_run(
        tmp_path / "a",
        rows,
        compression=[4.0, 4.0],
        preset="small_2stage",
        entropy_weight=[0.1, 0.0],
        entropy_start=0.0,
        entropy_warmup=0.1,
    )
    outer, inner = [f for f in diagnose(read_log(run)) if f.name == "undecided"]
    assert any("0.1 now" in c for c in outer.change)
    assert any("--entropy-weight" in c for c in inner.advice)


def test_older_and_foreign_logs_by_F_and_G(tmp_path):
    """G = F p_on + (1 - F) p_off, so p elsewhere is at least (G - F) / (1 - F)."""
    rows = healthy_rows(f=0.25, g=0.475)
    assert not any("p_on" in k for r in rows for k in r)
    f = findings(write_run(tmp_path / "a", rows))["undecided"]
    assert f.severity == "note"  # a bound
    least = re.search(r"p elsewhere than on boundaries is (0\.\d+) or more", f.evidence[0])[1]
    assert float(least) == pytest.approx(0.3, abs=0.02)
    assert not any("png" in e for e in f.evidence)
    assert "undecided" not in findings(write_run(tmp_path / "b", healthy_rows()))
    text = "\n".join(f"step {s}: loss 2.0 boundary_rate 0.25 mean_boundary_prob 0.45" for s in range(1, 60))
    (tmp_path / "foreign.txt").write_text(text)
    assert "undecided" in findings(tmp_path / "foreign.txt")


def test_advice_names_keys_that_exist(tmp_path):
    keys = {f.name for f in fields(TrainConfig)}
    rows = with_p(healthy_rows(), lambda s: 0.63, lambda s: 0.38)
    for i, config in enumerate(({}, {"entropy_weight": [0.1], **EARLY}, {"surprisal_weight": [0.05]})):
        change = findings(write_run(tmp_path / str(i), rows, **config))["undecided"].advice
        named = {n.replace("-", "_") for n in re.findall(r"(?<=--)[\w-]+|\b\w+_\w+\b", " ".join(change))}
        assert named
        assert named <= keys
        weight = {f"{k}_weight" for k in ("entropy", "surprisal")}
        assert named & weight == (weight if "surprisal_weight" not in config else {"entropy_weight"})


def test_names_of_columns():
    for name in ("p_on", "p_off", "undecided", "G_minus_F", "flips"):
        assert canonical(f"stage1/{name}") == f"stage1/{name}"
