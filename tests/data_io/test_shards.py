"""Local files as a stream: cut into shards that nobody reads twice, in an order that no number of readers changes."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest

from hnet.data import units
from hnet.data.pack_stream import PackStream, merge
from hnet.data.sources import open_data
from hnet.data.streaming import DocumentStream, LocalStream
from hnet.data.units import Units
from hnet.data.workers import Workers
from tests.data_io.test_files import compress, jsonl, optional, parquet
from tests.data_io.test_splits import Config
from tests.data_io.test_streaming import DOCUMENTS, datasets, offline, texts  # noqa: F401
from tests.test_data import key, take

KINDS = [
    "jsonl", "jsonl.gz", "txt", pytest.param("jsonl.zst", marks=optional("zstandard")),
    pytest.param("parquet", marks=optional("pyarrow")),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(units, "LEAST_SHARD", 400)


def write(folder, kind, parts=5, documents=DOCUMENTS):
    for p in range(parts):
        mine = documents[p * len(documents) // parts : (p + 1) * len(documents) // parts]
        rows = [{"id": i, "text": t} for i, t in enumerate(mine)]
        if kind == "parquet":
            content = parquet(rows, row_group_size=3)
        elif kind == "txt":
            content = "".join(t + "\n" for t in mine).encode()
        else:
            content = compress(jsonl(rows), kind.removeprefix("jsonl"))
        (folder / f"{p}.{kind}").write_bytes(content)
    return sorted(folder.iterdir())


@pytest.fixture(params=KINDS)
def files(request, tmp_path):
    return write(tmp_path, request.param)


def stream(files, window=3000, held=0.0, shards=6):
    return LocalStream(files, "line", "text", window, held, 3, shards)


def packs(files, rank=0, world_size=1, batch=150, shards=6, **options):
    return PackStream(stream(files, shards=shards, **options), 64, batch, 5, rank, world_size, shards)


def epoch(source, shard, shards):
    found = []
    for cursor, corpus in source.windows(None, 1, shard, shards):
        if cursor["epoch"]:
            return found
        found += [t.removesuffix(b"\n") for t in texts(corpus)]


@pytest.mark.parametrize("shards", [1, 2, 3, 6, 11])
def test_shards_are_all_documents_once_in_about_equal_parts(files, shards):
    source = stream(files)
    found = [epoch(source, s, shards) for s in range(shards)]
    assert sorted(d for part in found for d in part) == sorted(t.encode() for t in DOCUMENTS)
    sizes = np.array([sum(map(len, part)) for part in found]) / sum(len(t.encode()) for t in DOCUMENTS) * shards
    assert sizes.min() > 0.5
    assert sizes.max() < 1.6  # documents of very unequal size, few of them in a shard


def test_shards_of_many_units_are_equal_to_four_percent_and_share_none():
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 150, 3000)
    u = Units([], "file", "text", *(np.zeros(3000, np.int64) for _ in range(3)), sizes)
    parts = [u.shard(s, 48) for s in range(48)]
    assert [p.unit for shard in parts for p in shard] == list(range(3000))
    assert {(p.low, p.high) for shard in parts for p in shard} == {(0.0, 1.0)}
    shares = np.array([sum(sizes[p.unit] for p in shard) for shard in parts]) / sizes.sum() * 48
    assert np.abs(shares - 1).max() < 0.04


def test_few_units_are_shared_by_rows_so_that_shards_are_equal():
    u = Units([], "file", "text", *(np.zeros(3, np.int64) for _ in range(3)), np.array([100, 300, 200]))
    parts = [u.shard(s, 4) for s in range(4)]
    for row in range(2000):  # every row of every unit is of exactly one shard
        for unit in range(3):
            assert sum(p.has(row) for shard in parts for p in shard if p.unit == unit) == 1
    shares = [sum(u.size[p.unit] * np.mean([p.has(r) for r in range(2000)]) for p in shard) for shard in parts]
    assert np.allclose(shares, 150, rtol=0.01)


@pytest.mark.parametrize("readers", [2, 3, 6])
def test_no_reader_decodes_what_another_does(tmp_path, monkeypatch, readers):
    files = write(tmp_path, "jsonl", parts=1)
    decoded = []
    parse = units.json_document
    monkeypatch.setattr(units, "json_document", lambda line, *a: decoded.append(line) or parse(line, *a))
    for rank in range(readers):
        decoded.append(None)
        reader = packs(files, rank, readers)
        assert reader.shards == 6
        while reader.epochs < 0.9:
            next(reader)
    seen = [set(part.split(b"\0")) for part in b"\0".join(d or b"\1" for d in decoded).split(b"\1")[1:]]
    seen = [s - {b""} for s in seen]
    assert len(seen) == readers
    assert sum(map(len, seen)) == len(set().union(*seen))  # disjoint
    assert len(set().union(*seen)) > 0.8 * len(DOCUMENTS)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_and_workers_share_the_packs_of_one(files, world_size):
    one = packs(files)
    assert one.shards in (3, 6)
    want = take(one, 36)
    ranks = [packs(files, r, world_size) for r in range(world_size)]
    got = [take(r, 36 // world_size) for r in ranks]
    assert [got[p % world_size][p // world_size] for p in range(36)] == want
    merged = merge([r.state_dict() for r in ranks])
    assert merged["rows"] == one.state_dict()["rows"]
    ahead = Workers(packs(files), world_size)
    try:
        assert take(ahead, 17) == want[:17]
        later = packs(files)
        later.load_state_dict(json.loads(json.dumps(ahead.state_dict())))
        assert take(later, 19) == want[17:]
    finally:
        ahead.close()


def test_resume_at_every_batch_with_another_world_size(files):
    straight, states, batches = packs(files), [], []
    while straight.epochs < 2:
        states.append(json.loads(json.dumps(straight.state_dict())))
        batches.append(key(next(straight)))
    batches += take(straight, 6)
    assert len(batches) > 100
    for i in range(0, len(states), 9):
        for world_size in (1, 2, 3):
            ranks = [packs(files, r, world_size) for r in range(world_size)]
            for r in ranks:
                r.load_state_dict(states[i])
            got = [take(r, 6 // world_size) for r in ranks]
            assert [got[p % world_size][p // world_size] for p in range(6)] == batches[i : i + 6]


def test_the_state_of_one_rank_alone_resumes_right_too(files):
    want = take(packs(files), 60)
    pair = [packs(files, r, 2) for r in range(2)]
    for r in pair:
        take(r, 20)
    later = packs(files)
    later.load_state_dict(pair[0].state_dict())
    assert take(later, 20) == want[40:]


def flat(batches):
    return [t for b in batches for t in b[1]]


@pytest.mark.parametrize("batch", [50, 75, 300, 1000])
def test_resume_with_another_batch_size_goes_on_with_the_next_position(files, batch):
    one = packs(files)
    take(one, 20)
    later = packs(files, batch=batch)
    later.load_state_dict(one.state_dict())
    want = flat(take(one, 20))
    assert flat(take(later, 3000 // batch)) == want


def test_an_epoch_is_every_document_once_of_every_shard(files):
    source = packs(files)
    seen = {s: bytearray() for s in range(source.shards)}
    for pack in range(60 * source.shards):
        seen[pack % source.shards] += bytes(next(source).targets.tolist())
    for shard, out in seen.items():
        documents = epoch(source.source, shard, source.shards)
        newline = b"\n" if files[0].suffix == ".txt" else b""
        want = b"".join(d + newline + b"\xff" for d in documents)
        assert len(out) > len(want)
        # A window is shuffled in pieces: whatever the order, an epoch has these symbols, and then those of the next.
        assert sorted(out[: len(want)]) == sorted(want)


def test_units_come_in_another_order_every_epoch(tmp_path):
    source = stream(write(tmp_path, "jsonl", parts=9))
    windows = source.windows(None, 1)
    epochs = {0: [], 1: []}
    for cursor, corpus in windows:
        if cursor["epoch"] > 1:
            break
        epochs[cursor["epoch"]] += texts(corpus)
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_held_out_documents_come_from_all_over_and_are_never_trained_on(files):
    source = stream(files, held=0.2)
    held = [t.removesuffix(b"\n") for t in texts(source.take(10**9, held_out=True))]
    assert 8 <= len(held) <= 30
    for shards in (1, 3):
        kept = [d for s in range(shards) for d in epoch(source, s, shards)]
        assert sorted(held + kept) == sorted(t.encode() for t in DOCUMENTS)
    numbers = [int(t.split(b">")[0][1:]) for t in held[:6]]
    assert max(numbers) - min(numbers) > 30


def test_open_data_streams_what_is_too_large(tmp_path, monkeypatch):
    write(tmp_path, "jsonl")
    said = []
    train, val = open_data(Config([tmp_path], stream="on", eval_bytes=500), said.append)
    assert isinstance(train, LocalStream)
    assert 500 <= val.num_bytes < 2500
    assert said == [
        f"{train.units.num_bytes:,} bytes on disk in 5 files, streamed, shuffled within 0.000954 MiB",
        f"held out of {tmp_path}/0.jsonl and 4 more: every document at random with probability 0.2",
    ]
    assert not isinstance(open_data(Config([tmp_path]), said.append)[0], LocalStream)
    monkeypatch.setattr("hnet.data.sources.STREAM_FROM", 1000)
    assert isinstance(open_data(Config([tmp_path]), said.append)[0], LocalStream)
    assert not isinstance(open_data(Config([tmp_path], stream="off"), said.append)[0], LocalStream)
    (tmp_path / "one.txt").write_bytes(b"a line\n" * 1000)
    one = Config([tmp_path / "one.txt"])
    assert not isinstance(open_data(one, said.append)[0], LocalStream)  # mapped


def test_files_named_for_it_are_held_out_of_a_stream(tmp_path):
    write(tmp_path, "jsonl", parts=3)
    for old, new in (("0", "train-0"), ("1", "valid"), ("2", "test")):
        (tmp_path / f"{old}.jsonl").rename(tmp_path / f"{new}.jsonl")
    train, val = open_data(Config([tmp_path], stream="on"), lambda _: None)
    assert sorted(texts(val)) == sorted(t.encode() for t in DOCUMENTS[30:60])
    assert sorted(epoch(train, 0, 1)) == sorted(t.encode() for t in DOCUMENTS[:30])
    train, val = open_data(Config([tmp_path], stream="on", val_data=[tmp_path / "test.jsonl"]), lambda _: None)
    assert sorted(texts(val)) == sorted(t.encode() for t in DOCUMENTS[60:])
    assert sorted(epoch(train, 0, 1)) == sorted(t.encode() for t in DOCUMENTS[:30])


def test_a_checkpoint_of_other_files_or_shards_is_refused(tmp_path):
    files = write(tmp_path, "jsonl")
    state = packs(files).state_dict()
    with pytest.raises(ValueError, match="shards was 6 and is 3"):
        packs(files, shards=3).load_state_dict(state)
    with pytest.raises(ValueError, match="shards was 6 and is 1"):
        packs(files, shards=1).load_state_dict(state)
    files[2].write_bytes(files[2].read_bytes()[1:])
    with pytest.raises(ValueError, match="bytes was"):
        packs(files).load_state_dict(state)


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    files = write(tmp_path, "jsonl", parts=1)
    source = stream(files)
    files[0].write_bytes(files[0].read_bytes()[:5000].rpartition(b"\n")[0] + b"\n")
    with pytest.raises(ValueError, match=r"0\.jsonl ends at byte \d+, but had \d+ or more when the run began"):
        epoch(source, 0, 1)


def test_the_line_of_an_error_is_counted_from_the_top_of_the_file(tmp_path):
    lines = [json.dumps({"text": "x" * (i % 50)}) for i in range(400)]
    lines[333] = '{"text": '
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name in ("x.jsonl", "y.jsonl.gz"):
        with pytest.raises(ValueError, match=rf"{name} line 334 is not JSON"):
            epoch(stream([tmp_path / name]), 0, 1)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_memory_does_not_grow_with_the_files(tmp_path, kind):
    peaks = []
    for name, count in (("small", 2000), ("large", 20_000)):
        (tmp_path / name).mkdir()
        files = write(tmp_path / name, kind, parts=1, documents=[f"{i} " + "text " * 60 for i in range(count)])
        tracemalloc.start()
        source = packs(files, window=200_000, batch=1000)
        while source.epochs < 0.5 * 2000 / count or source.state_dict()["position"] < 500_000:
            next(source)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 3_000_000  # of 6 MB, several times that in Python objects
    assert peaks[1] < 1.5 * peaks[0]


@datasets
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_hugging_face_dataset_is_read_by_files(tmp_path, world_size):
    write(tmp_path, "jsonl", parts=3)
    entry = f"hf:json?data_files={tmp_path}/*.jsonl"

    def make(rank=0, size=1):
        return PackStream(DocumentStream(entry, "text", 2000, 0.0, 3), 64, 150, 5, rank, size, 48)

    one = make()
    assert one.shards == 3
    want = take(one, 30)
    ranks = [make(r, 3) for r in range(3)]
    for r in ranks:
        take(r, 5)
    state = json.loads(json.dumps(merge([r.state_dict() for r in ranks])))
    later = [make(r, world_size) for r in range(world_size)]
    for r in later:
        r.load_state_dict(state)
    got = [take(r, 15 // world_size) for r in later]
    assert [got[p % world_size][p // world_size] for p in range(15)] == want[15:]


def test_a_state_of_the_version_before_shards_is_understood():
    from tests.test_data import random_corpus

    stream = PackStream(random_corpus(), 50, 37, 5)
    want = take(stream, 40)
    stream = PackStream(random_corpus(), 50, 37, 5)
    old = {"window": 0, "position": 25 * 37, "cursor": {"epoch": 0}, "epochs": 0.3, "made_with": stream._made_with()}
    stream.load_state_dict(old)
    assert take(stream, 15) == want[25:]


def test_advice_on_readers_that_do_not_divide_the_shards(tmp_path):
    source = packs(write(tmp_path, "jsonl"))
    assert source.advice(3) == ""
    assert source.advice(4).startswith("the data are in 6 shards, and 4 readers (processes x workers) do not")
    assert "2 readers decode each" in source.advice(4)
    assert packs(source.source.units.files, shards=1).advice(2).endswith("each of 2 processes x workers decodes all")
