"""Scores of boundaries: every expectation worked out by hand, byte by byte, from the texts as they are written."""

import math

import numpy as np
import pytest

from hnet.segment.characters import Characters
from hnet.segment.morphemes import morpheme_starts
from hnet.segment.scores import Agreement, agreement, ahead, score, shifted_hits

NAN = pytest.approx(math.nan, nan_ok=True)
SHARES = ("char_start_share", "char_end_share", "space_share", "word_start_share", "word_end_share")


def shares_of(text, starts, **options):
    found = score(text, starts, graphemes=False, **options)
    return tuple(found[k] for k in SHARES)


# --- characters and words ------------------------------------------------------------------------------------------


def words_of(text):
    chars = Characters(text if isinstance(text, bytes) else text.encode())
    return [chars.text[a:b] for a, b in chars.words()]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("it's 2 words_or_so.", ["it", "s", "2", "words_or_so"]),
        ("క్షమించు, రా", ["క్షమించు", "రా"]),  # the virama and vowel signs are marks: inside their word
        ("క్‌ష", ["క్‌ష"]),  # so is a zero-width non-joiner after the virama
        ("我爱北京。", ["我爱北京"]),  # nothing is between the words of Chinese
        ("👩‍👩‍👧 a👍🏽b ❤️", ["a", "b"]),  # joiners, skin tones and variation selectors make no word of an emoji
        ("\u0301a \u0301b", ["a", "b"]),  # a mark with nothing to stand on
        ("", []),
        (b"ab\xff\xe0\xb0cd", ["ab", "cd"]),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_every_byte_has_its_character():
    """a, ka (three bytes), an emoji (four), é (two), a stray continuation byte, half a character"""
    chars = Characters("aక😀é".encode() + b"\x80\xe0\xb0")
    assert chars.start.tolist() == [0, 1, 4, 8, 10, 11, 12]
    assert chars.of.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 5, 6]
    assert chars.word.tolist() == [True, True, False, True, False, False, False]


# --- sizes ---------------------------------------------------------------------------------------------------------


def test_sizes():
    """|ab|c|defg|h: 2, 1, 4, 1 bytes; mean 2, median 1.5, deviation sqrt((0 + 1 + 4 + 1) / 4)"""
    found = score(b"abcdefgh", [7, 2, 3], graphemes=False)
    assert (found["bytes"], found["chunks"], found["bytes_per_chunk"]) == (8, 4, 2.0)
    assert found["bytes_per_chunk_median"] == 1.5
    assert found["bytes_per_chunk_cv"] == pytest.approx(math.sqrt(1.5) / 2)
    assert found["histogram"] == [[1, 2], [2, 1], [4, 1]]


def test_empty_text():
    found = score(b"", [], graphemes=False)
    assert (found["chunks"], found["bytes"], found["histogram"]) == (0, 0, [])
    assert math.isnan(found["bytes_per_chunk"])
    assert math.isnan(found["word_starts_found"])


def test_no_boundaries():
    """The text is one chunk; no share of nothing, and no word found but the first, which is given"""
    found = score(b"one two three", [0], graphemes=False)
    assert (found["chunks"], found["bytes_per_chunk"]) == (1, 13.0)
    assert all(math.isnan(found[k]) for k in SHARES)
    assert found["word_starts_found"] == 0
    assert found["words"]["gold"] == 2
    assert math.isnan(found["words"]["precision"])


def test_starts_outside_of_the_text():
    with pytest.raises(ValueError, match=r"starts must be in \[0, 3\).* got 1 to 3"):
        score(b"abc", [1, 3])


# --- shares, by character -------------------------------------------------------------------------------------------


def test_a_boundary_counts_for_the_character_that_holds_it():
    """కల రా: ka la space ra aa at bytes 0 3 6 7 10. The third byte of ra (9) is at the start of a word, though no
    character starts there; the first of la (3) is a character start inside a word; 6 is the space, after a word."""
    text = "కల రా".encode()
    assert len(text) == 13
    assert shares_of(text, [9]) == (0, 1, 0, 1, 0)
    assert shares_of(text, [8]) == (0, 0, 0, 1, 0)
    assert shares_of(text, [3]) == (1, 0, 0, 0, 0)
    assert shares_of(text, [6]) == (1, 1, 1, 0, 1)
    assert shares_of(text, [9, 8, 3, 6]) == (0.5, 0.5, 0.25, 0.5, 0.25)


