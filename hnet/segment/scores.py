"""Where boundaries are, in numbers: pure functions of a text and the bytes where its chunks begin.

What concerns characters is counted by character: a boundary is *at* the character that holds the byte at which its
chunk begins, be it the first, a middle or the last one of it. So a router that fires on the third byte of the first
letter of every word has all of its boundaries at word starts (and none on character starts, which is another number).

A chunk's vector is made at its first byte and helps to predict from the next byte on. So there are two readings of a
model's boundaries: where chunks begin, and, one byte on (`ahead`), where what they predict begins. A router that is
taught where the next byte is unsure fires before an edge, and agrees with morphemes in the second reading.

Given boundaries, such as the start of the text, are chosen by nobody: they end chunks, but no share counts them, and
where they are no edge is missed or found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .characters import Characters
from .morphemes import morpheme_starts

BEGINNING = (0,)


# --- agreement with edges that are known --------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Of `found` edges with `gold` ones, both among places where an edge may be; NaN where a number has no meaning."""

    hits: int  # found and gold
    found: int
    gold: int
    enrichment: float = math.nan
    z: float = math.nan

    @property
    def precision(self) -> float:
        return ratio(self.hits, self.found)

    @property
    def recall(self) -> float:
        return ratio(self.hits, self.gold)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall = 2 hits / (found + gold)"""
        return ratio(2 * self.hits, self.found + self.gold)

    @property
    def r_value(self) -> float:
        """1 for a perfect segmentation; unlike F1 it does not pay to find too many.

        R = 1 - (|r1| + |r2|) / 2, r1 = sqrt((1 - H)² + O²), r2 = (H - 1 - O) / sqrt(2), with the hit rate H = recall
        and the over-segmentation O = found / gold - 1: Räsänen, Laine and Altosaar, An improved speech segmentation
        quality measure: the R-value, Interspeech 2009 (there in per cent). No tolerance: an edge is hit at its place.
        """
        if not self.gold:
            return math.nan
        hit, over = self.recall, self.found / self.gold - 1
        r1, r2 = math.hypot(1 - hit, over), (hit - 1 - over) / math.sqrt(2)
        return 1 - (abs(r1) + abs(r2)) / 2

    def numbers(self) -> dict[str, float]:
        names = ("precision", "recall", "f1", "r_value", "enrichment", "z", "gold")
        return {name: getattr(self, name) for name in names}


def ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def agreement(
    found: np.ndarray, gold: np.ndarray, places: np.ndarray, beyond: np.ndarray | None = None, chance: bool = True
) -> Agreement:
    """(C,) bool each: characters with a boundary, characters that are edges, and those that could be.

    beyond: (C,) int64, the character that a boundary counts for (C: none), such as the next word's first for white
        space. Two boundaries that count for one are one found edge.  Default: itself.

    enrichment = (share of boundaries on edges) / (share of places on edges): how many times chance.
    z = (hits - mean) / deviation of the hits over all circular shifts of the boundaries but the one by 0: what the same
    boundaries, at the same distances from each other, hit by chance. All shifts, so nothing is drawn; NaN where all hit
    equally often. In both, each character that counts for a place is a place. Without `chance` both are NaN.
    """
    C = len(found)
    beyond = np.arange(C) if beyond is None else beyond
    settled, gold, places = np.zeros(C + 1, dtype=bool), np.append(gold, False), np.append(places, False)
    settled[beyond[found]] = True
    counts = Agreement(*(int((x & places).sum()) for x in (settled & gold, settled, gold)))
    if not chance:
        return counts
    f, g = (x[places[beyond]] for x in (found, gold[beyond]))
    hits = int((f & g).sum())
    shifted = shifted_hits(f, g)[1:]
    spread = shifted.std() if len(shifted) else 0.0
    z = float((hits - shifted.mean()) / spread) if spread > 0 else math.nan
    return replace(counts, enrichment=ratio(hits * len(f), int(f.sum()) * int(g.sum())), z=z)


def shifted_hits(found: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """(n,) float: sum_i found[i] gold[(i + s) mod n] for every shift s"""
    if not len(found):
        return np.zeros(0)
    spectrum = np.fft.rfft(found.astype(np.float64)).conj() * np.fft.rfft(gold.astype(np.float64))
    return np.rint(np.fft.irfft(spectrum, len(found)))


# --- scores of a segmentation -------------------------------------------------------------------------------------


def score(
    text: bytes | Characters,
    starts: Iterable[int] | np.ndarray,
    *,
    given: Iterable[int] | np.ndarray = BEGINNING,
    morphemes: Mapping[str, tuple[str, ...]] | None = None,
    graphemes: bool = True,
) -> dict[str, Any]:
    """All numbers of a segmentation, ready for JSON but for NaN where there is nothing to count.

    Args:
        starts: bytes where chunks begin, in any order.
        given: bytes where a chunk begins whatever the model thinks.
        morphemes: of every known word its parts, which together are the word.
        graphemes: also `grapheme_start_share`, which takes the package regex.

    Returns:
        `sizes`, `shares` and, under "words" and, with `morphemes`, "morphemes" and "morphemes_inside", the numbers
        of an `Agreement`: with the starts of words, and with those of the known words' morphemes, all of them or
        those inside words.

    Raises:
        ValueError: a start outside of the text.
        UserError: regex is not installed.
    """
    chars = text if isinstance(text, Characters) else Characters(text)
    begin, free = chosen(chars, starts, given)
    result = sizes(begin, len(chars.of)) | shares(chars, free)
    if graphemes:
        at = chars.of[free]
        result["grapheme_start_share"] = share(chars.grapheme_start[at])
    result["words"] = word_edges(chars, free, given).numbers()
    result["word_starts_found"] = result["words"]["recall"]
    if morphemes is not None:
        gold, known = morpheme_starts(chars, morphemes)
        result["morpheme_coverage"] = ratio(int((known & chars.word_start).sum()), int(chars.word_start.sum()))
        result["morphemes"] = edges(chars, free, given, gold, known).numbers()
        result["morphemes_inside"] = edges(chars, free, given, gold, known & ~chars.word_start).numbers()
    return result


def chosen(
    chars: Characters, starts: Iterable[int] | np.ndarray, given: Iterable[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted int64: where chunks begin, given or not; and those of them that are not given."""
    T, free, fixed = len(chars.of), as_offsets(starts), as_offsets(given)
    fixed = fixed[fixed < T]
    if len(free) and (free[0] < 0 or free[-1] >= T):
        raise ValueError(f"starts must be in [0, {T}), the bytes of the text, got {free[0]} to {free[-1]}")
    free = np.setdiff1d(free, fixed, assume_unique=True)
    return np.union1d(free, fixed), free


