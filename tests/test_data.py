import numpy as np
import pytest
import torch

from hnet.data.corpus import Corpus, find_files, read_corpus
from hnet.data.packing import BOS, EOS, PackStream, eval_batches


def corpus(*texts):
    return Corpus.of(t.encode() if isinstance(t, str) else t for t in texts)


def sequences(batch):
    cu = batch.cu_seqlens.tolist()
    return [(batch.input_ids[a:b].tolist(), batch.targets[a:b].tolist()) for a, b in zip(cu[:-1], cu[1:], strict=True)]


def test_read_files_and_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_bytes(b"xx")
    (tmp_path / "a" / "y.txt").write_bytes(b"\xff\x00\xfe")
    (tmp_path / "a" / ".hidden.py").write_bytes(b"no")
    (tmp_path / "a" / "skip").mkdir()
    (tmp_path / "a" / "skip" / "z.py").write_bytes(b"zz")
    (tmp_path / "empty.py").write_bytes(b"")
    assert [p.name for p in find_files([tmp_path / "a"], "*.py", ["skip"])] == ["x.py"]
    c = read_corpus([tmp_path])
    assert [c.document(i).tobytes() for i in range(len(c))] == [b"zz", b"xx", b"\xff\x00\xfe"]
    with pytest.raises(FileNotFoundError, match=r"data path .*nowhere does not exist"):
        read_corpus([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match=r"no file below .* matches '\*.rs'"):
        read_corpus([tmp_path], "*.rs")
    with pytest.raises(ValueError, match="the corpus is empty"):
        read_corpus([tmp_path / "empty.py"])
    with pytest.raises(ValueError, match="at least one file or folder"):
        read_corpus([])


def test_split_is_by_document_at_random_and_repeatable():
    texts = [bytes([65 + i]) * (10 + i) for i in range(40)]
    c = Corpus.of(texts)
    train, val = c.split(0.2, seed=3)
    together = sorted(d.document(i).tobytes() for d in (train, val) for i in range(len(d)))
    assert together == sorted(texts)
    assert 0.15 < val.num_bytes / c.num_bytes < 0.3
    assert [val.document(i).tobytes() for i in range(len(val))] != texts[-len(val) :]  # not the tail
    again = c.split(0.2, seed=3)[1]
    assert np.array_equal(val.data, again.data)
    assert not np.array_equal(val.data, c.split(0.2, seed=4)[1].data)
    with pytest.raises(ValueError, match="cannot hold documents out of 1"):
        corpus("abc").split(0.5, 0)


def test_every_position_predicts_the_next_symbol_of_its_own_document():
    c = corpus("abcdefgh", "XY")
    stream = PackStream(c, seq_len=100, batch_bytes=10, seed=0)
    batch = next(stream)
    assert batch.num_targets == 10
    for inputs, targets in sequences(batch):
        assert inputs[0] == BOS
        assert inputs[1:] == targets[:-1]


def test_an_epoch_covers_every_byte_once_as_a_target():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 200, rng.integers(1, 60)).astype(np.uint8).tobytes() for _ in range(30)]
    c = Corpus.of(texts)
    stream = PackStream(c, seq_len=17, batch_bytes=23, seed=1)
    counts = np.zeros(256, dtype=int)
    total = c.num_bytes + len(texts)  # every byte, and EOS once a document
    seen = []
    while len(seen) < total:
        seen += next(stream).targets.tolist()
    for s in seen[:total]:
        counts[s] += 1
    want = np.bincount(c.data, minlength=256)
    want[EOS] += len(texts)
    assert np.array_equal(counts, want)
    assert stream.epoch == (0 if len(seen) == total and stream.index else 1)


def test_batches_are_full_and_sequences_short_enough():
    c = Corpus.of([b"q" * 1000, b"r" * 3])
    stream = PackStream(c, seq_len=64, batch_bytes=100, seed=0)
    for _ in range(50):
        batch = next(stream)
        assert batch.num_targets == 100
        assert batch.cu_seqlens[-1] == 100
        assert int(batch.cu_seqlens.diff().max()) == batch.max_seqlen <= 64


def test_state_resumes_exactly_mid_document():
    rng = np.random.default_rng(0)
    c = Corpus.of([rng.integers(0, 250, 300).astype(np.uint8).tobytes() for _ in range(5)])
    a = PackStream(c, 50, 37, seed=5)
    for _ in range(61):  # into the second epoch
        next(a)
    b = PackStream(c, 50, 37, seed=5)
    b.load_state_dict(a.state_dict())
    for _ in range(60):
        x, y = next(a), next(b)
        assert torch.equal(x.input_ids, y.input_ids)
        assert torch.equal(x.cu_seqlens, y.cu_seqlens)


def test_epochs_are_shuffled_differently():
    c = Corpus.of([bytes([i]) * 9 for i in range(30)])
    stream = PackStream(c, 64, 100, seed=0)
    one, two = ([t for _ in range(3) for t in next(stream).targets.tolist()] for _ in range(2))
    assert one != two
    assert sorted(one) == sorted(two)


def test_eval_batches_keep_order_and_documents_whole():
    c = corpus("abcde", "fghij", "klmno")
    batches = list(eval_batches(c, seq_len=100, batch_bytes=12, max_bytes=1000))
    assert [len(sequences(b)) for b in batches] == [2, 1]
    assert bytes(t for b in batches for _, ts in sequences(b) for t in ts if t != EOS) == b"abcdefghijklmno"
    few = list(eval_batches(c, seq_len=100, batch_bytes=12, max_bytes=6))
    assert sum(b.num_targets for b in few) == 6


def test_bad_sizes():
    with pytest.raises(ValueError, match="the corpus has 3 bytes, fewer than one batch of 10"):
        PackStream(corpus("abc"), 8, 10, 0)
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        PackStream(corpus("abc"), 1, 1, 0)
