"""Weighted mixtures of sources: shares, order, resuming, and mistakes in a configuration."""

import json
from collections import Counter

import numpy as np
import pytest

from hnet.cli.options import path_or_weighted
from hnet.config.entries import Entry, parse_data
from hnet.config.keys import read_toml
from hnet.data import units
from hnet.data.corpus import Corpus
from hnet.data.mixture import Mixture, Turns
from hnet.data.pack_stream import PackStream, merge
from hnet.data.sources import open_corpus, open_data
from hnet.data.streaming import LocalStream
from hnet.data.workers import Workers
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer
from tests.data_io.test_files import jsonl
from tests.data_io.test_splits import Config
from tests.test_data import take


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Three folders whose documents are of one letter each."""
    monkeypatch.setattr(units, "LEAST_SHARD", 1000)
    for letter, count in (("a", 60), ("b", 200), ("c", 90)):
        (tmp_path / letter).mkdir()
        for part in range(4):
            rows = [{"text" if letter != "b" else "body": letter * (20 + (7 * i) % 90)} for i in range(count)]
            (tmp_path / letter / f"{part}.jsonl").write_bytes(jsonl(rows))
    return tmp_path


WEIGHTS = {"a": 3.0, "b": 1.5, "c": 0.5}


def config(folders, **options):
    data = [{"path": str(folders / p), "weight": w} for p, w in WEIGHTS.items()]
    data[1]["text_key"] = "body"
    c = Config([], stream="on", **options)
    c.data = data
    return c


def mixed(folders, rank=0, world_size=1, in_memory=(), **options):
    sources = []
    for letter in WEIGHTS:
        c = Config([folders / letter], text_key="body" if letter == "b" else "text", **options)
        c.stream = "off" if letter in in_memory else "on"
        sources.append(open_data(c, lambda _: None)[0])
    weights = [w / 5 for w in WEIGHTS.values()]
    return PackStream(Mixture(sources, weights), 64, 150, 5, rank, world_size, 12)


def shares(batches):
    count = Counter(chr(s) for b in batches for s in b[1] if s < 254)
    return [count[c] / sum(count.values()) for c in "abc"]


@pytest.mark.parametrize("in_memory", ["", "b", "abc"])
def test_shares_of_the_bytes_are_the_weights_at_any_time(folders, in_memory):
    stream = mixed(folders, in_memory=in_memory)
    assert stream.shards == (1 if in_memory == "abc" else 12)
    for _ in range(3):
        assert np.allclose(shares(take(stream, 600)), [0.6, 0.3, 0.1], atol=0.012)


@pytest.mark.parametrize("in_memory", ["", "ac", "abc"])
def test_ranks_workers_and_a_resume_read_what_one_does(folders, in_memory):
    want = take(mixed(folders, in_memory=in_memory), 96)
    ranks = [mixed(folders, r, 3, in_memory) for r in range(3)]
    got = [take(r, 16) for r in ranks]
    assert [got[p % 3][p // 3] for p in range(48)] == want[:48]
    state = json.loads(json.dumps(merge([r.state_dict() for r in ranks])))
    pair = [mixed(folders, r, 2, in_memory) for r in range(2)]
    for r in pair:
        r.load_state_dict(state)
    got = [take(r, 12) for r in pair]
    assert [got[p % 2][p // 2] for p in range(24)] == want[48:72]
    ahead = Workers(mixed(folders, in_memory=in_memory), 2)
    try:
        ahead.load_state_dict(merge([r.state_dict() for r in pair]))
        assert take(ahead, 24) == want[72:]
    finally:
        ahead.close()


def test_every_source_is_read_whole_before_any_of_it_again(folders):
    stream = mixed(folders, in_memory="b")
    corpus = stream.sources[1]
    symbols = corpus.num_bytes + len(corpus)
    seen = 0
    for _ in range(12 * 50 * 40):
        seen += sum(s == ord("b") for s in next(stream).targets.tolist())
        if seen > 0.97 * symbols:
            break
    # A corpus in memory is shared out to 12 rows in pieces; each row is about through its part.
    passes = [r.passes(at) for i, r, at in stream._opened() if i == 1]
    assert len(passes) == 12
    assert min(passes) > 0.8
    assert max(passes) < 1.2


def test_order_depends_on_the_seed_and_a_changed_mixture_is_refused(folders):
    a = mixed(folders)
    b = PackStream(a.source, 64, 150, 6, shards=12)
    assert take(a, 12) != take(b, 12)
    other = PackStream(Mixture(a.sources, [0.5, 0.4, 0.1]), 64, 150, 5, shards=12)
    with pytest.raises(ValueError, match="does not fit: sources was"):
        other.load_state_dict(a.state_dict())


@pytest.mark.parametrize("weights", [[0.6, 0.3, 0.1], [0.999, 0.001], [1 / 7] * 7])
def test_turns_keep_the_weights_at_every_length_and_may_be_asked_anywhere(weights):
    turns = Turns(weights, (3, 1))
    drawn = turns.sources(0, 5000)
    counts = np.stack([(drawn == i).cumsum() for i in range(len(weights))], 1)
    assert np.abs(counts - np.arange(1, 5001)[:, None] * weights).max() < 5
    for t in (0, 1, 17, 4999, 300):  # also backwards
        assert turns.before(t).tolist() == (counts[t - 1].tolist() if t else [0] * len(weights))
        assert Turns(weights, (3, 1)).sources(t, t + 1)[0] == drawn[t]
    assert (Turns(weights, (3, 2)).sources(0, 5000) != drawn).any()


def test_open_data_with_a_mixture(folders):
    said = []
    train, val = open_data(config(folders, eval_bytes=1500), said.append)
    assert isinstance(train, Mixture)
    assert all(isinstance(s, LocalStream) for s in train.sources)
    assert train.weights == [0.6, 0.3, 0.1]
    assert any(line.startswith(f"{folders}/b (30.0%): held out of {folders}/b/0.jsonl and 3 more") for line in said)
    text = b"".join(val.document(i).tobytes() for i in range(len(val)))
    count = Counter(text.decode())
    for letter, weight in (("a", 0.6), ("b", 0.3), ("c", 0.1)):  # whole documents of at most 109 bytes
        assert 0 <= count[letter] - 1500 * weight < 110
    assert [s.window_bytes for s in train.sources] == [600, 300, 100]  # shuffle_bytes is for all
    assert train.amount.startswith("60.0% ")


def test_val_data_beside_a_mixture(folders):
    (folders / "dev.txt").write_text("held out")
    train, val = open_data(config(folders, val_data=[folders / "dev.txt"]), lambda _: None)
    assert val.document(0).tobytes() == b"held out"
    assert [s.split.fraction for s in train.sources] == [0, 0, 0]


def test_a_chunk_lm_reads_no_mixture(folders):
    with pytest.raises(ValueError, match="data must be files, not an hf: stream, and without weights"):
        open_corpus(config(folders))
    one = raw(config(folders).data[:1])
    assert isinstance(open_corpus(one, lambda _: None)[0], Corpus)


def raw(data):
    c = Config([])
    c.data = data
    return c


BAD = [
    ([{"path": "a", "weight": w}], rf"data\[0\]: weight of 'a' must be a positive number, got {got}")
    for w, got in (
        (0, "0"), (-1, "-1"), (float("nan"), "nan"), (float("inf"), "inf"), (True, "True"), ("2", "'2'"), (None, "None")
    )
] + [
    ([{"weight": 1}], r"data\[0\]: path must be a file, a folder or an hf: stream, got None"),
    ([{"path": "", "weight": 1}], r"data\[0\]: path must be .*, got ''"),
    ([{"path": ["a"], "weight": 1}], r"data\[0\]: path must be .*, got \['a'\]"),
    ([{"path": "a"}], r"data\[0\]: weight of 'a' must be a positive number, got None"),
    ([{"path": "a", "wieght": 1}], r"data\[0\]: unknown key 'wieght'; known are path, weight, text_key"),
    ([{"path": "a", "weight": 1, "text_key": 3}], r"data\[0\]: text_key of 'a' must be a name, got 3"),
    (["b", {"path": "a", "weight": 1}], "data: every entry must have a weight or none, got 'b' without one"),
    ([{"path": "a", "weight": 1}, {"path": "a", "weight": 2}], "data: 'a' is named twice: add up its weights"),
    ([{}], r"data\[0\]: path must be"),
    ([7], r"data\[0\] must be a path or a table \{path, weight\}, got 7"),
    ([""], r"data\[0\] must be a path or an hf: stream, got ''"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), BAD)
def test_bad_mixtures_are_named_before_anything_is_written(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(data=data, out=str(tmp_path / "run"), preset="tiny").validate()
    with pytest.raises(ValueError, match=message):
        open_data(raw(data))
    assert not (tmp_path / "run").exists()


def test_a_missing_path_is_named_before_anything_is_written(tmp_path, folders):
    data = [{"path": str(folders / "a"), "weight": 1}, {"path": str(folders / "nowhere"), "weight": 1}]
    with pytest.raises(FileNotFoundError, match="data path .*nowhere does not exist"):
        Trainer(TrainConfig(data=data, out=str(tmp_path / "run"), preset="tiny"))
    assert not (tmp_path / "run").exists()


def test_a_mixture_survives_toml_and_the_command_line(tmp_path):
    c = TrainConfig(data=[{"path": "a b", "weight": 0.7}, {"path": "hf:x?name=y", "weight": 3, "text_key": "t"}])
    (tmp_path / "c.toml").write_text(c.to_toml())
    again = TrainConfig(**read_toml(tmp_path / "c.toml", TrainConfig))
    assert again.data == c.data
    assert again == c
    (tmp_path / "d.toml").write_text('data = [{path = "a", weight = 1}, {path = "b", weight = 2.5}]\n')
    assert read_toml(tmp_path / "d.toml", TrainConfig)["data"] == [
        {"path": "a", "weight": 1}, {"path": "b", "weight": 2.5},
    ]  # fmt: skip
    (tmp_path / "d.toml").write_text("data = [3]\n")
    with pytest.raises(ValueError, match=r"d\.toml: data must be str \| dict, got 3"):
        read_toml(tmp_path / "d.toml", TrainConfig)


def test_weights_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert path_or_weighted("a/b") == "a/b"
    assert path_or_weighted("a/b:0.7") == {"path": "a/b", "weight": 0.7}
    assert path_or_weighted("hf:x/y?name=z:2") == {"path": "hf:x/y?name=z", "weight": 2.0}
    for plain in ("hf:x/y", "a:-1", "a:nan", "a:1e3", ":1", "a:b"):
        assert path_or_weighted(plain) == plain
    (tmp_path / "12:30").write_text("a file of that name")
    assert path_or_weighted("12:30") == "12:30"
    assert parse_data([path_or_weighted("a:2"), path_or_weighted("b:.5")]) == [Entry("a", 2.0), Entry("b", 0.5)]
