import gzip
import importlib.util
import io
import json
import sys
import tracemalloc

import pytest

from hnet.data import files
from hnet.data.files import find_files, read_corpus, read_files

TEXTS = ["first\ndocument\n", "second, ünïcödé తెలుగు", "", "third\n\n"]


def optional(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def texts(corpus):
    return [corpus.document(i).tobytes() for i in range(len(corpus))]


def jsonl(rows):
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in rows)


def parquet(rows, **options):
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, **options)
    return out.getvalue()


def compress(data, suffix):
    if suffix == ".gz":  # two members, as `cat a.gz b.gz` makes
        return gzip.compress(data[:7]) + gzip.compress(data[7:])
    if suffix == ".zst":
        import zstandard

        return zstandard.ZstdCompressor().compress(data[:7]) + zstandard.ZstdCompressor().compress(data[7:])
    return data


def test_read_files_and_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_bytes(b"xx")
    (tmp_path / "a" / "y.txt").write_bytes(b"\xff\x00\xfe")
    (tmp_path / "a" / ".hidden.py").write_bytes(b"no")
    (tmp_path / "a" / "skip").mkdir()
    (tmp_path / "a" / "skip" / "z.py").write_bytes(b"zz")
    (tmp_path / "empty.py").write_bytes(b"")
    assert [p.name for p in find_files([tmp_path / "a"], "*.py", ["skip"])] == ["x.py"]
    assert texts(read_corpus([tmp_path])) == [b"zz", b"xx", b"\xff\x00\xfe"]
    assert texts(read_corpus([tmp_path / "a" / "x.py", tmp_path])) == [b"xx", b"zz", b"\xff\x00\xfe"]  # none twice
    with pytest.raises(FileNotFoundError, match=r"data path .*nowhere does not exist"):
        read_corpus([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match=r"no file below .* matches '\*.rs'"):
        read_corpus([tmp_path], "*.rs")
    with pytest.raises(ValueError, match="the corpus is empty"):
        read_corpus([tmp_path / "empty.py"])
    with pytest.raises(ValueError, match="at least one file or folder"):
        read_corpus([])


@pytest.mark.parametrize("packed", ["", ".gz", pytest.param(".zst", marks=optional("zstandard"))])
@pytest.mark.parametrize("kind", [".txt", ".bin", ".jsonl", pytest.param(".parquet", marks=optional("pyarrow"))])
def test_every_format_gives_back_every_byte(tmp_path, kind, packed):
    rows = [{"id": i, "body": t} for i, t in enumerate(TEXTS)]
    content = {
        ".txt": lambda: TEXTS[1].encode(),
        ".bin": lambda: bytes(range(256)) * 20_000,  # several chunks
        ".jsonl": lambda: jsonl(rows),
        ".parquet": lambda: parquet(rows, row_group_size=2),
    }[kind]()
    path = tmp_path / f"file{kind}{packed}"
    path.write_bytes(compress(content, packed))
    want = [t.encode() for t in TEXTS if t] if kind in (".jsonl", ".parquet") else [content]
    assert texts(read_files([path], text_key="body")) == want


def test_a_folder_of_any_mix(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"A\n")
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "B1"}, {"text": "B2"}]))
    (tmp_path / "c").write_bytes(b"C")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"D\n\nd\n"))
    assert texts(read_corpus([tmp_path])) == [b"A\n", b"B1", b"B2", b"C", b"D\n\nd\n"]
    assert texts(read_corpus([tmp_path], documents="paragraph")) == [b"A\n", b"B1", b"B2", b"C", b"D\n\n", b"d\n"]


