import json
import sys

import pytest

from hnet.data.pack_stream import PackStream
from hnet.data.sources import open_data
from hnet.data.streaming import DocumentStream, parse_entry
from hnet.data.workers import Workers
from tests.data_io.test_files import optional, parquet
from tests.data_io.test_splits import Config
from tests.test_data import key, sequences, take

datasets = optional("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def texts(corpus):
    return [corpus.document(i).tobytes() for i in range(len(corpus))]


DOCUMENTS = [f"<{i}> " + f"document {i}, తెలుగు. " * (1 + i * 7 % 13) for i in range(90)]


@pytest.fixture(params=["json", pytest.param("parquet", marks=optional("pyarrow"))])
def entry(request, tmp_path):
    """The documents in three local files."""
    for part in range(3):
        rows = [{"id": i, "body": t} for i, t in enumerate(DOCUMENTS[30 * part : 30 * part + 30])]
        if request.param == "json":
            content = "".join(json.dumps(r) + "\n" for r in rows).encode()
        else:
            content = parquet(rows, row_group_size=7)
        (tmp_path / f"part-{part}.{request.param}").write_bytes(content)
    return f"hf:{request.param}?data_files={tmp_path}/part-*.{request.param}&text=body"


def packs(entry, window_bytes=2000, held_fraction=0.0, rank=0, world_size=1):
    return PackStream(DocumentStream(entry, "text", window_bytes, held_fraction, 3), 64, 150, 5, rank, world_size)


@datasets
def test_an_epoch_is_every_document_once(entry):
    stream, out = packs(entry), bytearray()
    total = sum(len(t.encode()) + 1 for t in DOCUMENTS)
    while stream.epochs < 1:
        assert len(out) < 2 * total
        out += bytes(next(stream).targets.tolist())
    # Pieces are shuffled; counted as symbols, the epoch is all there.
    want = b"".join(t.encode() + b"\xff" for t in DOCUMENTS)
    assert sorted(out[:total]) == sorted(want)


@datasets
def test_no_target_crosses_documents(entry):
    stream = packs(entry)
    for _ in range(60):
        for inputs, targets in sequences(next(stream)):
            assert inputs[0] == 254
            assert bytes(t for t in targets if t != 255) in "\n".join(DOCUMENTS).encode()


@datasets
def test_resume_at_every_batch_equals_the_straight_run(entry):
    straight, states, batches = packs(entry), [], []
    while straight.epochs < 2:
        states.append(json.loads(json.dumps(straight.state_dict())))
        batches.append(key(next(straight)))
    assert straight.state_dict()["rows"][0][0]["window"] > 10
    assert max(len(json.dumps(s)) for s in states) < 2000
    for i in range(0, len(states), 5):
        resumed = packs(entry)
        resumed.load_state_dict(states[i])
        assert take(resumed, min(3, len(batches) - i)) == batches[i : i + 3]


@datasets
def test_ranks_and_workers_share_the_packs_of_one(entry):
    one = take(packs(entry), 24)
    pair = [packs(entry, rank=r, world_size=2) for r in range(2)]
    got = [take(r, 12) for r in pair]
    assert [got[p % 2][p // 2] for p in range(24)] == one
    assert pair[0].state_dict() == pair[1].state_dict()
    ahead = Workers(packs(entry), 2)
    try:
        assert take(ahead, 17) == one[:17]
        later = packs(entry)
        later.load_state_dict(ahead.state_dict())
        assert take(later, 7) == one[17:]
    finally:
        ahead.close()


@datasets
def test_held_out_documents_are_at_random_and_never_trained_on(entry):
    source = DocumentStream(entry, "text", 2000, 0.2, 3)
    held = texts(source.take(10**9, held_out=True))
    kept = texts(source.take(10**9))
    assert sorted(held + kept) == sorted(t.encode() for t in DOCUMENTS)
    assert 8 <= len(held) <= 30
    assert held != [t.encode() for t in DOCUMENTS[: len(held)]]
    windows = source.windows(None, 1)
    seen = []
    while (w := next(windows))[0]["epoch"] == 0:
        seen += texts(w[1])
    assert seen == kept
    assert texts(DocumentStream(entry, "text", 2000, 0.2, 4).take(10**9, held_out=True)) != held
    assert len(source.take(1, held_out=True)) == 1


@datasets
def test_open_data_with_a_stream(entry, tmp_path):
    said = []
    train, val = open_data(Config([entry], eval_bytes=500), said.append)
    assert isinstance(train, DocumentStream)
    assert 500 <= val.num_bytes < 2000
    assert said == [f"held out of {entry}: every document at random with probability 0.2"]
    (tmp_path / "dev.txt").write_text("held out")
    train, val = open_data(Config([entry], val_data=[str(tmp_path / "dev.txt")]), said.append)
    assert texts(val) == [b"held out"]
    assert train.split.fraction == 0
    train, val = open_data(Config([str(tmp_path / "dev.txt")], val_data=[entry], eval_bytes=100), said.append)
    assert texts(val)[0] == DOCUMENTS[0].encode()


@datasets
def test_a_stream_that_is_too_small_or_has_no_text(entry):
    with pytest.raises(ValueError, match="bytes to train on, fewer than one batch of 1000000"):
        next(PackStream(DocumentStream(entry, "text", 10**7, 0.0, 0), 64, 10**6, 0))
    with pytest.raises(ValueError, match="has no 'text', it has id, body: set text_key"):
        next(packs(entry.replace("&text=body", "")))
    with pytest.raises(ValueError, match=r"no document held out \(raise val_fraction"):
        DocumentStream(entry, "text", 100, 1e-12, 0).take(10, held_out=True)


@datasets
def test_a_checkpoint_of_another_stream_is_refused(entry):
    stream = packs(entry)
    next(stream)
    with pytest.raises(ValueError, match="does not fit: shuffle_bytes was 2000 and is 3000"):
        packs(entry, window_bytes=3000).load_state_dict(stream.state_dict())


@datasets
def test_lines_of_a_text_file(tmp_path):
    (tmp_path / "x.txt").write_text("one\ntwo\n\nthree\n")
    assert texts(DocumentStream(f"hf:text?data_files={tmp_path}/x.txt", "text", 9, 0.0, 0).take(99)) == [
        b"one",
        b"two",
        b"three",
    ]


def test_entries():
    assert parse_entry("hf:HuggingFaceFW/fineweb-edu?name=sample-10BT&split=train&text=text") == (
        "HuggingFaceFW/fineweb-edu",
        {"name": "sample-10BT", "split": "train", "text": "text"},
    )
    assert parse_entry("hf:json?data_files=a&data_files=b") == ("json", {"data_files": ["a", "b"]})
    with pytest.raises(ValueError, match="unknown key 'nam'; known are name, split, text"):
        parse_entry("hf:x?nam=1")
    with pytest.raises(ValueError, match="must be hf:<repository or builder>"):
        parse_entry("hf:?split=train")
    with pytest.raises(ValueError, match=r"split must have one value, got \['a', 'b'\]"):
        parse_entry("hf:x?split=a&split=b")
    with pytest.raises(ValueError, match="shuffle_bytes must be at least 1"):
        DocumentStream("hf:x", "text", 0, 0.0, 0)


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data entry hf:x needs datasets: pip install 'hnet-kernels\[hf\]'"):
        DocumentStream("hf:x", "text", 10, 0.0, 0).take(10)
