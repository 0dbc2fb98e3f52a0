"""Morphemes of words: a file of segmented words, or Morfessor trained on the text itself."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hnet.errors import UserError, user_path

from .characters import Characters
from .optional import need

Morphemes = dict[str, tuple[str, ...]]


def read_morphemes(path: str | Path, separator: str = " ") -> Morphemes:
    """The words of a UTF-8 file, one a line, cut at every `separator`: "ev ler im iz" is evlerimiz. Empty lines and
    lines that begin with # are left out; of a word that comes twice the first line counts.

    Raises:
        UserError: no such file, not UTF-8, no words in it, or an empty separator.
    """
    if not separator:
        raise UserError("separator must not be empty")
    with user_path(path):
        data = Path(path).read_bytes()
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise UserError(f"{path} must be UTF-8: {e.reason} at byte {e.start}") from None
    found: Morphemes = {}
    for line in lines:
        parts = tuple(p for x in line.split(separator) if (p := x.strip()))
        if parts and not line.startswith("#"):
            found.setdefault("".join(parts), parts)
    if not found:
        raise UserError(f"{path} has no words: one a line is expected, its morphemes separated by {separator!r}")
    return found


def morpheme_starts(chars: Characters, morphemes: Mapping[str, tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """(C,) bool each: first characters of morphemes, those of words among them; and all characters of words that are
    known, as they stand or in lower case."""
    gold, known = np.zeros(len(chars), dtype=bool), np.zeros(len(chars), dtype=bool)
    for first, end in chars.words():
        parts = parts_of(chars.text[first:end], morphemes)
        if parts is not None:
            known[first:end] = True
            lengths = np.array([0, *map(len, parts[:-1])])
            gold[first + lengths.cumsum()] = True
    return gold, known


def parts_of(word: str, morphemes: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    found = morphemes.get(word)
    if found is None and len(word.lower()) == len(word):
        found = morphemes.get(word.lower())
    return found


def morfessor(chars: Characters, seed: int = 0) -> Morphemes:
    """Every word of the text as Morfessor Baseline cuts it, trained on these words, each counted once.

    Raises:
        UserError: morfessor is not installed.
    """
    package = need("morfessor")
    words = sorted({chars.text[first:end] for first, end in chars.words()})
    if not words:
        return {}
    package.utils.show_progress_bar = False
    model, state = package.BaselineModel(), random.getstate()
    random.seed(seed)  # it shuffles by Python's own generator
    try:
        model.load_data([(1, word) for word in words])
        model.train_batch()
    finally:
        random.setstate(state)
    return {word: tuple(model.viterbi_segment(word)[0]) for word in words}
