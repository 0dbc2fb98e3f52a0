"""Packing and the data cursor, for any documents, sizes, readers and places to stop."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from hnet.config import BOS, EOS
from hnet.data import units
from hnet.data.corpus import Corpus
from hnet.data.files import read_files
from hnet.data.mixture import Mixture
from hnet.data.pack_stream import PackStream, merge
from hnet.data.packing import eval_batches
from hnet.data.streaming import LocalStream
from hnet.errors import UserError
from tests.data_io.test_files import jsonl
from tests.test_data import key, sequences

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies
quick = settings(max_examples=40, deadline=None, derandomize=True)

documents = st.lists(st.binary(min_size=1, max_size=80), min_size=1, max_size=12)
seeds = st.integers(0, 2**32)


def symbols(docs, seq_len):
    """Every piece of an epoch, as targets."""
    step = seq_len - 1
    return sorted(
        d[a : a + step] + (b"\xff" if a + step >= len(d) else b"") for d in docs for a in range(0, len(d), step)
    )


@quick
@given(documents, st.integers(2, 40), st.integers(1, 200), seeds)
def test_an_epoch_of_packs_is_every_piece_of_every_document_once(docs, seq_len, batch, seed):
    corpus = Corpus.of(docs)
    total = corpus.num_bytes + len(docs)
    stream = PackStream(corpus, seq_len, min(batch, corpus.num_bytes), seed)
    pieces, joined, left = [], b"", total
    while left:
        for inputs, targets in sequences(next(stream)):
            assert inputs[0] == BOS
            assert inputs[1:] == targets[:-1]
            assert 1 <= len(targets) <= seq_len
            joined += bytes(targets[:left])
            left -= len(targets[:left])
    for piece in sorted(symbols(docs, seq_len), key=len, reverse=True):  # the epoch is some order of the pieces
        pieces.append(piece)
    assert sorted(joined) == sorted(b"".join(pieces))
    one = next(PackStream(corpus, seq_len, corpus.num_bytes, seed))
    cut = [bytes(t) for _, t in sequences(one)]
    assert all(p in pieces for p in cut[:-1])


@quick
@given(documents, st.integers(2, 40), st.integers(1, 200), st.integers(1, 900), st.integers(1, 4))
def test_an_evaluation_is_a_beginning_of_the_documents_in_order(docs, seq_len, batch, most, world_size):
    corpus = Corpus.of(docs)
    ranks = [list(eval_batches(corpus, seq_len, batch, most, r, world_size)) for r in range(world_size)]
    assert len({len(r) for r in ranks}) == 1
    batches = [ranks[i % world_size][i // world_size] for i in range(world_size * len(ranks[0]))]
    found = b"".join(bytes(t) for b in batches if not b.filler for _, t in sequences(b))
    whole = b"".join(d + bytes([EOS]) for d in docs)
    assert whole.startswith(found)
    assert len(found) >= min(most, len(whole))
    assert sum(b.num_bytes for b in batches) == len(found) - sum(
        whole[: len(found)][end - 1] == EOS for end in np.cumsum([len(d) + 1 for d in docs]) if end <= len(found)
    )


class Files:
    """Some JSONL files with their documents, for the length of a test."""

    def __init__(self, texts, files):
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        self.paths = [root / f"{i}.jsonl" for i in range(files)]
        for i, path in enumerate(self.paths):
            path.write_bytes(jsonl([{"text": t} for t in texts[i::files]]))


texts = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=6, max_size=40)


@pytest.fixture
def tiny_shards(monkeypatch):
    monkeypatch.setattr(units, "LEAST_SHARD", 32)


@pytest.mark.usefixtures("tiny_shards")
@settings(quick, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@given(texts, st.integers(1, 4), st.integers(1, 12), st.integers(1, 300))
def test_shards_of_any_files_are_every_document_once(docs, files, shards, window):
    data = Files(docs, files)
    source = LocalStream(data.paths, "file", "text", window, 0.0, 1, shards)
    found = []
    for shard in range(shards):
        reader, _ = source._epoch(0, None, shard, shards)
        found += [d for d in reader if d]
    assert sorted(found) == sorted(t.encode() for t in docs)


@pytest.mark.usefixtures("tiny_shards")
@settings(quick, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_readers_may_go_on_from_any_others_at_any_place(data):
    """Files in memory and streamed, alone or mixed; ranks stop after some steps, others go on: the positions are those
    that one reader of small packs sees."""
    draw = data.draw
    docs = draw(texts)
    files = Files(docs, draw(st.integers(1, 3)))
    kinds = draw(st.lists(st.sampled_from(["memory", "stream"]), min_size=1, max_size=3))
    seq_len, pack, shards = draw(st.integers(2, 50)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 6]))
    hypothesis.assume(sum(len(t.encode()) for t in docs) >= pack * 4)

    def make(rank, world_size, batch):
        sources = [
            Corpus.of(t.encode() for t in docs)
            if kind == "memory"
            else LocalStream(files.paths, "file", "text", 200, 0.0, i, shards)
            for i, kind in enumerate(kinds)
        ]
        weights = [1 / len(kinds)] * len(kinds)
        source = sources[0] if len(kinds) == 1 else Mixture(sources, weights)
        return PackStream(source, seq_len, batch, 7, rank, world_size, shards)

    hypothesis.assume(all(_has_text(s) for s in make(0, 1, pack).sources))
    one, state = make(0, 1, pack), None
    for leg in range(3):
        world_size, steps = draw(st.integers(1, 4)), draw(st.integers(0, 4))
        batch = pack if leg == 0 else draw(st.sampled_from([pack, 2 * pack, 4 * pack]))
        ranks = [make(r, world_size, batch) for r in range(world_size)]
        if state is not None:
            for r in ranks:
                r.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            got = [t for r in ranks for t in next(r).targets.tolist()]
            assert got == [t for _ in range(len(got) // pack) for t in next(one).targets.tolist()]
        state = merge([r.state_dict() for r in ranks])
    later = make(0, 1, pack)
    later.load_state_dict(state)
    assert [key(next(later)) for _ in range(3)] == [key(next(one)) for _ in range(3)]


def _has_text(source):
    """Every shard a source could be read in has a document: otherwise training says so and stops."""
    if isinstance(source, Corpus):
        return True
    counts = [n for n in (1, 2, 3, 6) if source.splits(n)]
    return all(any(d for d in source._epoch(0, None, s, n)[0]) for n in counts for s in range(n))


@quick
@given(st.text(st.sampled_from("ab \t\r\n"), max_size=60), st.sampled_from(["file", "line", "paragraph"]))
def test_plain_text_is_streamed_as_it_is_read(text, documents):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.txt"
        path.write_bytes(text.encode())
        if not text:
            return
        corpus = read_files([path], documents)
        want = [corpus.document(i).tobytes() for i in range(len(corpus))]
        source = LocalStream([path], documents, "text", 10, 0.0, 0)
        assert list(source._epoch(0, None, 0, 1)[0]) == want


@quick
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["path", "weight", "text_key", "x"]), x),
))  # fmt: skip
def test_any_value_of_data_is_read_or_named(value):
    from hnet.config.entries import Entry, parse_data

    for data in ([value], [value, "a"], [{"path": "a", "weight": value}], [{"path": value, "weight": 1}]):
        try:
            entries = parse_data(data)
        except UserError as e:
            assert str(e).startswith("data")  # noqa: PT017
        else:
            assert all(isinstance(e, Entry) and isinstance(e.path, str) and e.path for e in entries)
            assert all(e.weight is None or 0 < e.weight < float("inf") for e in entries)
