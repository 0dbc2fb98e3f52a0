"""Held-out lines kept at every evaluation, and the page made of them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hnet.cli import main
from hnet.data.corpus import Corpus
from hnet.data.packing import eval_batches
from hnet.errors import UserError
from hnet.metrics_log import read_metrics
from hnet.segment import segment
from hnet.segment.timeline import timeline
from hnet.train.flips import chunk_starts
from hnet.train.held_out_lines import LONGEST, HeldOutLines
from hnet.train.loop import Trainer
from tests.train.conftest import tiny

TEXT = "".join(f"line number {i} of తెలుగు text\n" for i in range(40)).encode() + b"\xff not UTF-8 at all\n" + b"x" * 300


def test_lines_hold_the_boundaries_of_the_evaluation(two_stages):
    corpus, masks, found = Corpus.of([TEXT, TEXT[7:]]), [], []
    for batch in eval_batches(corpus, 512, 1024, None):
        out = two_stages(batch.input_ids, cu_seqlens=batch.cu_seqlens)
        masks.append(chunk_starts(out.routing).numpy())
        for a, b in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
            piece = bytes(batch.input_ids[a + 1 : b].tolist())
            found.append((piece, segment(two_stages, piece)))
    lines = HeldOutLines()
    kept = lines.read(np.concatenate(masks, axis=1), eval_batches(corpus, 512, 1024, None))
    assert 8 < len(kept) <= 16
    for line in kept:
        text = line["text"].encode()
        assert len(text) <= LONGEST
        matches = []
        for piece, s in found:
            for m in re.finditer(re.escape(text), piece):
                inside = [stage.starts[(stage.starts >= m.start()) & (stage.starts < m.end())] for stage in s.stages]
                matches.append([(x - m.start()).tolist() for x in inside])
                if m.start() == 0:  # there is what begins at BOS, which is no byte of the line
                    matches.append([x[1:] for x in matches[-1]])
        assert line["starts"] in matches, text
    other = np.zeros_like(np.concatenate(masks, axis=1))
    again = lines.read(other, ())  # the same lines, without another look at the text
    assert [x["text"] for x in again] == [x["text"] for x in kept]
    assert all(x["starts"] == [[], []] for x in again)


def test_a_run_that_goes_on_keeps_the_same(tmp_path):
    config = replace(tiny(tmp_path / "run"), steps=4, eval_every=2, checkpoint_every=2)
    Trainer(config).train()
    file = Path(config.out) / "held_out.jsonl"
    before = file.read_bytes()
    kept = read_metrics(file)
    assert [row["step"] for row in kept] == [0, 2, 4]
    texts = [[line["text"] for line in row["lines"]] for row in kept]
    assert texts[0] == texts[1] == texts[2] != []
    Trainer(config, resume=Path(config.out) / "checkpoints" / "step_00000002").train()
    assert file.read_bytes() == before
    (aside,) = Path(config.out).glob("abandoned/*/held_out.jsonl")
    assert read_metrics(aside) == kept[2:]


EVALUATIONS = [
    {"step": 0, "lines": [{"text": "un </script> é", "starts": [[0, 2, 14], [0]]}]},
    {"step": 50, "lines": [{"text": "un </script> é", "starts": [[0, 3], [0, 3]]}]},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(e) + "\n" for e in EVALUATIONS) + '{"step": 9')
    rows = [{"step": 0, "val_bpb": 8.0}, {"step": 1, "loss": 2.0}, {"step": 50, "val_bpb": 2.5, "stage0/flips": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_the_page_has_the_chunks_of_every_evaluation(run):
    page = timeline(run)
    (data,) = re.findall(r'id="data">(.*?)</script>', page)
    first, second = json.loads(data)["evaluations"]
    assert [first["step"], second["step"]] == [0, 50]
    assert (first["numbers"], second["numbers"]) == ({"bpb": 8.0}, {"bpb": 2.5, "stage0/flips": 0.75})
    assert first["lines"][0][0] == [[0, "un", 0, 1], [2, " </script> ", 0, 1], [-1, "C3", 1, 0], [14, "A9", 1, 1]]
    assert second["lines"][0][1] == [[0, "un ", 0, 1], [3, "</script> é", 0, 1]]
    assert page.count("</script>") == 2
    assert not re.search(r"https?://(?!www.w3.org/2000/svg)|@import|url\(", page)


def test_the_command_writes_it(run, tmp_path):
    r = CliRunner().invoke(main, ["segment", str(run), "--timeline", "--out", str(tmp_path / "t.html")])
    assert (r.exit_code, r.output) == (0, "")
    assert (tmp_path / "t.html").read_text() == timeline(run)
    r = CliRunner().invoke(main, ["segment", str(tmp_path / "none"), "--timeline"])
    assert (r.exit_code, r.stderr.count("\n")) == (1, 1)
    assert "holds no held_out.jsonl" in r.stderr


def test_a_run_without_lines_is_named(tmp_path):
    (tmp_path / "held_out.jsonl").write_text('{"step": 1')
    with pytest.raises(UserError, match="no whole evaluation"):
        timeline(tmp_path)
