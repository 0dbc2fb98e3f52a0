"""Segmentations to compare with: what they are on small texts, and at which rate."""

import numpy as np
import pytest

from hnet.errors import UserError
from hnet.segment import baselines as b
from hnet.segment import optional
from hnet.segment.characters import Characters
from hnet.segment.morphemes import morfessor, read_morphemes
from hnet.segment.report import score_rows

TURKISH = " ".join(
    root + number + owner + case
    for root in ("ev", "el", "diş", "göl", "iş", "gün", "yüz", "söz")
    for number in ("", "ler")
    for owner in ("", "imiz", "iniz")
    for case in ("", "de", "den", "e")
)


def test_whitespace():
    chars = Characters("  a b,  ç\nd".encode())
    assert b.whitespace(chars).tolist() == [0, 2, 4, 8, 11][1:]
    assert b.whitespace(Characters(b"")).tolist() == []


def test_random_has_the_rate_and_the_places():
    chars = Characters("రాము ".encode() * 100)
    everywhere, characters = (f(chars, 5.0, seed=1) for f in (b.random_bytes, b.random_characters))
    assert len(everywhere) == len(characters) == 1300 // 5
    assert everywhere[0] == characters[0] == 0
    assert len(np.unique(everywhere)) == len(everywhere)
    assert np.isin(characters, chars.start).all()
    assert not np.isin(everywhere, chars.start).all()
    assert (b.random_bytes(chars, 5.0, seed=1) == everywhere).all()
    assert (b.random_bytes(chars, 5.0, seed=2) != everywhere).any()
    assert len(b.random_characters(chars, 0.5)) == 500  # all there are


@pytest.mark.parametrize("rate", [1.0, 1.5, 2.5, 4.0])
def test_bpe_at_the_same_rate(rate):
    pytest.importorskip("tokenizers")
    text = (TURKISH + "\n\xff").encode("latin-1", "replace") * 3  # not all of it UTF-8
    starts = b.bpe(Characters(text), rate)
    assert starts[0] == 0
    assert (np.diff(starts) > 0).all()
    assert len(text) / len(starts) == pytest.approx(rate, rel=0.02)


def test_bpe_by_hand():
    """a b 4 times, "space a" 3 times: the first merge is of a and b"""
    pytest.importorskip("tokenizers")
    text = b"ab ab ab ab xc xc"
    starts = b.bpe(Characters(text), len(text) / 13)  # 17 bytes, 4 merged away
    assert starts.tolist() == [0, 2, 3, 5, 6, 8, 9, 11, 12, 13, 14, 15, 16]
    assert b.bpe(Characters(b""), 4.0).tolist() == []


def test_bpe_reaches_no_further_than_words():
    pytest.importorskip("tokenizers")
    assert b.bpe(Characters(b"one two one two one two"), 20.0).tolist() == [0, 3, 7, 11, 15, 19]


def test_morfessor_finds_suffixes():
    pytest.importorskip("morfessor")
    chars = Characters(TURKISH.encode())
    found = morfessor(chars)
    assert set(found) == set(TURKISH.split())
    assert all("".join(parts) == word for word, parts in found.items())
    assert all({"imiz", "iniz"} & set(parts) for word, parts in found.items() if "imiz" in word or "iniz" in word)
    assert morfessor(chars, seed=0) == found
    starts = b.by_morphemes(chars, {"evler": ("ev", "ler")})
    assert 2 in np.diff(starts)
    assert morfessor(Characters(b" .")) == {}


def test_chunks_of_morphemes():
    chars = Characters(b"evler, ev!")
    assert b.by_morphemes(chars, {"evler": ("ev", "ler")}).tolist() == [0, 2, 5, 7, 9]


def test_morphemes_of_a_file(tmp_path):
    file = tmp_path / "gold.txt"
    file.write_text("# Turkish\nev ler im iz\n\nev  de \nev ler imiz\n", encoding="utf-8-sig")
    assert read_morphemes(file) == {"evlerimiz": ("ev", "ler", "im", "iz"), "evde": ("ev", "de")}
    file.write_text("kitap + lar\nlento + kone\n")
    assert read_morphemes(file, " + ") == {"kitaplar": ("kitap", "lar"), "lentokone": ("lento", "kone")}


@pytest.mark.parametrize(
    ("content", "separator", "message"),
    [
        (b"", " ", "has no words"),
        (b"\xff\xfe", " ", "must be UTF-8: .* at byte 0"),
        (b"a b", "", "separator must not be empty"),
        (None, " ", "cannot read .*: No such file"),
    ],
)
def test_a_file_that_will_not_do(tmp_path, content, separator, message):
    file = tmp_path / "gold.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_morphemes(file, separator)


def test_without_the_packages(monkeypatch):
    """The cheap numbers need none of them; what is left out is said, with what to install."""

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    rows, notes = score_rows(b"one two three", {"model": np.array([0, 4])})
    assert [r["name"] for r in rows] == [
        "model", "model, predicted", "every byte", "white space", "random bytes", "random characters",
    ]  # fmt: skip
    assert len(notes) == 3
    assert all("pip install 'hnet-kernels[segment]'" in note for note in notes)
    with pytest.raises(UserError, match="needs tokenizers: pip install"):
        b.bpe(Characters(b"abc"), 2.0)


def test_rows_beside_each_other():
    for package in ("regex", "tokenizers", "morfessor"):
        pytest.importorskip(package)
    text = (TURKISH + ". ").encode() * 2
    words = b.whitespace(Characters(text))
    rows, notes = score_rows(text, {"model": words}, {"evlerde": ("ev", "ler", "de")})
    assert notes == []
    by_name = {r["name"]: r for r in rows}
    assert list(by_name) == [
        "model", "model, predicted", "every byte",
        "every grapheme", "white space", "BPE", "Morfessor", "random bytes", "random characters",
    ]  # fmt: skip
    assert by_name["model"]["words"] == by_name["white space"]["words"]
    assert by_name["white space"]["word_starts_found"] == by_name["every byte"]["word_starts_found"] == 1
    assert by_name["every byte"]["bytes_per_chunk"] == 1
    assert by_name["every byte"]["char_start_share"] < 1 == by_name["every grapheme"]["char_start_share"]
    assert abs(by_name["random characters"]["words"]["z"]) < 4 < by_name["white space"]["words"]["z"]
    assert by_name["white space"]["morphemes_inside"]["recall"] == 0
    assert by_name["Morfessor"]["morphemes"]["gold"] == by_name["model"]["morphemes"]["gold"]