def test_a_third_byte_finds_the_word():
    assert score("కల రా".encode(), [9], graphemes=False)["word_starts_found"] == 1
    assert score("కల రా".encode(), [10], graphemes=False)["word_starts_found"] == 0  # the vowel sign after ra


def test_white_space_before_a_word_finds_it():
    """ "to be, or": be is at 3, the comma at 5, or at 7; to is given. A chunk " or" or "or" begins with the word, and
    both at once are one; the space before nothing finds nothing."""
    text = b"to be, or "
    for starts, hits, found in [([2], 1, 1), ([3], 1, 1), ([2, 3], 1, 1), ([6, 3], 2, 2), ([5, 6], 1, 2), ([9], 0, 0)]:
        words = score(text, starts, graphemes=False)["words"]
        assert words["recall"] == hits / 2
        assert words["precision"] == (pytest.approx(hits / found) if found else NAN)


def test_given_boundaries_count_for_nothing():
    """Two lines: the second begins at 4, and is given with its line end (3)."""
    free = score(b"a b\nc d", [2, 3, 6], graphemes=False)
    given = score(b"a b\nc d", [2, 3, 6], given=[0, 3], graphemes=False)
    assert free["words"]["gold"] == 3
    assert given["words"]["gold"] == 2
    assert (free["space_share"], given["space_share"]) == (pytest.approx(1 / 3), 0)
    assert free["histogram"] == given["histogram"]


def test_invalid_utf8():
    """Every byte that is no UTF-8 is a character, both its first and its last byte, of no word: \\xff after ab, then
    half of a Telugu letter"""
    assert shares_of(b"ab\xff\xe0\xb0 c", [2, 3, 4]) == (1, 1, 0, 0, pytest.approx(1 / 3))


