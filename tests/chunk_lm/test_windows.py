import numpy as np
import pytest
import torch

from hnet.chunk_lm import WindowStream, eval_windows
from hnet.data.corpus import Corpus


def corpus(*sizes):
    """Documents whose bytes say which document they are of, in their high four bits, and count in the low four."""
    return Corpus.of(bytes((d << 4) | (i % 16) for i in range(size)) for d, size in enumerate(sizes))


def test_windows_are_continuous_and_inside_documents():
    c = corpus(40, 100, 30)
    stream = WindowStream(c, 20, 10, 64, seed=0)
    seen = set()
    for _ in range(40):
        ids, targets = next(stream)
        assert ids.dtype == targets.dtype == torch.int64
        assert (ids.shape, targets.shape) == ((64, 20), (64, 10))
        for row in torch.cat([ids, targets], 1).tolist():
            assert len({b >> 4 for b in row}) == 1
            assert all((b - a) % 16 == 1 for a, b in zip(row, row[1:], strict=False))
            seen.add((row[0] >> 4, row[0] & 15))
    assert len(seen) == 11 + 16 + 1  # every start (mod 16) of every document: 11, 71 and 1 places
    assert stream.unused_bytes == 0


def test_every_place_is_equally_likely():
    data = np.arange(83, dtype=np.uint8)
    c = Corpus(data, np.array([0, 33]), np.array([33, 83]))  # 4 + 21 places
    stream = WindowStream(c, 20, 10, 1000, seed=3)
    starts = torch.cat([next(stream).input_ids[:, 0] for _ in range(25)])
    counts = torch.bincount(starts, minlength=83)
    assert set(counts.nonzero().flatten().tolist()) == {*range(4), *range(33, 54)}
    assert counts[counts > 0].min() > 1000 - 5 * 31
    assert counts.max() < 1000 + 5 * 31


def test_short_documents_are_joined_among_themselves():
    c = corpus(10, 60, 12, 9)
    rows = torch.cat([torch.cat(tuple(next(s)), 1) for s in [WindowStream(c, 20, 10, 400, 0)] for _ in range(2)])
    kinds = {tuple(sorted({b >> 4 for b in row})) for row in rows.tolist()}
    assert kinds == {(1,), (0, 2, 3)}
    only = WindowStream(corpus(10, 12, 9), 20, 10, 40, 0)
    assert {b >> 4 for b in torch.cat(tuple(next(only)), 1).flatten().tolist()} == {0, 1, 2}
    assert only.unused_bytes == 0
    left = WindowStream(corpus(10, 60, 12), 20, 10, 4, 0)
    assert left.unused_bytes == 22
    assert {b >> 4 for b in next(left).input_ids.flatten().tolist()} == {1}


def test_resume_is_exact():
    c = corpus(200, 300)
    a, b = WindowStream(c, 20, 10, 8, 7), WindowStream(c, 20, 10, 8, 7)
    for _ in range(5):
        next(a)
    b.load_state_dict(a.state_dict())
    for _ in range(3):
        x, y = next(a), next(b)
        assert torch.equal(x.input_ids, y.input_ids)
        assert torch.equal(x.targets, y.targets)
    assert a.epochs == pytest.approx(8 * 8 * 20 / (171 + 271))
    other = next(WindowStream(c, 20, 10, 8, 8))
    assert not torch.equal(other.input_ids, next(WindowStream(c, 20, 10, 8, 7)).input_ids)


def test_eval_windows_are_spread_and_repeatable():
    c = corpus(100, 100)
    batches = list(eval_windows(c, 20, 10, 4, 10))
    assert [len(b.input_ids) for b in batches] == [4, 4, 2]
    documents = torch.cat([b.input_ids[:, 0] >> 4 for b in batches]).tolist()
    assert documents == [0] * 5 + [1] * 5
    again = list(eval_windows(c, 20, 10, 4, 10))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))
    assert sum(len(b.input_ids) for b in eval_windows(corpus(31), 20, 10, 4, 10)) == 2


def test_bad_arguments():
    c = corpus(29)
    with pytest.raises(ValueError, match=r"the corpus has 29 bytes, fewer than one window of seq_len \+ chunk = 30"):
        WindowStream(c, 20, 10, 1, 0)
    with pytest.raises(ValueError, match="held-out text has no document"):
        list(eval_windows(c, 20, 10, 1, 5))
    for bad in ({"seq_len": 0}, {"chunk": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least 1, got 0"):
            WindowStream(c, **{"seq_len": 2, "chunk": 1, "batch_size": 1, "seed": 0, **bad})
