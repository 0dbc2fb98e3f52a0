"""The synthetic language, its corpus' relatives, and that the benchmark runs and tells what it measured."""

import json

import numpy as np
import pytest

from benchmarks.agglutinative import synthetic
from benchmarks.agglutinative.__main__ import main
from benchmarks.agglutinative.report import section
from hnet.segment.baselines import by_morphemes
from hnet.segment.characters import Characters
from hnet.segment.scores import score
from scripts import agglutinative_corpus as corpus

PRE_CONSONANT = set(synthetic.CONSONANTS)


def test_every_word_has_one_analysis():
    lines, lexicon = synthetic.generate(30_000, seed=3)
    assert sum(len(line.encode()) + 1 for line in lines) >= 30_000
    words = [w for line in lines for w in line.split()[:-1]]
    assert set(words) == set(lexicon)
    assert all("".join(parts) == word for word, parts in lexicon.items())
    assert all(part[0] in PRE_CONSONANT for parts in lexicon.values() for part in parts)
    assert 2 < np.mean([len(parts) for parts in lexicon.values()]) < 4
    assert synthetic.generate(30_000, seed=3) == (lines, lexicon)
    assert synthetic.generate(30_000, seed=4)[0] != lines


def test_words_are_words_and_gold_is_perfect():
    """The scorer finds the generator's words, and the generator's morphemes score 1."""
    lines, lexicon = synthetic.generate(5_000)
    chars = Characters("\n".join(lines).encode())
    assert {chars.text[a:b] for a, b in chars.words()} == set(lexicon)
    found = score(chars, by_morphemes(chars, lexicon), morphemes=lexicon, graphemes=False)
    assert (found["morpheme_coverage"], found["char_start_share"], found["word_starts_found"]) == (1, 1, 1)
    assert found["morphemes_inside"]["f1"] == found["morphemes_inside"]["r_value"] == 1
    assert found["morphemes_inside"]["gold"] == sum(len(lexicon[w]) - 1 for line in lines for w in line.split()[:-1])


def test_prose_of_help_pages():
    page = """<html><head><title>no</title><script>no no</script></head><body><nav>Not this, however long it may be,
      as it is no prose</nav><h1>Short</h1><p>Bu paragraf <b>yeterince</b> uzun,\n çünkü kırktan fazla harfi var.</p>
      <pre>code that is long enough to be mistaken for a paragraph</pre>
      <p>Bu paragraf yeterince uzun, çünkü kırktan fazla harfi var.</p></body></html>"""
    assert corpus.prose([page, page]) == ["Bu paragraf yeterince uzun, çünkü kırktan fazla harfi var."]


@pytest.mark.parametrize(
    ("output", "morphemes"),
    [
        ("[Ln][Ica][Xp]talo[X]talo[Sine][Ny]ssa", ("talo", "ssa")),
        ("[Lt][Xp]juosta[X]juokse[Tt][Ap][P1][Ny][Ef]n", ("juokse", "n")),
        (
            "[Lt][Xp]lentää[X]len[Ln][Xj]to[X]to[Sn][Ny][Bh][Bc][Ln][Xp]kone[X]konee[Sine][Ny]ssa[O1m]mme",
            ("len", "to", "konee", "ssa", "mme"),
        ),
    ],
)
def test_morphemes_of_voikko(output, morphemes):
    assert corpus.surface_morphemes(output) == morphemes


def test_a_run_and_its_table(tmp_path):
    pytest.importorskip("tokenizers")
    results = tmp_path / "r.json"
    arms = ["recipe", "one byte a chunk"]
    flags = ["--bytes", "30000", "--steps", "2", "--seeds", "0", "--results", str(results), "--arms"]
    for _ in range(2):  # the second finds all done
        main([*flags, *arms])
    data = json.loads(results.read_text())
    assert [r["arm"] for r in data["rows"]] == arms
    recipe = data["rows"][0]
    assert recipe["char_end_share"] == 1
    assert recipe["morpheme_coverage"] > 0.9
    assert recipe["baselines"]["white space"]["word_starts_found"] == 1
    assert recipe["baselines"]["random"]["bytes_per_chunk"] == pytest.approx(recipe["bytes_per_chunk"], rel=0.2)
    assert 8 < recipe["target"] < 9
    lines = section(data).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:4]] == arms
    assert f"{recipe['val_bpb']:.3f}" in lines[2]
    predicted, bpe = recipe["ahead"]["morphemes"]["f1"], recipe["baselines"]["BPE"]["morphemes"]["f1"]
    assert f" / {predicted:.2f} ({predicted:.2f}) | " in lines[7]
    assert f" / {bpe:.2f} | " in lines[7]