def test_chinese_has_words_only_where_something_stands_between_them():
    """我爱北京。你好: characters of three bytes; words by this definition begin at 0 and, after the full stop, at 15"""
    text = "我爱北京。你好".encode()
    assert shares_of(text, [6, 12, 15]) == (1, 0, 0, pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert score(text, [15], graphemes=False)["word_starts_found"] == 1


def test_what_chunks_predict():
    """ab cd: a chunk at the space predicts from c on; one at the last byte predicts nothing here"""
    text = b"ab cd"
    assert ahead(np.array([0, 2, 4]), len(text)).tolist() == [1, 3]
    assert shares_of(text, ahead(np.array([2]), len(text))) == (1, 1, 0, 1, 0)


# --- graphemes -----------------------------------------------------------------------------------------------------


def grapheme_share(text, starts):
    pytest.importorskip("regex")
    return score(text.encode(), starts)["grapheme_start_share"]


def test_graphemes_of_telugu():
    """రాము: ra + aa, ma + u, at bytes 0 3 6 9: clusters begin at 0 and 6, also when the byte is the third of ma"""
    assert grapheme_share("రాము", [3]) == 0
    assert grapheme_share("రాము", [6]) == 1
    assert grapheme_share("రాము", [8]) == 1
    assert grapheme_share("రాము", [3, 6, 8, 9]) == 0.5
    assert grapheme_share("క్ర", [3]) == 0  # the virama never begins one


def test_a_conjunct_is_one_grapheme():
    """పుస్త: pa + u, then sa virama ta, which are one cluster since Unicode 15.1: ta (12) begins none, sa (6) does"""
    assert grapheme_share("పుస్త", [12]) == 0
    assert grapheme_share("పుస్త", [6, 9, 12]) == pytest.approx(1 / 3)
    assert grapheme_share("క్‌ష", [9]) == 1  # a non-joiner keeps them apart


def test_graphemes_of_emoji():
    """A family of three is one cluster: 4 + 3 + 4 + 3 + 4 bytes; so is a thumb with its skin tone, 4 + 4"""
    family = "👩‍👩‍👧👍🏽"
    assert len(family.encode()) == 26
    assert grapheme_share(family, [4, 7, 11, 14, 22]) == 0
    assert grapheme_share(family, [18]) == 1


def test_crlf_is_one_cluster():
    assert grapheme_share("a\r\nb", [1, 2, 3]) == pytest.approx(2 / 3)


# --- agreement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "found", "gold", "expected"),
    [
        (10, 10, 10, (1, 1, 1, 1)),
        # Räsänen et al. have H and O in per cent. H = 50, O = -50: r1 = sqrt(50² + 50²) = 70.7107,
        # r2 = (50 + 50 - 100) / sqrt(2) = 0, R = 1 - 70.7107 / 200
        (5, 5, 10, (1, 0.5, 2 / 3, 0.6464466)),
        # H = 80, O = 100: r1 = sqrt(20² + 100²) = 101.9804, r2 = (-100 + 80 - 100) / sqrt(2) = -84.8528
        (8, 20, 10, (0.4, 0.8, 8 / 15, 1 - (101.9804 + 84.8528) / 200)),
        # all of 40 places with 10 edges, H = 100, O = 300: r1 = 300, r2 = -300 / sqrt(2) = -212.132: below 0
        (10, 40, 10, (0.25, 1, 0.4, 1 - (300 + 212.132) / 200)),
        # nothing: H = 0, O = -100: r1 = 141.4214, r2 = 0
        (0, 0, 10, (math.nan, 0, 0, 1 - 141.4214 / 200)),
        (0, 3, 0, (0, math.nan, 0, math.nan)),
        # as others' code has it, to a hundredth of a per cent: github.com/kamperh/vqwordseg, results.md, the VQ-VAE's
        # phones (P 66.42, R 75.77, F 70.79, R-value 72.44) and words (15.81, 68.13, 25.66, -194.47) on Buckeye
        (7577, 11408, 10000, (0.6642, 0.7577, 0.7079, 0.7244)),
        (6813, 43090, 10000, (0.1581, 0.6813, 0.2566, -1.9447)),
    ],
)
def test_formulas(hits, found, gold, expected):
    a = Agreement(hits, found, gold)
    exact = 1e-6 if found < 100 else 1e-4
    assert (a.precision, a.recall, a.f1, a.r_value) == pytest.approx(expected, abs=exact, nan_ok=True)


def test_enrichment():
    """5 of 10 boundaries on edges, where 10 of 40 places are edges: twice as many as by chance"""
    place = np.arange(40)
    gold, found, everywhere = place < 10, (place >= 5) & (place < 15), np.ones(40, dtype=bool)
    assert agreement(found, gold, everywhere).enrichment == 2
    assert math.isnan(agreement(found & ~everywhere, gold, everywhere).enrichment)


def test_white_space_before_an_edge_is_no_better_than_chance():
    """Where a boundary before the edge counts too, chance is the higher: of 4 places and the 2 that count for one of
    them, 2 x 2 hit; 1 of 1 found edges, (1 / 1) / (4 / 6)"""
    beyond = np.array([1, 1, 2, 4, 4, 5])
    gold, places = np.array([0, 1, 0, 0, 1, 0], dtype=bool), np.array([0, 1, 1, 0, 1, 1], dtype=bool)
    a = agreement(np.array([1, 1, 0, 0, 0, 0], dtype=bool), gold, places, beyond)
    assert (a.hits, a.found, a.gold, a.enrichment) == (1, 1, 2, pytest.approx(1 / (4 / 6)))


def test_z_is_of_all_circular_shifts():
    """Found 0 and 3 of six places, edges 0 and 3: shifts by 1 to 5 hit 0 0 2 0 0, mean 0.4, deviation 0.8; 2 hits"""
    mask = np.array([1, 0, 0, 1, 0, 0], dtype=bool)
    a = agreement(mask, mask, np.ones(6, dtype=bool))
    assert a.z == pytest.approx((2 - 0.4) / 0.8)
    assert shifted_hits(mask, mask).tolist() == [2, 0, 0, 2, 0, 0]
    all_of_them = agreement(np.ones(6, dtype=bool), mask, np.ones(6, dtype=bool))
    assert math.isnan(all_of_them.z)  # every shift hits both


