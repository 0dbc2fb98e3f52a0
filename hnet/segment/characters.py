"""The characters and words of a text in bytes, whatever those bytes are.

A character is a code point; a byte that is not UTF-8 is a character by itself. A word is a longest run of letters and
digits (Unicode L, N and connectors such as _). A combining mark (vowel signs, virama) or a format character (joiners)
belongs to what stands before it: to the word after a letter, to the emoji after an emoji. So "it's" is two words, and
a Chinese sentence without spaces is one.
"""

from __future__ import annotations

import unicodedata
from functools import cached_property

import numpy as np

from .optional import need

SPACE, WORD, OTHER, JOINS = range(4)


class Characters:
    """What `text` is made of, C characters in T bytes.

    start: (C,) int64, byte where each begins.  of: (T,) int64, the character that each byte belongs to.
    space, word: (C,) bool.  word_start: (C,) bool, the first of a word.  after_word: (C,) bool, what stands right after
    one.  beyond_space: (C,) int64, of white space the next character that is none (C: there is none), of others itself.
    """

    def __init__(self, text: bytes) -> None:
        self.text = text.decode(errors="surrogateescape")
        code = np.frombuffer(self.text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        lone = (code >= 0xDC80) & (code <= 0xDCFF)
        size = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
        size[lone] = 1
        self.start = size.cumsum() - size
        self.of = np.repeat(np.arange(len(code)), size)
        kind = kinds(code)
        self.space, self.word = kind == SPACE, kind == WORD
        before = np.concatenate([[False], self.word])[: len(code)]
        self.word_start, self.after_word = self.word & ~before, ~self.word & before
        here = np.where(self.space, len(code), np.arange(len(code)))
        self.beyond_space = np.minimum.accumulate(here[::-1])[::-1]

    def __len__(self) -> int:
        return len(self.start)

    @cached_property
    def grapheme_start(self) -> np.ndarray:
        r"""(C,) bool: the first character of an extended grapheme cluster (UAX 29), \X of the package regex.

        Raises:
            UserError: regex is not installed.
        """
        found = np.zeros(len(self), dtype=bool)
        found[[m.start() for m in need("regex").finditer(r"\X", self.text)]] = True
        return found

    def words(self) -> list[tuple[int, int]]:
        """(first character, the one after the last) of every word"""
        ends = np.flatnonzero(np.diff(np.concatenate([self.word, [False]]).astype(np.int8)) == -1) + 1
        return list(zip(np.flatnonzero(self.word_start).tolist(), ends.tolist(), strict=True))


def kinds(code: np.ndarray) -> np.ndarray:
    """(C,) SPACE, WORD or OTHER, from code points"""
    known, place = np.unique(code, return_inverse=True)
    kind = np.array([kind_of(chr(c)) for c in known.tolist()], dtype=np.int64)[place]
    last = np.maximum.accumulate(np.where(kind == JOINS, -1, np.arange(len(kind))))  # that is no mark
    kind = np.where(last >= 0, kind[last], OTHER)
    marks = last != np.arange(len(kind))
    return np.where(marks & (kind == SPACE), OTHER, kind)


def kind_of(c: str) -> int:
    category = unicodedata.category(c)
    if category[0] == "M" or category == "Cf":
        return JOINS
    if category[0] in "LN" or category == "Pc":
        return WORD
    return SPACE if c.isspace() else OTHER
