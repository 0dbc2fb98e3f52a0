import random
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest

from hnet.data.corpus import Corpus, hold_out
from hnet.data.sources import open_data
from hnet.data.splits import by_role, role
from hnet.train.config import TrainConfig


@dataclass
class Config:
    data: list
    pattern: str = "*"
    exclude: list = field(default_factory=list)
    val_data: list = field(default_factory=list)
    val_fraction: float = 0.2
    documents: str = "file"
    text_key: str = "text"
    stream: str = "auto"
    shards: int = 4
    shuffle_bytes: int = 1000
    eval_bytes: int = 1000
    seed: int = 3

    def __post_init__(self):
        self.data, self.val_data = [*map(str, self.data)], [*map(str, self.val_data)]


def texts(corpus):
    return [corpus.document(i).tobytes() for i in range(len(corpus))]


def write(folder, names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(name.encode())


def opened(config):
    said = []
    train, val = open_data(config, said.append)
    return texts(train), texts(val), said


def test_the_trainer_has_these_keys():
    assert set(Config.__annotations__) <= {f.name for f in fields(TrainConfig)}


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("train.txt", "train"), ("train-00000-of-00008.parquet", "train"), ("training.jsonl.gz", "train"),
        ("telugu_mtg_train.te", "train"), ("wiki.train.tokens", "train"), ("Train_1.txt", "train"),
        ("valid.txt", "val"), ("validation-1.jsonl", "val"), ("val.txt", "val"), ("val2.bin", "val"),
        ("dev.te", "val"), ("telugu_mtg_dev.te", "val"), ("corpus.valid", "val"), ("dev", "val"),
        ("test.txt", "test"), ("test_1.jsonl.zst", "test"), ("a-test.txt", "test"), ("testing.txt", "test"),
        ("value.txt", None), ("device.py", None), ("constrain.txt", None), ("latest.txt", None),
        ("untrained.txt", None), ("README.md", None), ("x_developer.txt", None), ("my_tests.txt", None),
    ],
)  # fmt: skip
def test_role_of_a_name(name, want):
    assert (role(name) or (None,))[0] == want


def roles(folder, names, named=()):
    parts = by_role([folder / n for n in names], [folder / n for n in named])
    return [[p.name for p in parts[r]] for r in ("train", "val", "test")]


def test_names_count_where_they_are_of_a_kind():
    f = Path("x")
    assert roles(f, ["train.txt", "valid.txt", "test.txt"]) == [["train.txt"], ["valid.txt"], ["test.txt"]]
    assert roles(f, ["a_train.te", "README.md", "a_dev.te"]) == [["a_train.te", "README.md"], ["a_dev.te"], []]
    assert roles(f, ["a_train.te", "b_test.te"]) == [["a_train.te"], [], ["b_test.te"]]  # all have a role
    source = ["loop.py", "test_loop.py", "dev.py", "validate.py"]  # no train*: names of a source tree
    assert roles(f, source) == [source, [], []]
    assert roles(f, ["test_a.py", "test_b.py"]) == [["test_a.py", "test_b.py"], [], []]
    assert roles(f, ["a/train.txt", "b/test.txt", "c.txt"]) == [["train.txt", "test.txt", "c.txt"], [], []]
    assert roles(f, ["a/train.txt", "b/dev_x.txt", "c.txt"], ["a/train.txt", "b/dev_x.txt"])[1] == ["dev_x.txt"]
    with pytest.raises(ValueError, match="no training file: valid.txt, test.txt are named as held-out or test files"):
        roles(f, ["valid.txt", "test.txt"])


def test_named_splits_of_a_folder(tmp_path):
    write(tmp_path, ["train-1.txt", "train-2.txt", "valid.txt", "test.txt", "README"])
    train, val, said = opened(Config([tmp_path]))
    assert (train, val) == ([b"README", b"train-1.txt", b"train-2.txt"], [b"valid.txt"])
    assert said == ["by their names, 3 files are trained on, valid.txt is held out, test.txt is left alone"]


def test_named_splits_without_a_held_out_file_still_leave_the_test_set_alone(tmp_path):
    write(tmp_path, [*(f"train-{i}.txt" for i in range(20)), "test.txt"])
    train, val, said = opened(Config([tmp_path]))
    assert sorted(train + val) == sorted(f"train-{i}.txt".encode() for i in range(20))
    assert 3 <= len(val) <= 6
    assert len(said) == 2


def test_val_data_wins_and_is_never_trained_on(tmp_path):
    write(tmp_path, ["a.txt", "b.txt", "c.txt"])
    assert opened(Config([tmp_path], val_data=[tmp_path / "b.txt"]))[:2] == ([b"a.txt", b"c.txt"], [b"b.txt"])
    write(tmp_path, ["train.txt", "test.txt", "dev.txt"])
    train, val, _ = opened(Config([tmp_path], val_data=[tmp_path / "b.txt"]))
    assert (train, val) == ([b"a.txt", b"c.txt", b"train.txt"], [b"b.txt"])
    train, val, said = opened(Config([tmp_path / "a.txt"], val_data=[tmp_path / "a.txt"]))
    assert train == val == [b"a.txt"]
    assert said == ["val_data names all training files: the evaluation is on training data"]