def test_shifted_hits_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    for n in (1, 2, 97, 1000):
        f, g = rng.random((2, n)) < 0.3
        assert shifted_hits(f, g).tolist() == [int((np.roll(f, s) & g).sum()) for s in range(n)]


def test_z_of_boundaries_by_chance_and_not():
    """Of boundaries that were drawn, z is of the size of 1; of half of the edges it is of the order of sqrt(n)."""
    rng = np.random.default_rng(0)
    everywhere, gold = np.ones(4000, dtype=bool), rng.random(4000) < 0.2
    drawn = [agreement(rng.random(4000) < 0.2, gold, everywhere).z for _ in range(20)]
    assert abs(np.mean(drawn)) < 1
    assert 0.6 < np.std(drawn) < 1.5
    assert agreement(gold & (rng.random(4000) < 0.5), gold, everywhere).z > 20


def test_only_places_count():
    found, gold = np.array([1, 1, 0, 1], dtype=bool), np.array([1, 0, 1, 1], dtype=bool)
    a = agreement(found, gold, np.array([0, 1, 1, 1], dtype=bool))
    assert (a.hits, a.found, a.gold) == (1, 2, 2)


# --- morphemes ------------------------------------------------------------------------------------------------------


def test_turkish_suffixes():
    """evlerimizde kaldım, "in our houses I stayed": ev ler im iz de, kal dı m. ı has two bytes, so m is at byte 17.

    Bytes: ev 0, ler 2, im 5, iz 7, de 9; space 11; kal 12, dı 15, m 18. Eight morphemes; the first is given, so seven:
    five of them inside words (ler im iz de dı m: six) and one at a word start.
    """
    text = "evlerimizde kaldım".encode()
    known = {"evlerimizde": ("ev", "ler", "im", "iz", "de"), "kaldım": ("kal", "dı", "m")}
    assert text[18:] == b"m"
    # found: ler, de, the space before kal, and one inside of kal
    found = score(text, [2, 9, 11, 13], morphemes=known, graphemes=False)
    assert found["morpheme_coverage"] == 1
    m, inside = found["morphemes"], found["morphemes_inside"]
    assert (m["gold"], m["precision"], m["recall"]) == (7, 3 / 4, 3 / 7)
    assert m["f1"] == pytest.approx(6 / 11)
    assert (inside["gold"], inside["precision"], inside["recall"]) == (6, 2 / 3, 2 / 6)
    # places: 11 characters less the given one, 6 of kaldım and the space before it; 8 of 17 are edges
    assert m["enrichment"] == pytest.approx((3 / 4) / (8 / 17))
    assert inside["enrichment"] == pytest.approx((2 / 3) / (6 / 15))


def test_finnish_compounds():
    """Lentokoneessa on a capital: taken from its lower case. ja is unknown: its boundary (14) counts neither way."""
    known = {"lentokoneessa": ("lento", "kone", "e", "ssa"), "yö": ("yö",)}
    text = "Lentokoneessa ja yö".encode()
    found = score(text, [5, 9, 15, 17], morphemes=known, graphemes=False)
    assert found["morpheme_coverage"] == pytest.approx(2 / 3)
    assert found["morphemes"]["gold"] == 4  # kone, e, ssa, yö; lento is given
    assert (found["morphemes"]["recall"], found["morphemes"]["precision"]) == (3 / 4, 1)
    assert found["morphemes_inside"]["recall"] == 2 / 3


def test_telugu_suffix_after_a_conjunct():
    """పుస్తకాలలో: book + plural + in. pa u sa virama ta ka aa | la | la oo: the plural is character 7, byte 21"""
    word = "పుస్తకా", "ల", "లో"
    chars = Characters("".join(word).encode())
    gold, known = morpheme_starts(chars, {"".join(word): word})
    assert np.flatnonzero(gold).tolist() == [0, 7, 8]
    assert known.all()
    found = score(chars, [23, 24], morphemes={"".join(word): word}, graphemes=False)  # third byte of ల, first of లో
    assert found["morphemes"]["f1"] == 1
    assert found["char_start_share"] == 0.5
