"""`hnet segment --score`: what it prints is what `score` says of the model's boundaries."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from hnet.cli import main
from hnet.cli.segment_score import joined
from hnet.segment import Segmentation, Stage, segment_file
from hnet.segment.scores import score

TEXT = "evlerimizde kaldım, evde kal. పుస్తకాలలో ఇల్లు 👍🏽 .\n".encode() * 20


def run(*args):
    return CliRunner().invoke(main, ["segment", *(str(a) for a in args)])


@pytest.fixture(scope="module")
def saved(two_stages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    two_stages.save_pretrained(folder)
    return folder


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def test_pieces_joined():
    """Two pieces: ab|cd and |ef, p 0.9 0.2 0.8 0.45 and 0.3 0.5: on boundaries 0.9 0.8 0.3... the third begins at c"""
    p = np.array([0.9, 0.2, 0.8, 0.45], dtype=np.float32), np.array([0.7, 0.5], dtype=np.float32)
    nats = np.log(2) * np.ones(4, dtype=np.float32), 3 * np.log(2) * np.ones(2, dtype=np.float32)
    pieces = [
        Segmentation(b"abcd", nats[0], (Stage(np.arange(4), p[0], np.array([0, 2])),)),
        Segmentation(b"ef", nats[1], (Stage(np.arange(2), p[1], np.array([0])),), offset=4),
    ]
    text, starts, about = joined(pieces, [0])
    assert text == b"abcdef"
    assert starts["stage 0"].tolist() == [0, 2, 4]
    assert about["stage 0"] == pytest.approx(
        {"p_on": 0.8, "p_off": (0.2 + 0.45 + 0.5) / 3, "undecided": 2 / 6, "bits_per_byte": 10 / 6}
    )
    assert joined([], [0])[0] == b""


def test_rows_as_json(two_stages, saved, file):
    gold = file.with_name("gold.txt")
    gold.write_text("ev+ler+im+iz+de\nkal+dı+m\nev+de\n")
    args = [saved, file, "--score", "--format", "jsonl", "--seq-len", 256, "--morphemes", gold, "--separator", "+"]
    r = run(*args)
    assert r.exit_code == 0, r.output
    rows = [json.loads(line) for line in r.stdout.splitlines()]
    by_name = {row["name"]: row for row in rows}
    assert list(by_name)[:5] == ["stage 0", "stage 0, predicted", "stage 1", "stage 1, predicted", "every byte"]
    text, starts, _ = joined(segment_file(two_stages, file, seq_len=256), [0, 1])
    assert text == TEXT
    known = {"evlerimizde": ("ev", "ler", "im", "iz", "de"), "kaldım": ("kal", "dı", "m"), "evde": ("ev", "de")}
    for name in ("stage 0", "stage 1"):
        wanted = score(text, starts[name], morphemes=known, graphemes=False)
        for key in ("bytes_per_chunk", "char_start_share", "word_starts_found", "histogram"):
            assert by_name[name][key] == wanted[key]
        assert by_name[name]["morphemes"]["recall"] == wanted["morphemes"]["recall"]
        assert by_name[name]["p_on"] > by_name[name]["p_off"]
        assert 7 < by_name[name]["bits_per_byte"] < 9  # untrained
    assert by_name["random bytes"]["bytes_per_chunk"] == pytest.approx(by_name["stage 0"]["bytes_per_chunk"], rel=0.01)
    only = [json.loads(line)["name"] for line in run(*args, "--stage", 1).stdout.splitlines()]
    assert only == [name for name in by_name if not name.startswith("stage 0")]


def test_tables(saved, file):
    for package in ("regex", "morfessor", "tokenizers"):
        pytest.importorskip(package)
    r = run(saved, file, "--score", "--morphemes", "morfessor")
    assert r.exit_code == 0, r.output
    for words in (
        "stage 0",
        "random characters",
        "graphemes",
        "R-value",
        "starts of morphemes",
        "bytes a chunk, 1 to 32",
    ):
        assert words in r.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--morphemes", "morfessor"], "--morphemes goes with --score"),
        (["--score", "--format", "html"], "--score prints tables, or with --format jsonl a line a row, got html"),
        (["--score", "--morphemes", "nowhere.txt"], "cannot read nowhere.txt"),
    ],
)
def test_mistakes(saved, file, args, message):
    r = run(saved, file, *args)
    assert r.exit_code == 1
    assert message in r.output
