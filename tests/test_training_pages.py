"""docs/training.md and docs/chunk_lm.md keep step. `python -m tests.test_training_pages` rewrites their keys."""

import json
import re
from pathlib import Path

import pytest

from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.config.keys import fields
from hnet.config.run import RunConfig
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

from .train.conftest import config  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / "training.md", ROOT / "docs" / "chunk_lm.md"]
MARK = re.compile(r"(<!-- keys:(\w+) -->\n).*?(<!-- end of keys -->)", re.DOTALL)


def default(f):
    return f.default_factory() if callable(f.default_factory) else f.default


def table(name):
    """Every key of an H-Net's run; those of a ChunkLM that are not keys of any run, or have another default there."""
    cls = {"TrainConfig": TrainConfig, "ChunkLMTrainConfig": ChunkLMTrainConfig}[name]
    common = {} if cls is TrainConfig else {f.name: default(f) for f in fields(RunConfig)}
    lines = ["| key | default | |", "|---|---|---|"]
    for f in fields(cls):
        if f.name not in common or common[f.name] != default(f):
            shown = json.dumps(default(f), ensure_ascii=False)
            lines.append(f"| `{f.name}` | `{shown}` | {f.metadata['help'].replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def update(text):
    return MARK.sub(lambda m: m[1] + table(m[2]) + m[3], text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_keys(page):
    text = page.read_text()
    assert len(MARK.findall(text)) == 1
    assert text == update(text), "run `python -m tests.test_training_pages`"


def test_every_event_has_its_line():
    code = "".join(p.read_text() for p in (ROOT / "hnet").rglob("*.py"))
    events = set(re.findall(r'Event\(\s*"(\w+)"', code)) | set(re.findall(r'"event": "(\w+)"', code))
    assert {"non_finite", "disk_full", "cutoff_raised"} <= events
    guards = PAGES[0].read_text().partition("## Guards")[2].partition("\n## ")[0]
    assert events == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", guards, re.MULTILINE))))


def test_every_metric_has_its_line(config):  # noqa: F811
    config.steps = config.eval_every = 2
    config.weight_ema, config.max_chunks = 0.9, [1.0]
    Trainer(config).train()
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    keys = {re.sub(r"^stage\d", "stageI", k) for r in rows for k in r if "event" not in r}
    section = PAGES[0].read_text().partition("## Metrics")[2].partition("\n## ")[0]
    assert keys - set(re.findall(r"`([\w/]+)`", section)) == set()


def test_files_that_are_named_exist():
    for page in [*PAGES, ROOT / "README.md"]:
        for name in re.findall(r"\b(?:configs|tests|benchmarks|docs|hnet)/[\w/]+\.(?:py|toml|md)", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(update(path.read_text()))
