"""Damaged data files, both read into memory and streamed: an error that names the file, and never anything else.

Some 300 inputs, each read both ways."""

import gzip
import io
import json
import random

import pytest

from hnet.data.files import read_files
from hnet.data.streaming import LocalStream
from hnet.errors import UserError
from tests.data_io.test_files import jsonl, optional, parquet

ROWS = [{"id": i, "text": f"document {i}, తెలుగు " * (1 + i % 5)} for i in range(40)]
TEXT = "".join(r["text"] + "\n" for r in ROWS).encode() * 20


def zstd(data):
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def truncations(name, whole, count=10):
    """All lengths are equally likely, with the extremes."""
    rng = random.Random(name)
    lengths = {0, 1, len(whole) - 1, *(rng.randrange(2, len(whole) - 1) for _ in range(count - 3))}
    return [(f"{name} cut to {n}", name, whole[:n]) for n in sorted(lengths)]


def flips(name, whole, count=10):
    rng = random.Random(name)
    found = []
    for i in range(count):
        data = bytearray(whole)
        at = rng.randrange(len(data))
        data[at] ^= rng.randrange(1, 256)
        found.append((f"{name} byte {at} flipped ({i})", name, bytes(data)))
    return found


def line(text):
    good = jsonl(ROWS[:3])
    return good + text + b"\n" + good


BAD_LINES = [
    b"{", b"}", b'{"text": ', b'{"text": "a"', b'{"text": "a}', b'{"text": "a"},', b"{'text': 'a'}",
    b'{"text": "\x01"}',
    b'{"text": "\\x41"}', b'{"text": "\xff\xfe"}', b'{"text": "a"} {"text": "b"}', b'{text: "a"}', b"<html>", b"text",
    b"null", b"7", b'"text"', b"[]", b'["text"]', b"true", b"[" * 100_000, b'{"text": ' * 20_000, b"\x00", b"\xff\xff",
    '{"text": "a"}'.encode("utf-16"), b'{"Text": "a"}', b'{"body": "a"}', b"{}", b'{"text": 1}', b'{"text": 1.5}',
    b'{"text": true}', b'{"text": ["a"]}', b'{"text": {"text": "a"}}', b'{"text": ' + b"9" * 5000 + b"}",
    b"\xef\xbb\xbf",
    b'{"text": NaN}', b"--- a: b",
]  # fmt: skip
CASES = [(f"line {i}: {bad[:24]!r}", "x.jsonl", line(bad)) for i, bad in enumerate(BAD_LINES)]
CASES += [(f"gzip line {i}", "x.jsonl.gz", gzip.compress(line(bad))) for i, bad in enumerate(BAD_LINES[::6])]
CASES += truncations("x.txt.gz", gzip.compress(TEXT, mtime=0)) + truncations(
    "x.jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0)
)
CASES += [("gzip and more", "x.txt.gz", gzip.compress(TEXT) + b"garbage"), ("not gzip", "x.jsonl.gz", jsonl(ROWS))]
CASES += [("gzip checksum", "x.txt.gz", gzip.compress(TEXT)[:-8] + b"\0" * 8)]
CASES += [("only blank lines", "x.jsonl", b"\n\n  \n"), ("nothing", "x.jsonl", b""), ("nothing", "x.txt", b"")]
CASES += [("only nulls", "x.jsonl", b'{"text": null}\n' * 9), ("only empty texts", "x.jsonl", b'{"text": ""}\n')]


def read_all(path):
    """Every document, into memory and as a stream of one epoch: (documents or the error) of each."""
    results = []

    def in_memory():
        corpus = read_files([path], "line")
        return [corpus.document(i).tobytes() for i in range(len(corpus))]

    def streamed():
        corpus = LocalStream([path], "line", "text", 1000, 0.0, 0).take(10**9)
        return [corpus.document(i).tobytes() for i in range(len(corpus))]

    for read in (in_memory, streamed):
        try:
            results.append(read())
        except UserError as e:  # nothing else may come: it would be a traceback
            results.append(e)
    return results


def named(error, path):
    assert isinstance(error, UserError), f"read without complaint: {error!r:.80}"
    assert path.name in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 600


@pytest.mark.parametrize(("name", "content"), [pytest.param(n, c, id=i) for i, n, c in CASES])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for error in read_all(tmp_path / name):
        named(error, tmp_path / name)


@optional("zstandard")
def test_damaged_zstd(tmp_path):
    cases = truncations("x.txt.zst", zstd(TEXT)) + truncations("x.jsonl.zst", zstd(jsonl(ROWS)))
    cases += [*flips("x.txt.zst", zstd(TEXT), 12), ("", "x.txt.zst", zstd(TEXT) + b"garbage"), ("", "x.zst", TEXT)]
    for _, name, content in cases:
        (tmp_path / name).write_bytes(content)
        for error in read_all(tmp_path / name):
            named(error, tmp_path / name)


@optional("pyarrow")
def test_damaged_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    def table(**columns):
        out = io.BytesIO()
        pa.parquet.write_table(pa.table(columns), out)
        return out.getvalue()

    whole = parquet(ROWS, row_group_size=7)
    cases = [c[1:] for c in truncations("x.parquet", whole, 20)]
    cases += [
        ("x.parquet", content) for content in (b"PAR1" * 9, jsonl(ROWS), whole[4:], b"\0" * 4 + whole[4:-4] + b"\0" * 4)
    ]
    cases += [("x.parquet", table(body=["a"])), ("x.parquet", table(text=[1, 2])), ("x.parquet", table(text=[["a"]]))]
    cases += [("x.parquet", table(text=[{"a": "b"}])), ("x.parquet", table(text=pa.array([None, None])))]
    cases += [("x.parquet", table(text=pa.array([], pa.string()))), ("x.parquet", table(text=[1.5, None]))]
    for name, content in cases:
        (tmp_path / name).write_bytes(content)
        for error in read_all(tmp_path / name):
            named(error, tmp_path / name)


@optional("pyarrow")
def test_parquet_with_a_flipped_byte_is_read_or_named(tmp_path):
    # Parquet has no checksum by default, so a flipped byte may go unnoticed; it must not do anything else.
    whole, path = parquet(ROWS, row_group_size=7), tmp_path / "x.parquet"
    complained = 0
    for _, _, content in flips("x.parquet", whole, 150):
        path.write_bytes(content)
        for result in read_all(path):
            if isinstance(result, UserError):
                complained += 1
                named(result, path)
    assert complained > 50


@optional("pyarrow")
def test_what_is_unusual_but_whole_is_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    texts = ["one", None, "", "తెలుగు"]
    want = [b"one", "తెలుగు".encode()]
    for column in (
        pa.array(texts, pa.large_string()), pa.array(texts).dictionary_encode(), pa.array(texts, pa.string_view()),
        pa.array([None if t is None else t.encode() for t in texts], pa.large_binary()),
    ):  # fmt: skip
        out = io.BytesIO()
        pa.parquet.write_table(pa.table({"text": column}), out)
        (tmp_path / "x.parquet").write_bytes(out.getvalue())
        assert read_all(tmp_path / "x.parquet") == [want, want], column.type
    (tmp_path / "x.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": null, "text": "\\ud800"}\n{"n": 1e999, "text": "last"}'
    )
    assert read_all(tmp_path / "x.jsonl") == [[b"one", b"\xed\xa0\x80", b"last"]] * 2
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 3_000_000}) + "\n" + json.dumps({"text": "y"}))
    assert [len(d) for d in read_all(tmp_path / "long.jsonl")[0]] == [3_000_000, 1]
