import math

import numpy as np
import pytest

from hnet.data.corpus import Corpus

from .markov import markov_baselines


def test_baselines_on_texts_whose_entropies_are_known():
    """A chain that keeps its byte with probability 0.9: after j steps it has kept it with (1 + 0.8^j) / 2."""
    rng = np.random.default_rng(0)
    states = np.cumsum(rng.random((2, 200_000)) < 0.1, axis=1) % 2
    train, test = (Corpus.of([bytes((97 + s).astype(np.uint8))]) for s in states)
    got = markov_baselines(train, test, 4)
    for j in range(1, 5):
        keep = (1 + 0.8**j) / 2
        entropy = -keep * math.log(keep) - (1 - keep) * math.log(1 - keep)
        assert got["bigram"][j - 1] == pytest.approx(entropy, abs=0.01)
        assert got["direct"][j - 1] == pytest.approx(entropy, abs=0.01)
        assert got["unigram"][j - 1] == pytest.approx(math.log(2), abs=0.005)


def test_baselines_count_within_documents_only():
    corpus = Corpus.of([b"ab", b"ca"] * 500)
    got = markov_baselines(corpus, corpus, 1)
    assert got["bigram"][0] < 0.06  # a -> b, c -> a: certain but for smoothing. b -> c only across documents
