"""What the text shows, against slow ways of saying the same, on made-up corpora."""

import numpy as np
import pytest

from hnet.data.corpus import Corpus
from hnet.diagnose import texts

WORDS = [
    "the", "of", "and", "a", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with",
    "his", "they", "at", "be", "this", "have", "from", "or", "one", "had",
]  # fmt: skip


def prose(seed, size=2500, words=WORDS):
    rng = np.random.default_rng(seed)
    return " ".join(f"{rng.choice(words)}{rng.integers(1000)}" for _ in range(size // 7)).encode()


def found(train, held_out=(), seq_len=1024):
    return {f.name: f for f in texts.examine_texts(Corpus.of(train), Corpus.of(held_out), seq_len)[0]}


def test_fingerprints_are_of_equal_pieces_wherever_they_are():
    piece = prose(0)
    looked = texts.draw(Corpus.of([prose(1) + piece, b"x" + piece + prose(2), prose(3)]))
    hashes, document = texts.fingerprints(looked)
    sets = [set(hashes[document == i].tolist()) for i in range(3)]
    assert not sets[2] & (sets[0] | sets[1])
    windows = {piece[i : i + texts.WINDOW] for i in range(len(piece) - texts.WINDOW + 1)}
    rate = len(sets[0] & sets[1]) / len(windows)
    assert 0.5 / texts.ONE_IN < rate < 2 / texts.ONE_IN  # one in ONE_IN of the pieces they share, no other
    assert len(texts.fingerprints(texts.draw(Corpus.of([b"short"])))[0]) == 0
    halves = texts.draw(Corpus.of([piece[:1000], piece[1000:]]))  # no piece lies across two documents
    of_halves = set(texts.fingerprints(halves)[0].tolist())
    assert of_halves < set(texts.fingerprints(texts.draw(Corpus.of([piece])))[0].tolist())


def test_copies():
    plain = [prose(i) for i in range(40)]
    assert not {"duplicates", "near_duplicates"} & found(plain).keys()
    twice = found(plain + plain[:10])
    assert twice["duplicates"].severity == "warning"
    assert "10 of 50 documents looked at, 20 %" in twice["duplicates"].evidence[0]
    assert "near_duplicates" not in twice
    changed = [p.replace(b" was", b" had", 1) + b" end" for p in plain[:10]]
    nearly = found(plain + changed)
    assert "10 of 50" in nearly["near_duplicates"].evidence[0]
    assert "duplicates" not in nearly


def test_overlap():
    plain = [prose(i) for i in range(40)]
    assert "split_overlap" not in found(plain, [prose(i) for i in range(100, 110)])
    f = found(plain, [prose(100 + i) for i in range(8)] + [b"# " + p for p in plain[:2]])["split_overlap"]
    assert f.severity == "critical"
    assert "2 of 10" in f.evidence[0]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (b"abc", 0),
        ("größe 語 😀".encode(), 0),
        (b"\xff\xfe", 2),
        (b"a\xc3b", 1),
        ("語".encode()[:2], 2),
        (b"\xed\xa0\x80", 3),
    ],
)
def test_invalid_bytes_by_hand(text, count):
    assert texts.invalid(text) == count


def test_bytes():
    good = [prose(i) + " größe".encode() for i in range(10)]
    assert "invalid_bytes" not in found(good)
    f = found([*good, b"\xfe\xff" + prose(20)])["invalid_bytes"]
    assert f.severity == "warning"
    assert "2 of" in f.evidence[0]
    assert "2 of them are 254 or 255" in f.evidence[1]
    _, numbers = texts.examine_texts(Corpus.of(good), Corpus.of([]), 1024)
    assert sum(numbers["histogram"]) == numbers["bytes"] == sum(map(len, good))
    assert numbers["histogram"][ord("e")] == b"".join(good).count(b"e")


@pytest.mark.parametrize("seed", range(5))
def test_a_held_out_part_drawn_at_random_is_a_sample(seed):
    every = [prose(i, words=WORDS[: 5 + i % 20]) for i in range(150)]  # documents that differ from one another
    order = np.random.default_rng(seed).permutation(150)
    assert "split_shift" not in found([every[i] for i in order[12:]], [every[i] for i in order[:12]])


def test_a_tail_of_another_kind_is_none():
    tables = [" ".join(f"{x:.4f}" for x in np.random.default_rng(i).normal(size=300)).encode() for i in range(12)]
    assert "standard errors" in found([prose(i) for i in range(100)], tables)["split_shift"].evidence[0]
    one = found([prose(i) for i in range(100)], [b" ".join(tables * 2)])["split_shift"]
    assert one.confidence == "low"
    assert "split_shift" not in found([prose(i) for i in range(100)], [b" ".join(prose(i) for i in range(200, 220))])


def test_lengths():
    assert "cut_documents" in found([prose(i, 9000) for i in range(8)], seq_len=128)
    assert "cut_documents" not in found([prose(i, 2000) for i in range(8)], seq_len=1024)
