"""What the experiment on deciding routers calls words, and that it runs."""

import json

import pytest

from benchmarks.learning import decisive
from benchmarks.tables.experiments import decisive_section


def test_kinds_of_characters():
    names = [decisive.KINDS[k] for k in decisive.kinds("Oh, it's\nన్య \xff".encode() + b"\xe0")]
    assert names == [
        "word_start", "second_letter", "other", "whitespace", "word_start", "second_letter", "other", "word_start",
        "whitespace", *["word_start"] * 3, *["second_letter"] * 3, *["inside_word"] * 3, "whitespace",
        *["word_start"] * 2, "other",
    ]  # fmt: skip


def test_a_run_of_each_arm(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    flags = ["--data", str(tmp_path / "text.txt"), "--results", str(tmp_path / "r.json"), "--steps", "2"]
    for _ in range(2):  # the second finds all done
        decisive.main([*flags, "--arms", "undecided", "both", "--batch-bytes", "256", "--seq-len", "128"])
    data = json.loads((tmp_path / "r.json").read_text())
    assert [r["arm"] for r in data["rows"]] == ["undecided", "both"]
    for row in data["rows"]:
        assert abs(sum(row["boundaries"].values()) - 1) < 1e-9
        assert 0 <= row["p_off"] <= 0.5 < row["p_on"] <= 1
        assert row["val_ce"] > 0
    text = decisive_section(data)
    line = next(x for x in text.splitlines() if "| surprisal 0.1 + entropy 0.1 |" in x)
    shares = [float(x) for x in line.split("|")[-2].split("/")]
    assert shares == pytest.approx(list(data["rows"][1]["boundaries"].values()), abs=0.005)