@pytest.mark.parametrize(
    ("documents", "content", "want"),
    [
        ("file", b"a\n\nb", [b"a\n\nb"]),
        ("line", b"a\n\nb\r\nc", [b"a\n", b"\n", b"b\r\n", b"c"]),
        ("line", b"a\n", [b"a\n"]),
        ("paragraph", b"a\nb\n\nc\n \t\r\n\n d\n", [b"a\nb\n\n", b"c\n \t\r\n\n", b" d\n"]),
        ("paragraph", b"\n\n a\n\n", [b"\n\n a\n\n"]),
        ("paragraph", b"\n\na\n\nb", [b"\n\na\n\n", b"b"]),
        ("paragraph", b"\n\n", [b"\n\n"]),
    ],
)
def test_documents_of_plain_text_keep_all_bytes(tmp_path, documents, content, want):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_bytes(content)
    two.write_bytes(content)
    assert texts(read_files([one], documents)) == want
    assert texts(read_files([one, two], documents)) == want * 2
    assert b"".join(want) == content


def test_lines_across_the_windows_they_are_searched_in(tmp_path):
    path = tmp_path / "big.txt"
    path.write_bytes(b"x" * (16 << 20) + b"\n" + b"y" * 10 + b"\nz")
    assert [len(t) for t in texts(read_files([path], "line"))] == [(16 << 20) + 1, 11, 1]


def test_a_large_file_is_mapped_not_copied(tmp_path, monkeypatch):
    path = tmp_path / "big.txt"
    path.write_bytes(b"some text\n" * 50_000)
    small = texts(read_files([path], "line"))
    monkeypatch.setattr(files, "_MAP_FROM", 1000)
    tracemalloc.start()
    corpus = read_files([path])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert corpus.document(0).tobytes() == path.read_bytes()
    assert texts(read_files([path], "line")) == small


def test_bytes_of_json_that_is_not_unicode_survive(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n{"text": "a\\ud800b"}\n\n{"text": null}\n{"text": "last line without newline"}')
    assert texts(read_files([path])) == [b"a\xed\xa0\x80b", b"last line without newline"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl line 2 is not JSON"),
        (
            "x.jsonl",
            b'{"text": "a"}\n\n"text"\n',
            r"x\.jsonl line 3 must be a JSON object with the key 'text', got str",
        ),
        ("x.jsonl", b'{"id": 1, "body": "a"}\n', r"x\.jsonl line 1 has no 'text', it has id, body: set text_key"),
        ("x.jsonl", b'{"text": ["a"]}\n', r"x\.jsonl line 1: 'text' must be text, got list"),
        ("x.jsonl", b'{"text": "\xff"}\n', r"x\.jsonl line 1 is not JSON"),
        ("x.txt.gz", b"not gzip", r"x\.txt\.gz is not a whole gzip file"),
        ("x.txt.gz", gzip.compress(b"some text" * 100, mtime=0)[:-12], r"x\.txt\.gz is not a whole gzip file"),
        pytest.param("x.txt.zst", b"not zstd", r"x\.txt\.zst is not a whole zstd file", marks=optional("zstandard")),
        pytest.param("x.parquet", b"not parquet", r"x\.parquet is not a Parquet file", marks=optional("pyarrow")),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        read_files([tmp_path / name])
    assert "\n" not in str(e.value)


@optional("zstandard")
def test_a_truncated_zstd_file_is_refused(tmp_path):
    whole = compress(bytes(range(256)) * 5000, ".zst")
    (tmp_path / "x.zst").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="not a whole zstd file"):
        read_files([tmp_path / "x.zst"])


@optional("pyarrow")
def test_a_parquet_file_without_the_column(tmp_path):
    (tmp_path / "x.parquet").write_bytes(parquet([{"id": 1, "body": "a"}]))
    with pytest.raises(ValueError, match=r"x\.parquet has no 'text', it has id, body: set text_key"):
        read_files([tmp_path / "x.parquet"])
    with pytest.raises(ValueError, match=r"x\.parquet: 'id' must be text, got int"):
        read_files([tmp_path / "x.parquet"], text_key="id")


@pytest.mark.parametrize(("name", "library"), [("x.parquet", "pyarrow"), ("x.txt.zst", "zstandard")])
def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)  # import fails
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"reading .*{name} needs {library}: pip install 'hnet-kernels\[data\]'"):
        read_files([tmp_path / name])


def test_unknown_kind_of_documents(tmp_path):
    with pytest.raises(ValueError, match="documents must be one of file, paragraph, line, got 'word'"):
        read_files([tmp_path / "x"], "word")
