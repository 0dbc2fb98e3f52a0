"""Text made harder to read in ways that people still read: changes of case, spacing and typing (those with which the
H-Net paper, after BLT, measures robustness)."""

from __future__ import annotations

import random
from collections.abc import Callable

from hnet.data.corpus import Corpus


def upper(text: str, rng: random.Random) -> str:
    return text.upper()


def random_case(text: str, rng: random.Random) -> str:
    """Every letter upper or lower case, by a coin."""
    return "".join(c.upper() if rng.random() < 0.5 else c.lower() for c in text)


def ant_speak(text: str, rng: random.Random) -> str:
    """Upper case, a space between characters."""
    return " ".join(text.upper())


def drop(text: str, rng: random.Random) -> str:
    """A tenth of the characters is missing."""
    return "".join(c for c in text if rng.random() >= 0.1)


def repeat(text: str, rng: random.Random) -> str:
    """A fifth of the characters stands two to four times."""
    return "".join(c * (rng.randint(2, 4) if rng.random() < 0.2 else 1) for c in text)


PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {
    "upper case": upper, "random case": random_case, "spaced out": ant_speak, "dropped": drop, "repeated": repeat,
}  # fmt: skip


def perturb(corpus: Corpus, how: str, seed: int = 0) -> Corpus:
    """Every document changed, each with random numbers of its own. Bytes that are no UTF-8 stay; a document of which
    nothing would be left stays as it is.

    Raises:
        KeyError: `how` is none of PERTURBATIONS.
    """
    change, changed = PERTURBATIONS[how], []
    for i in range(len(corpus)):
        text = corpus.document(i).tobytes().decode("utf-8", "surrogateescape")
        new = change(text, random.Random(f"{seed} {how} {i}")) or text
        changed.append(new.encode("utf-8", "surrogateescape"))
    return Corpus.of(changed)


def beginning(corpus: Corpus, limit: int | None) -> Corpus:
    """The first `limit` bytes (None: all); the last document may be cut."""
    if limit is None:
        return corpus
    documents, left = [], limit
    for i in range(len(corpus)):
        if left <= 0:
            break
        documents.append(corpus.document(i)[:left].tobytes())
        left -= len(documents[-1])
    return Corpus.of(documents)
