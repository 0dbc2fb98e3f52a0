"""Segmentations that no network made, of the same text and where possible at the same rate: what scores are beside."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from hnet.errors import UserError

from .characters import Characters
from .morphemes import Morphemes, morfessor, morpheme_starts
from .optional import need

LARGEST = 32768  # merges of BPE, at most
ALPHABET = [chr(b) for b in range(256)]
_PIECES = re.compile(rb"\s?\S+|\s+")  # a word with one white space before it


def baselines(chars: Characters, bytes_per_chunk: float, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Sorted int64 bytes where chunks begin, by name; and those left out for want of a package, with what to install.

    bytes_per_chunk: what random and BPE are to have.
    """
    makers: dict[str, Callable[[], np.ndarray]] = {
        "every byte": lambda: np.arange(len(chars.of)),
        "every grapheme": lambda: chars.start[chars.grapheme_start],
        "white space": lambda: whitespace(chars),
        "BPE": lambda: bpe(chars, bytes_per_chunk),
        "Morfessor": lambda: by_morphemes(chars, morfessor(chars, seed)),
        "random bytes": lambda: random_bytes(chars, bytes_per_chunk, seed),
        "random characters": lambda: random_characters(chars, bytes_per_chunk, seed),
    }
    found, left_out = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except UserError as e:  # `need`
            left_out[name] = str(e)
    return found, left_out


def whitespace(chars: Characters) -> np.ndarray:
    """A chunk begins where white space ends: "a word, |or |two"."""
    begins = ~chars.space & np.concatenate([[True], chars.space])[: len(chars)]
    return chars.start[begins]


def by_morphemes(chars: Characters, morphemes: Morphemes) -> np.ndarray:
    """A chunk begins with every morpheme and with whatever stands between words."""
    gold, known = morpheme_starts(chars, morphemes)
    return chars.start[gold | chars.after_word | (chars.word_start & ~known)]


def random_bytes(chars: Characters, bytes_per_chunk: float, seed: int = 0) -> np.ndarray:
    """As many chunks as asked for, beginning at bytes drawn uniformly without repeating."""
    T = len(chars.of)
    return drawn(np.arange(T), T / bytes_per_chunk, seed)


def random_characters(chars: Characters, bytes_per_chunk: float, seed: int = 0) -> np.ndarray:
    """The same, at first bytes of characters: chance for a model that may not split them. No more than there are."""
    return drawn(chars.start, len(chars.of) / bytes_per_chunk, seed)


def drawn(places: np.ndarray, count: float, seed: int) -> np.ndarray:
    """The first of `places`, and others up to `count`"""
    rng = np.random.default_rng(seed)
    some = min(max(round(count) - 1, 0), max(len(places) - 1, 0))
    return np.sort(np.concatenate([places[:1], rng.choice(places[1:], some, replace=False)]))


def bpe(chars: Characters, bytes_per_chunk: float) -> np.ndarray:
    """Byte-level BPE learned from this text, with as many merges as make its tokens `bytes_per_chunk` on average.

    Merges are learned in order, so that those of every smaller vocabulary are the first of a larger one: learned once,
    their number is found by bisection. A token has at most one word, with one white space before it, so tokens longer
    than words are out of reach.

    Raises:
        UserError: tokenizers is not installed.
    """
    package = need("tokenizers")
    pieces = [p.decode("latin-1") for p in _PIECES.findall(chars.text.encode(errors="surrogateescape"))]  # byte = char
    kinds, wanted = Counter(pieces), len(chars.of) / bytes_per_chunk
    merges = learn_merges(package, pieces)

    @cache
    def tokens(n: int) -> int:
        """Of the text, with the first n merges"""
        model = with_merges(package, merges[:n])
        return sum(count * len(model.tokenize(piece)) for piece, count in kinds.items())

    low, high = 0, len(merges)  # the fewest merges that make no more tokens than wanted
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if tokens(middle) <= wanted else (middle + 1, high)
    nearest = min({low, max(low - 1, 0)}, key=lambda n: abs(tokens(n) - wanted))
    model = with_merges(package, merges[:nearest])
    cut = {piece: [len(t.value) for t in model.tokenize(piece)] for piece in kinds}
    lengths = np.array([n for piece in pieces for n in cut[piece]], dtype=np.int64)
    return lengths.cumsum() - lengths


def learn_merges(package: ModuleType, pieces: list[str]) -> list[tuple[str, str]]:
    tokenizer = package.Tokenizer(package.models.BPE())
    trainer = package.trainers.BpeTrainer(
        vocab_size=len(ALPHABET) + LARGEST, min_frequency=2, initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return [(a, b) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]]


def with_merges(package: ModuleType, merges: list[tuple[str, str]]) -> Any:
    words = dict.fromkeys([*ALPHABET, *(a + b for a, b in merges)])  # two merges may make the same
    return package.models.BPE({word: i for i, word in enumerate(words)}, merges)