def ahead(starts: np.ndarray, length: int) -> np.ndarray:
    """The byte after each start, where there is one: what chunks predict first"""
    return starts[starts < length - 1] + 1


def as_offsets(x: Iterable[int] | np.ndarray) -> np.ndarray:
    return np.unique(np.asarray(x if isinstance(x, np.ndarray) else list(x), dtype=np.int64))


def sizes(begin: np.ndarray, length: int) -> dict[str, Any]:
    """chunks; bytes_per_chunk, its median and coefficient of variation (deviation / mean); histogram: chunks of every
    size that occurs, [[bytes, chunks], ...]. `begin`: sorted; bytes before the first belong to no chunk."""
    size = np.diff(np.append(begin, length))
    values, counts = np.unique(size, return_counts=True)
    mean = float(size.mean()) if len(size) else math.nan
    return {
        "bytes": length,
        "chunks": len(size),
        "bytes_per_chunk": mean,
        "bytes_per_chunk_median": float(np.median(size)) if len(size) else math.nan,
        "bytes_per_chunk_cv": float(size.std()) / mean if len(size) else math.nan,
        "histogram": [[int(v), int(n)] for v, n in zip(values, counts, strict=True)],
    }


def shares(chars: Characters, free: np.ndarray) -> dict[str, float]:
    """Of the boundaries (sorted bytes) the share

    char_start_share   on the first byte of a character;   char_end_share   on the last one
    space_share        at white space
    word_start_share   at the first character of a word;   word_end_share   at the one right after a word
    """
    at = chars.of[free]
    last = np.append(chars.start, len(chars.of))[1:] - 1
    return {
        "char_start_share": share(chars.start[at] == free),
        "char_end_share": share(last[at] == free),
        "space_share": share(chars.space[at]),
        "word_start_share": share(chars.word_start[at]),
        "word_end_share": share(chars.after_word[at]),
    }


def share(x: np.ndarray) -> float:
    return float(x.mean()) if len(x) else math.nan


def edges(
    chars: Characters,
    free: np.ndarray,
    given: Iterable[int] | np.ndarray,
    gold: np.ndarray,
    places: np.ndarray,
    chance: bool = True,
) -> Agreement:
    """Agreement of the boundaries (sorted bytes) with edges, (C,) bool, among places, (C,) bool.

    White space is part of no word: a chunk that begins in the white space before a word (" word", as those of BPE do)
    begins with the word, as "word " does. Given boundaries and what they begin with are no places.
    """
    fixed = as_offsets(given)
    found, places = np.zeros(len(chars), dtype=bool), np.append(places & ~chars.space, False)
    found[chars.of[free]] = True
    places[chars.beyond_space[chars.of[fixed[fixed < len(chars.of)]]]] = False
    return agreement(found, gold, places[:-1], chars.beyond_space, chance)


def word_edges(
    chars: Characters, free: np.ndarray, given: Iterable[int] | np.ndarray = BEGINNING, chance: bool = True
) -> Agreement:
    """With the starts of words, among all characters but white space: recall is the share of word starts found."""
    return edges(chars, free, given, chars.word_start, np.ones(len(chars), dtype=bool), chance)
