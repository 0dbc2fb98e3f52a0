import json
import tracemalloc

import numpy as np
import pytest

from hnet.config import BOS, EOS
from hnet.data.corpus import Corpus
from hnet.data.pack_stream import PackStream
from hnet.data.packing import IGNORED, eval_batches


def corpus(*texts):
    return Corpus.of(t.encode() if isinstance(t, str) else t for t in texts)


def sequences(batch):
    cu = batch.cu_seqlens.tolist()
    return [(batch.input_ids[a:b].tolist(), batch.targets[a:b].tolist()) for a, b in zip(cu[:-1], cu[1:], strict=True)]


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
    want = np.bincount(c.buffer, minlength=256)
    want[EOS] += len(texts)
    assert np.array_equal(counts, want)
    assert stream.epochs == pytest.approx(len(seen) / total)


def test_batches_are_full_and_sequences_short_enough():
    c = Corpus.of([b"q" * 1000, b"r" * 3])
    stream = PackStream(c, seq_len=64, batch_bytes=100, seed=0)
    for _ in range(50):
        batch = next(stream)
        assert batch.num_targets == 100
        assert batch.cu_seqlens[-1] == 100
        assert int(batch.cu_seqlens.diff().max()) == batch.max_seqlen <= 64


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
    few = list(eval_batches(c, seq_len=100, batch_bytes=12, max_bytes=5))
    assert sum(b.num_targets for b in few) == 6


@pytest.mark.parametrize(("seq_len", "stride"), [(10, 3), (10, 1), (10, 10), (2, 1), (64, 20)])
def test_with_a_stride_every_symbol_is_scored_once_after_enough_of_its_document(seq_len, stride):
    c = Corpus.of([bytes(range(n)) for n in (1, 8, 9, 10, 11, 12, 13, 57)])
    scored = []  # (document, place, context) of every target; bytes say their place, lengths the document
    for batch in eval_batches(c, seq_len, 40, None, stride=stride):
        found = sequences(batch)
        assert batch.num_targets == sum(t != IGNORED for _, ts in found for t in ts)
        assert batch.num_bytes == sum(t not in (IGNORED, EOS) for _, ts in found for t in ts)
        for inputs, targets in found:
            assert len(inputs) <= seq_len
            assert all(t in (x, IGNORED) for x, t in zip(inputs[1:], targets, strict=False))
            scored += [(t, i, inputs[1]) if i else (t, i, 0) for i, t in enumerate(targets) if t != IGNORED]
    wanted = sorted(s for n in c.sizes for s in [*range(n), EOS])
    assert sorted(t for t, _, _ in scored) == wanted
    for symbol, context, first in scored:
        assert context >= seq_len - stride or (first == 0 and (symbol == EOS or context == symbol))


def test_eval_batches_stop_after_that_many_bytes_of_text():
    c = Corpus.of([b"ab"] * 100)
    (batch,) = eval_batches(c, 10, 1000, 50)
    assert (batch.num_bytes, batch.num_targets) == (50, 75)


def test_looking_ahead_takes_nothing():
    c = random_corpus()
    stream, other = PackStream(c, 50, 37, 5), PackStream(c, 50, 37, 5)
    for _ in range(200):
        seen = stream.ahead(37)
        batch = next(stream)
        assert seen.targets.tolist() == batch.targets.tolist()[: len(seen)]
        assert key(batch) == key(next(other))


def random_corpus(documents=20, longest=300, seed=0):
    rng = np.random.default_rng(seed)
    return Corpus.of(
        rng.integers(0, 256, rng.integers(1, longest)).astype(np.uint8).tobytes() for _ in range(documents)
    )


def key(batch):
    return batch.input_ids.tolist(), batch.targets.tolist(), batch.cu_seqlens.tolist(), batch.num_bytes


def take(stream, n):
    return [key(next(stream)) for _ in range(n)]


