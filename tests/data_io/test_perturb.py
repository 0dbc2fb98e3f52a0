from collections import Counter
from itertools import groupby

import pytest

from hnet.data.corpus import Corpus
from hnet.data.perturb import PERTURBATIONS, beginning, perturb

TEXT = "Straße, naïve 日本語 and Some Words. " * 60


def changed(how, *documents, seed=0):
    corpus = perturb(Corpus.of(documents or [TEXT.encode()]), how, seed)
    return [corpus.document(i).tobytes() for i in range(len(corpus))]


def test_what_each_does():
    plain = TEXT.upper()
    assert changed("upper case") == [plain.encode()]
    assert changed("spaced out")[0].decode()[::2] == plain
    assert set(changed("spaced out")[0].decode()[1::2]) == {" "}
    cased = changed("random case")[0].decode()
    assert cased.upper() == plain
    assert 0.4 < sum(c.isupper() for c in cased) / sum(c.isalpha() and c.upper() != c.lower() for c in cased) < 0.6
    fewer = changed("dropped")[0].decode()
    rest = iter(TEXT)
    assert all(c in rest for c in fewer)  # in order
    assert 0.07 < 1 - len(fewer) / len(TEXT) < 0.13
    more = changed("repeated", b"ab" * 2000)[0].decode()
    runs = Counter(len(list(run)) for _, run in groupby(more))
    assert set(runs) == {1, 2, 3, 4}
    assert 0.77 < runs[1] / 4000 < 0.83
    assert sum(runs.values()) == 4000


@pytest.mark.parametrize("how", PERTURBATIONS)
def test_seeds_documents_and_bytes_that_are_no_text(how):
    assert changed(how) == changed(how)
    if how not in ("upper case", "spaced out"):
        assert changed(how, seed=1) != changed(how)
        a, b = changed(how, TEXT.encode(), TEXT.encode())
        assert a != b
    kept = changed(how, b"\xff" * 50, b"a" * 3)
    assert set(kept[0]) - set(b" ") == {0xFF}
    assert len(kept) == 2


def test_a_document_is_never_lost():
    documents = [bytes([97 + i % 26]) for i in range(200)]
    assert len(changed("dropped", *documents)) == 200


def test_the_beginning_of_a_corpus():
    corpus = Corpus.of([b"abc", b"defg", b"h"])
    for limit, want in (
        (None, [b"abc", b"defg", b"h"]),
        (3, [b"abc"]),
        (5, [b"abc", b"de"]),
        (99, [b"abc", b"defg", b"h"]),
    ):
        found = beginning(corpus, limit)
        assert [found.document(i).tobytes() for i in range(len(found))] == want
