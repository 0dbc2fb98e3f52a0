"""--write-config, --against, --compare: on a run really trained, and on the history."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

from hnet.cli.diagnose import diagnose
from hnet.cli.train import configuration
from hnet.config import toml
from hnet.config.keys import parse_toml, read_toml
from hnet.diagnose import fixes
from hnet.diagnose.report import examine
from hnet.diagnose.runs import read_log
from hnet.errors import UserError
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer
from tests.train.conftest import tiny

from . import history
from .logs import healthy_rows, write_run


def run(*args):
    return CliRunner().invoke(diagnose, [str(a) for a in args])


def keys(path):
    return dataclasses.asdict(TrainConfig(**read_toml(path, TrainConfig)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that warms up all the way, with a decay that never comes."""
    config = tiny(tmp_path_factory.mktemp("trained") / "run")
    config.warmup_steps, config.schedule, config.learning_rate = 8, "constant", 0.01
    Trainer(config).train()
    return tmp_path_factory.getbasetemp() / config.out


def test_the_fixed_config_validates_and_trains(trained, tmp_path):
    fixed = tmp_path / "fixed.toml"
    assert run(trained, "--write-config", fixed).exit_code == 1  # the warm-up is critical
    text = fixed.read_text()
    before = text[: text.index("\nwarmup_steps = ")].splitlines()
    assert any("warmup_all: The warm-up is as long as the run (was 8)" in line for line in before[-4:])
    values, old = keys(fixed), keys(trained / "config.toml")
    assert values["warmup_steps"] == 1
    assert values["learning_rate"] == 0.002
    assert values["out"] == old["out"] + "-fixed"
    asked = {k for f in examine(read_log(trained)).findings for k in f.keys}
    assert {k for k in old if values[k] != old[k]} <= asked | {"out"}
    config = configuration(TrainConfig, str(fixed), None, {"out": str(tmp_path / "again"), "steps": 2})
    Trainer(config).train()
    assert read_log(tmp_path / "again").last_step == 2


def test_only_what_is_accepted(trained, tmp_path):
    fixed = tmp_path / "fixed.toml"
    run(trained, "--write-config", fixed, "--accept", "warmup_all")
    values, old = keys(fixed), keys(trained / "config.toml")
    assert {k for k in old if values[k] != old[k]} == {"warmup_steps", "out"}
    with pytest.raises(UserError, match="accept must name findings of the run .*, got widths"):
        fixes.write_config(examine(read_log(trained)), ["widths"])


def test_against_says_cause_by_cause(trained, tmp_path):
    fixed = tmp_path / "fixed.toml"
    run(trained, "--write-config", fixed)
    r = run(fixed, "--against", trained, "--json")
    found = json.loads(r.stdout)
    assert found["generation"]["path"] == str(trained)  # the fixed run has not been made
    assert [x["temperature"] for x in found["generation"]["rows"]][-1] is None
    assert all(f["analysis"] == "generation" for f in found["generation"]["findings"])
    states = {f["id"]: f["state"] for f in found["fixes"]}
    assert r.exit_code == 0
    assert states["warmup_all"] == states["lr_high"] == "applied"
    r = run(trained / "config.toml", "--against", trained, "--no-checkpoint")
    assert r.exit_code == 1
    assert "missing   warmup_all: The warm-up is as long as the run" in r.output
    assert "warmup_steps: was 8, is 8, asked for 1" in r.output


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, "missing"),
        ({"lr_multipliers": [2.0, 1.5, 1.0]}, "applied"),
        ({"lr_multipliers": [1.8, 1.4, 1.0]}, "applied"),
        ({"lr_multipliers": [1.0, 1.5, 2.0]}, "missing"),
        ({"lr_multipliers": [2.9, 1.7, 1.0]}, "missing"),
    ],
)
def test_a_list_is_judged_by_its_spread(change, state, tmp_path):
    (tmp_path / "train.log").write_text(history.text(history.rows()))
    (tmp_path / "config.toml").write_text(toml.dumps(history.CONFIG))
    other = tmp_path / "other.toml"
    other.write_text(toml.dumps(history.CONFIG | change | {"warmup_steps": 4000}))
    found = {f.finding.name: f for f in fixes.against(read_log(other), examine(read_log(tmp_path / "train.log")))}
    assert found["lr_multipliers"].state == state
    assert found["warmup"].state == "missing"  # 4,000 are not 5,000
    assert found["unfinished"].state == "elsewhere"


def test_the_fixed_config_of_the_history(tmp_path):
    (tmp_path / "train.log").write_text(history.text(history.rows()))
    (tmp_path / "config.toml").write_text(toml.dumps(history.CONFIG))
    text = fixes.write_config(examine(read_log(tmp_path / "train.log")))
    (tmp_path / "fixed.toml").write_text(text)
    values = parse_toml(tmp_path / "fixed.toml")
    wanted = {
        "lr_multipliers": [2.0, 1.5, 1.0], "warmup_steps": 5000, "learning_rate": 2e-4, "clipping": "adaptive",
        "max_grad_norm": 5.0, "steps": 100_000,
    }  # fmt: skip
    assert wanted.items() <= values.items()
    TrainConfig(**read_toml(tmp_path / "fixed.toml", TrainConfig)).validate()
    assert "temperature" in text[: text.index("\npreset")]  # named as no key of ours


def test_compare(tmp_path):
    a = write_run(tmp_path / "a", healthy_rows())
    b = write_run(tmp_path / "b", healthy_rows(f=0.999), learning_rate=2e-3)
    found = json.loads(run("--compare", a, b, "--json").stdout)
    assert found["config"] == {"learning_rate": [1e-3, 2e-3]}
    assert found["findings"]["new"] == ["collapse_open"]
    chunk = found["summary"]["bytes_per_chunk.stage0"]
    assert chunk[0] > 3.5
    assert chunk[1] < 1.2
    assert "learning_rate" in run("--compare", a, b).output
    assert "takes two runs" in str(run("--compare", a).exception)


def test_fail_on(tmp_path):
    rows = healthy_rows()
    a = write_run(tmp_path / "a", rows, learning_rate=0.02)
    assert run(a).exit_code == 0
    assert run(a, "--fail-on", "warning").exit_code == 1
