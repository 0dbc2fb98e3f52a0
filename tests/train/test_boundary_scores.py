"""Where boundaries are, at every evaluation: a small text by hand, and a run against a loop over its characters."""

import dataclasses
import unicodedata

import numpy as np
import pytest
import torch

from hnet.config import BOS
from hnet.data.packing import Batch, eval_batches
from hnet.metrics_log import read_metrics
from hnet.train.boundary_scores import BoundaryScores
from hnet.train.loop import Trainer

KEYS = ("char_start_share", "space_share", "word_start_share", "word_starts_found")


def pack(*texts):
    ids = [x for text in texts for x in (BOS, *text)]
    cu = np.cumsum([0, *(len(t) + 1 for t in texts)])
    return Batch(torch.tensor(ids), torch.tensor(ids), torch.tensor(cu, dtype=torch.int32), max(np.diff(cu)), len(ids))


def test_by_hand():
    """BOS a b space c d | BOS కా space e: positions 0-5 and 6-14, ka at 7-9, its vowel sign at 10-12, the space at 13"""
    packs = [pack(b"ab cd"), pack("కా e".encode())]
    starts = np.zeros((2, 15), dtype=bool)
    starts[0, [0, 3, 6, 9, 12, 14]] = True  # given, space, given, third byte of ka, third byte of aa, e
    starts[1, [0, 6, 14]] = True
    found = BoundaryScores().scores(starts, packs)
    # four boundaries: space, ka, aa, e. c (by its space) and e are found; the words after BOS are given
    assert [found[f"stage0/{k}"] for k in KEYS] == [0.5, 0.25, 0.5, 1.0]
    assert [found[f"stage1/{k}"] for k in KEYS] == [1.0, 0.0, 1.0, 0.5]


def test_only_the_positions_that_were_looked_at():
    scores = BoundaryScores()
    starts = np.zeros((1, 5), dtype=bool)
    starts[0, [0, 3]] = True
    found = scores.scores(starts, iter([pack(b"ab cd"), pack(b"ef")]))
    assert [found[f"stage0/{k}"] for k in KEYS][:3] == [1.0, 1.0, 0.0]
    assert scores.scores(starts, iter([])) == found  # the text is kept


def by_loop(text, given, starts):
    """Of one row of positions as text: char_start_share, space_share, word_start_share, word_starts_found"""
    chars, at = [], 0
    for c in text.decode(errors="surrogateescape"):
        size = len(c.encode(errors="surrogateescape"))
        chars.append((c, range(at, at + size)))
        at += size
    kinds = []
    for c, _ in chars:
        category = unicodedata.category(c)
        kinds.append("w" if category[0] in "LN" or c == "_" else " " if c.isspace() else ".")
        if category[0] == "M" and len(kinds) > 1 and kinds[-2] == "w":
            kinds[-1] = "w"
    first = {i for i in range(len(chars)) if kinds[i] == "w" and (i == 0 or kinds[i - 1] != "w")}
    own = {p: i for i, (_, positions) in enumerate(chars) for p in positions}
    free = [p for p in starts if p not in given]

    def settle(i):
        while i < len(chars) and kinds[i] == " ":
            i += 1
        return i

    taken = {settle(own[p]) for p in given}
    found = {settle(own[p]) for p in free} - taken
    n = len(free)
    return [
        sum(p == chars[own[p]][1][0] for p in free) / n,
        sum(kinds[own[p]] == " " for p in free) / n,
        sum(own[p] in first for p in free) / n,
        len(found & first) / len(first - taken),
    ]


def test_evaluations_of_a_run(config, tmp_path):
    words = ["పుస్తకాలలో", "ఇల్లు", "ev", "lerimiz", "kaldım,", "42", "é", "(x_1)"]
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    two = {"arch": "c1 c1 T1", "d_model": [32, 32, 64], "compression": [3.0, 2.0], "documents": "line", "preset": ""}
    config = dataclasses.replace(config, **two, data=[str(tmp_path / "text.txt")], pattern="*", weight_ema=0.9)
    trainer = Trainer(config)
    trainer.train()
    row = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_bpb" in r][-1]
    masks = trainer.task.flips.last
    text, given, at = b"", set(), 0
    for batch in eval_batches(trainer.task.val, config.seq_len, config.batch_bytes, config.eval_bytes):
        given |= {at + int(i) for i in batch.cu_seqlens[:-1]}
        text += bytes(batch.input_ids.tolist()).replace(bytes([BOS]), b"\n")
        at += len(batch.input_ids)
    assert masks.shape == (2, len(text))
    for i in range(2):
        wanted = by_loop(text, given, np.flatnonzero(masks[i]).tolist())
        assert [row[f"stage{i}/{k}"] for k in KEYS] == pytest.approx(wanted, rel=1e-6)
    assert 0 < row["stage0/char_start_share"] < 1
    assert not any(f"stage0/{k}" in trainer.evaluate() for k in KEYS)  # no step since
