"""Byte models to beat: what counting alone can do."""

from __future__ import annotations

import numpy as np

from hnet.data.corpus import Corpus


def markov_baselines(train: Corpus, test: Corpus, chunk: int) -> dict[str, list[float]]:
    """Cross entropies on `test`, nats, of the byte j = 1 .. chunk places after a known byte; models counted on `train`.

    unigram: the byte's frequency (the same for every j). bigram: p(byte j | byte 0), which is the best a first-order
    Markov model can say of it: its transition matrix to the j-th power, all bytes between summed out. direct: the
    frequencies of byte j after byte 0 counted as such, the best that any model can do that sees byte 0 only.

    Counts are of neighbours within documents, with add-0.1 smoothing.
    """
    p = _counts(train, 0).sum(0) + 0.1
    p /= p.sum()
    once = _rows(_counts(train, 1))
    power = np.eye(256)
    out: dict[str, list[float]] = {"unigram": [], "bigram": [], "direct": []}
    for j in range(1, chunk + 1):
        power = power @ once
        pairs = _counts(test, j)
        total = pairs.sum()
        out["unigram"].append(float(-(pairs.sum(0) * np.log(p)).sum() / total))
        out["bigram"].append(float(-(pairs * np.log(power)).sum() / total))
        out["direct"].append(float(-(pairs * np.log(_rows(_counts(train, j)))).sum() / total))
    return out


def _rows(counts: np.ndarray) -> np.ndarray:
    return (counts + 0.1) / (counts + 0.1).sum(1, keepdims=True)


def _counts(corpus: Corpus, distance: int) -> np.ndarray:
    """(256, 256): how often a byte stands `distance` places before another within a document."""
    counts = np.zeros(65536)
    for i in range(len(corpus)):
        text = corpus.document(i).astype(np.int64)
        counts += np.bincount(text[: len(text) - distance] * 256 + text[distance:], minlength=65536)
    return counts.reshape(256, 256)
