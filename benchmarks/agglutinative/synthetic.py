"""Text in the manner of an agglutinative language, in Telugu script, whose every morpheme is known. Not Telugu.

A word is a root and a chain of suffixes, noun: root (plural) (case) (clitic), verb: root (causative) tense person
(question). Roots are drawn by Zipf's law, so that some are rare. Every morpheme begins with a consonant: its first
character is never a mark, and an edge never lies inside an akshara. A line is a sentence that ends with its verb.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

CONSONANTS = "కఖగఘచజటడణతదనపబభమయరలవశసహళ"
VOWELS = ["", *"ాిీుూెేొో"]  # none: the consonant's own a
VIRAMA = "్"
PLURAL = ("లు",)
CASE = ("ను", "కు", "తో", "లో", "నుంచి", "కోసం", "మీద", "వద్ద")
CLITIC = ("కూడా", "నే", "గా", "మాత్రం")
CAUSATIVE = ("పించ",)
TENSE = ("తున్నా", "తా", "సా", "కుంటు", "వచ్చి")
PERSON = ("ను", "వు", "డు", "రు", "ము", "ది")
QUESTION = ("నా", "టా")
NOUN = ((PLURAL, 0.35), (CASE, 0.65), (CLITIC, 0.2))  # a suffix of each, with this probability
VERB = ((CAUSATIVE, 0.2), (TENSE, 1.0), (PERSON, 1.0), (QUESTION, 0.1))

Lexicon = dict[str, tuple[str, ...]]


def generate(num_bytes: int, seed: int = 0, nouns: int = 400, verbs: int = 150) -> tuple[list[str], Lexicon]:
    """Sentences of at least `num_bytes` UTF-8 bytes with their line ends, and the morphemes of every word in them. No
    word has two analyses."""
    rng = random.Random(seed)
    roots = sorted({root(rng) for _ in range(2 * (nouns + verbs))})
    rng.shuffle(roots)
    noun_roots, verb_roots = roots[:nouns], roots[nouns : nouns + verbs]
    lexicon: Lexicon = {}
    lines, size = [], 0
    while size < num_bytes:
        words = [word(rng, noun_roots, NOUN, lexicon) for _ in range(rng.randint(1, 5))]
        words.append(word(rng, verb_roots, VERB, lexicon))
        lines.append(" ".join([*words, "?" if words[-1].endswith(QUESTION) else "."]))
        size += len(lines[-1].encode()) + 1
    return lines, lexicon


def root(rng: random.Random) -> str:
    """Two or three syllables, now and then with a conjunct"""
    syllables = []
    for i in range(rng.choice((2, 2, 3))):
        onset = rng.choice(CONSONANTS)
        if i and rng.random() < 0.15:
            onset += VIRAMA + rng.choice(CONSONANTS)
        syllables.append(onset + rng.choice(VOWELS))
    return "".join(syllables)


def word(
    rng: random.Random, roots: Sequence[str], slots: Sequence[tuple[Sequence[str], float]], lexicon: Lexicon
) -> str:
    while True:
        (first,) = rng.choices(roots, cum_weights=zipf(len(roots)))
        parts = (first, *(rng.choice(suffixes) for suffixes, often in slots if rng.random() < often))
        if lexicon.setdefault("".join(parts), parts) == parts:
            return "".join(parts)


_ZIPF: dict[int, list[float]] = {}


def zipf(n: int) -> list[float]:
    """Sums of 1 / (rank + 3)"""
    if n not in _ZIPF:
        total, sums = 0.0, []
        for rank in range(n):
            total += 1 / (rank + 3)
            sums.append(total)
        _ZIPF[n] = sums
    return _ZIPF[n]