def test_errors_of_a_configuration(tmp_path):
    with pytest.raises(ValueError, match="data must name at least one file or folder"):
        open_data(Config([]))
    with pytest.raises(ValueError, match="one hf: stream alone, got hf:json, x"):
        open_data(Config(["hf:json", "x"]))
    write(tmp_path, ["a.txt"])
    with pytest.raises(ValueError, match="documents must be one of"):
        open_data(Config([tmp_path], documents="word"))


def test_a_split_does_not_depend_on_the_order_of_the_file_system(tmp_path, monkeypatch):
    write(tmp_path, [f"{a}/{i}.txt" for a in "ab" for i in range(20)])
    first = opened(Config([tmp_path]))
    listing = Path.rglob
    for seed in range(3):

        def shuffled(self, pattern, seed=seed):
            found = list(listing(self, pattern))
            random.Random(seed).shuffle(found)
            return iter(found)

        monkeypatch.setattr(Path, "rglob", shuffled)
        assert opened(Config([tmp_path])) == first
    assert opened(Config([tmp_path], seed=4)) != first


def test_split_is_by_document_at_random_and_repeatable():
    documents = [bytes([65 + i]) * (10 + i) for i in range(40)]
    c = Corpus.of(documents)
    train, val, said = hold_out(c, 0.2, seed=3)
    assert sorted(texts(train) + texts(val)) == sorted(documents)
    assert 0.15 < val.num_bytes / c.num_bytes < 0.3
    assert set(texts(val)) != set(documents[-len(val) :])  # not the tail
    assert said == f"held out at random: {len(val)} of 40 documents ({val.num_bytes / c.num_bytes:.1%} of the bytes)"
    assert texts(val) == texts(hold_out(c, 0.2, seed=3)[1])
    assert texts(val) != texts(hold_out(c, 0.2, seed=4)[1])
    with pytest.raises(ValueError, match="cannot hold anything out of 1 document of 3 bytes"):
        hold_out(Corpus.of([b"abc"]), 0.5, 0)
    with pytest.raises(ValueError, match=r"val_fraction must be in \(0, 1\), got 1"):
        hold_out(c, 1, 0)


def test_few_documents_are_split_by_document_and_a_dominant_one_is_not_held_out():
    few = Corpus.of([b"a" * 1000, b"b" * 1000, b"c" * 1000])
    assert [len(p) for p in hold_out(few, 0.05, 0)[:2]] == [2, 1]
    for seed in range(20):
        mixed = Corpus.of([b"a" * 100_000, *(b"b" * 1000 for _ in range(50))])
        train, val, _ = hold_out(mixed, 0.05, seed)
        assert b"a" * 100_000 in texts(train)
        assert 0.04 < val.num_bytes / mixed.num_bytes < 0.1


@pytest.mark.parametrize("note", [[], [b"a short README"]])
def test_one_document_is_held_out_in_blocks_from_all_over(note):
    lines = [f"line {i} of a long text\n".encode() for i in range(4000)]
    document = b"".join(lines)
    c = Corpus.of([document, *note])
    train, val, said = hold_out(c, 0.1, seed=0)
    assert "blocks" in said
    assert 0.08 < val.num_bytes / c.num_bytes < 0.15
    kept = b"".join(texts(train)).splitlines()
    held = b"".join(texts(val)).splitlines()
    assert not set(kept) & set(held)
    assert sorted(kept + held) == sorted(x.rstrip(b"\n") for x in [*lines, *note])  # whole lines, none lost
    places = [int(x.split()[1]) for x in held if x.startswith(b"line")]
    thirds = np.histogram(places, 3, (0, 4000))[0]
    assert (thirds > 0).all()
    assert all(document.find(t) >= 0 or t in note for t in texts(train) + texts(val))
    assert len(train) <= len(val) + 1 + len(note)  # neighbours stay together
    assert texts(hold_out(c, 0.1, seed=0)[1]) == texts(val)


def test_blocks_of_text_without_line_ends_fall_between_characters():
    text = "తెలుగు" * 3000
    train, val, _ = hold_out(Corpus.of([text.encode()]), 0.1, seed=0)
    parts = [t.decode() for t in texts(train) + texts(val)]  # raises inside a character
    assert sum(map(len, parts)) == len(text)
    binary = np.random.default_rng(0).integers(0x80, 0xC0, 20_000).astype(np.uint8).tobytes()
    train, val, _ = hold_out(Corpus.of([binary]), 0.1, seed=0)
    assert train.num_bytes + val.num_bytes == 20_000