def test_no_target_comes_from_another_document():
    # Document i is made of bytes 2i and 2i + 1, so that every symbol says which document it is of.
    rng = np.random.default_rng(0)
    c = Corpus.of((2 * i + rng.integers(0, 2, rng.integers(1, 40))).astype(np.uint8).tobytes() for i in range(100))
    stream = PackStream(c, seq_len=16, batch_bytes=57, seed=2)
    for _ in range(200):
        for inputs, targets in sequences(next(stream)):
            assert inputs[0] == BOS
            assert len({s // 2 for s in inputs[1:] + targets if s < BOS}) <= 1
            assert EOS not in inputs
            assert EOS not in targets[:-1]


@pytest.mark.parametrize(("seq_len", "batch_bytes"), [(2, 1), (7, 5), (50, 37), (64, 500), (1000, 1)])
def test_packs_are_the_epoch_cut_in_equal_parts(seq_len, batch_bytes):
    c = random_corpus()
    epoch = sequences(next(PackStream(c.select(range(20)), seq_len, c.num_bytes, 5)))  # the epoch but its last symbols
    documents, step = [c.document(i).tobytes() for i in range(len(c))], seq_len - 1
    pieces = {
        d[a : a + step] + (b"" if a + step < len(d) else b"\xff") for d in documents for a in range(0, len(d), step)
    }
    assert {bytes(targets) for _, targets in epoch[:-1]} <= pieces
    want, room = [[]], batch_bytes
    for inputs, targets in epoch:
        while targets:
            if not room:
                want.append([])
                room = batch_bytes
            n = min(room, len(targets))
            want[-1].append(([BOS, *inputs[1:n]], targets[:n]))
            inputs, targets, room = inputs[n:], targets[n:], room - n
    stream = PackStream(c, seq_len, batch_bytes, 5)
    for sequence_list in want[:-1]:
        assert sequences(next(stream)) == sequence_list


def test_num_bytes_counts_targets_that_are_not_eos_also_when_documents_have_the_bytes_254_and_255():
    c = Corpus.of([bytes([255, 254, 255])] * 8)
    stream = PackStream(c, seq_len=64, batch_bytes=8, seed=0)
    batch = next(stream)
    assert (batch.num_targets, batch.num_bytes) == (8, 6)
    (whole,) = eval_batches(c, 64, 100, 100)
    assert (whole.num_targets, whole.num_bytes) == (32, 24)


def test_resume_at_every_batch_equals_the_straight_run():
    c = random_corpus()
    straight, states = PackStream(c, 50, 137, seed=5), []
    batches = []
    for _ in range(60):  # into the third epoch
        states.append(straight.state_dict())
        batches.append(key(next(straight)))
    assert straight.epochs > 2
    for i, state in enumerate(states):
        resumed = PackStream(c, 50, 137, seed=5)
        resumed.load_state_dict(state)
        assert resumed.epochs == state["epochs"]
        assert take(resumed, min(3, 60 - i)) == batches[i : i + 3]


def test_state_is_small_and_plain():
    stream = PackStream(random_corpus(), 50, 37, seed=5)
    take(stream, 100)
    state = stream.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert len(json.dumps(state)) < 300


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_packs_of_one_rank(world_size):
    c, accumulate = random_corpus(), 12 // world_size
    one = take(PackStream(c, 50, 37, seed=5), 120)
    ranks = [PackStream(c, 50, 37, 5, rank, world_size) for rank in range(world_size)]
    for step in range(10):  # 12 packs each
        got = [take(r, accumulate) for r in ranks]
        want = one[12 * step : 12 * step + 12]
        assert [got[p % world_size][p // world_size] for p in range(12)] == want
        assert len({json.dumps(r.state_dict()) for r in ranks}) == 1


def test_resume_with_another_world_size():
    c = random_corpus()
    one = take(PackStream(c, 50, 37, seed=5), 60)
    pair = [PackStream(c, 50, 37, 5, rank, 2) for rank in range(2)]
    for r in pair:
        take(r, 9)
    three = [PackStream(c, 50, 37, 5, rank, 3) for rank in range(3)]
    for r in three:
        r.load_state_dict(pair[0].state_dict())
    got = [take(r, 14) for r in three]
    assert [got[p % 3][p // 3] for p in range(42)] == one[18:60]


def test_skipping_makes_no_packs():
    c = random_corpus()
    a, b = PackStream(c, 50, 37, seed=5), PackStream(c, 50, 37, seed=5)
    take(a, 77)
    b.skip(77)
    assert take(a, 3) == take(b, 3)


def test_order_depends_on_the_seed():
    c = random_corpus()
    assert take(PackStream(c, 50, 37, 5), 3) == take(PackStream(c, 50, 37, 5), 3)
    assert take(PackStream(c, 50, 37, 5), 3) != take(PackStream(c, 50, 37, 6), 3)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (lambda c: PackStream(c, 50, 37, 6), "seed was 5 and is 6"),
        (lambda c: PackStream(c, 51, 37, 5), "seq_len was 50 and is 51"),
        (lambda c: PackStream(c.select(range(19)), 50, 37, 5), "documents was 20 and is 19"),
        (lambda c: PackStream(c.select([1, 0, *range(2, 20)]), 50, 37, 5), "crc was"),
    ],
)
def test_a_state_made_with_something_else_is_refused(stream, message):
    c = random_corpus()
    with pytest.raises(ValueError, match=f"the checkpoint's place in the data does not fit: {message}"):
        stream(c).load_state_dict(PackStream(c, 50, 37, 5).state_dict())


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_eval_batches_of_all_ranks_are_those_of_one_and_every_rank_has_as_many(world_size):
    c = random_corpus()
    one = [key(b) for b in eval_batches(c, 50, 100, 1500)]
    ranks = [list(eval_batches(c, 50, 100, 1500, rank, world_size)) for rank in range(world_size)]
    assert {len(r) for r in ranks} == {-(-len(one) // world_size)}
    real = [[key(b) for b in r if not b.filler] for r in ranks]
    assert [real[i % world_size][i // world_size] for i in range(len(one))] == one
    assert sum(len(r) for r in real) == len(one)
    fillers = [b for r in ranks for b in r if b.filler]
    assert len(fillers) == -len(one) % world_size
    assert all(b.num_targets == b.num_bytes == 0 and len(b.input_ids) for b in fillers)


def test_parts_of_a_corpus_share_its_bytes():
    c = random_corpus()
    part = c.select([3, 1])
    assert part.buffer is c.buffer
    assert [d.tobytes() for d in map(part.document, range(2))] == [c.document(3).tobytes(), c.document(1).tobytes()]
    stream = PackStream(part, 400, 50, 0)
    assert next(stream).num_targets == 50
    assert stream.corpus is part


def test_a_corpus_of_short_documents_costs_less_than_twice_its_size_again():
    data = np.full(8_000_000, 97, dtype=np.uint8)
    data[79::80] = 10
    c = Corpus.cut(data, np.arange(80, 8_000_001, 80))
    tracemalloc.start()
    stream = PackStream(c, 1024, 8192, 0)
    take(stream, 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(data)


def test_bad_sizes():
    with pytest.raises(ValueError, match="the corpus has 3 bytes, fewer than one batch of 10"):
        PackStream(corpus("abc"), 8, 10, 0)
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        PackStream(corpus("abc"), 1, 1, 0)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        PackStream(corpus("abc"), 8, 1, 0, rank=2, world_size=2)
