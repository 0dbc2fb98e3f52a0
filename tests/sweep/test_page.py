"""docs/sweep.md keeps step. `python -m tests.sweep.test_page` rewrites its keys."""

import json
import re
from pathlib import Path

from hnet.config.keys import fields
from hnet.sweep.config import read_sweep
from hnet.sweep.keys import SAMPLERS, SweepKeys
from hnet.sweep.objective import FUNCTIONS

PAGE = Path(__file__).parents[2] / "docs" / "sweep.md"
MARK = re.compile(r"(<!-- keys of a sweep -->\n).*?(<!-- end of keys -->)", re.DOTALL)


def update(text):
    lines = ["| key | default | |", "|---|---|---|"]
    lines += [f"| `{f.name}` | `{json.dumps(f.default)}` | {f.metadata['help']} |" for f in fields(SweepKeys)]
    return MARK.sub(lambda m: m[1] + "\n".join(lines) + "\n" + m[2], text)


def test_keys():
    text = PAGE.read_text()
    assert len(MARK.findall(text)) == 1
    assert text == update(text), "run `python -m tests.sweep.test_page`"


def test_samplers_and_functions():
    text = PAGE.read_text()
    assert re.findall(r"^\| `(\w+)` \| (?=Optuna's TPE|independent|every comb|the base)", text, re.MULTILINE) == [
        *SAMPLERS
    ]
    assert all(f"`{name}`" in text for name in FUNCTIONS)


def test_the_example_is_a_sweep(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "configs").mkdir()
    base = PAGE.parents[1] / "configs" / "laptop.toml"
    (tmp_path / "configs" / "laptop.toml").write_text(base.read_text())
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.toml").write_text(example)
    sweep = read_sweep(tmp_path / "sweeps" / "mine.toml").validate()
    assert sweep.values["ngrams"] == [2, 3, 4]
    assert [p.name for p in sweep.parameters] == ["learning_rate", "decay_fraction", "compression", "size"]


if __name__ == "__main__":
    PAGE.write_text(update(PAGE.read_text()))
