"""The formula and the metrics it may name."""

import json
import math
from pathlib import Path

import pytest

from hnet.errors import UserError
from hnet.sweep.objective import Formula, known_metrics
from hnet.train.loop import Trainer

from ..train.conftest import config  # noqa: F401 (a fixture)

ROW = {"step": 8, "val_bpb": 2.0, "ratio_loss": 1.5, "stage0/ratio_loss": 9.0, "stage0/target": 4.0, "stage1/F": 0.25,
       "stage0/val_bytes_per_chunk": 5.0, "bad": None}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("val_bpb", 2.0),
        ("val_bpb + 0.5*abs(val_bytes_per_chunk/target - 1)", 2.125),
        ("stage0/val_bytes_per_chunk / stage0/target", 1.25),
        ("stage1/F * stage1_F", 0.0625),
        ("ratio_loss", 1.5),  # the run's own comes before the outermost stage's
        ("-max(val_bpb, 3) ** 2", -9.0),
        ("min(1, 2, log2(8)) + sqrt(4) + exp(0) + log(1)", 4.0),
    ],
)
def test_values(text, value):
    assert Formula(text)(ROW) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("__import__('os').system('true')", "not arithmetic"),
        ("val_bpb.real", "not arithmetic"),
        ("[val_bpb]", "not arithmetic"),
        ("lambda: 1", "not arithmetic"),
        ("val_bpb if 1 else 2", "not arithmetic"),
        ("'a'", "not arithmetic"),
        ("True", "not arithmetic"),
        ("eval(val_bpb)", "no function eval()"),
        ("abs(val_bpb, 1)", "abs() of 2 numbers"),
        ("max(val_bpb)", "max() of 1 numbers"),
        ("log(x=1)", "no function log()"),
        ("val_bpb +", "not a formula"),
        ("", "not a formula"),
        ("(" * 5000, "not a formula"),
    ],
)
def test_nothing_else(text, says):
    with pytest.raises(UserError) as e:
        Formula(text)
    assert says in str(e.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [("bad", "bad is not a number"), ("absent", "absent is not a number"), ("1 / (val_bpb - 2)", "division by zero"),
     ("log(val_bpb - 3)", "domain"), ("9 ** 9 ** 9", "range"), ("exp(700) * exp(700)", "inf")],
)  # fmt: skip
def test_no_value(text, says):
    with pytest.raises(UserError, match=says):
        Formula(text)(ROW)


def test_an_unknown_metric_is_named_with_those_there_are():
    with pytest.raises(UserError) as e:
        Formula("val_pbb + 1").check(["val_bpb", "stage0/target"])
    assert "unknown metric 'val_pbb', the closest is 'val_bpb'; known are stage0/target, val_bpb" in str(e.value)
    Formula("target + stage0/target + val_bpb").check(["val_bpb", "stage0/target"])


def test_known_metrics_are_those_of_a_run(config):  # noqa: F811
    """One of the same kind, other in size and data."""
    config.steps, config.weight_ema, config.rate_control = 8, 0.9, "bias"
    known = known_metrics([config.validate()])
    Trainer(config).train()
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert {k for r in rows if "val_bpb" in r and "event" not in r for k in r} <= {*known, "step", "time"}
    assert set(known) <= {k for r in rows for k in r}
    assert math.isfinite(Formula("ema_val_bpb + stage0/logit_bias + flips")(rows[-1]))
