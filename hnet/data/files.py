"""Documents from files: plain text, JSONL and Parquet, each also compressed with gzip or zstd; the suffix decides."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hnet.errors import MissingPath, UserError, user_path

from .corpus import Corpus

DOCUMENTS = ("file", "paragraph", "line")
_JSONL, _PARQUET, _COMPRESSED = {".jsonl", ".ndjson"}, {".parquet", ".pq"}, {".gz", ".zst"}
_CHUNK = 1 << 18
_MAP_FROM = 64 << 20
_TEXT = {kind + view for kind in ("string", "binary") for view in ("", "_view")} | {"large_string", "large_binary"}
_ROWS = 64  # of a Parquet file, decoded at once
_PAGES = 1 << 18  # bytes of a Parquet file read at once


def find_files(paths: Iterable[str | Path], pattern: str = "*", exclude: Iterable[str] = ()) -> Iterator[Path]:
    """Files named, and those below folders named that match `pattern`, sorted; none twice. Hidden files are left out,
    and so is everything below a folder (or any file) whose name matches one of `exclude`.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds nothing that matches.
        ValueError: no pattern, or one that begins at the root.
    """
    exclude, seen = list(exclude), set()
    if not pattern or Path(pattern).is_absolute():
        raise UserError(f"pattern must be a glob of names below the folders, like '*.py', got {pattern!r}")

    def wanted(below: Path) -> bool:
        return not below.name.startswith(".") and not any(fnmatch(part, e) for part in below.parts for e in exclude)

    for path in map(Path, paths):
        with user_path(path):
            if path.is_file():
                found = [path]
            elif path.is_dir():
                found = sorted(p for p in path.rglob(pattern) if p.is_file() and wanted(p.relative_to(path)))
                if not found:
                    raise MissingPath(f"no file below {path} matches {pattern!r}")
            else:
                raise MissingPath(f"data path {path} does not exist")
        for p in found:
            if p.resolve() not in seen:
                seen.add(p.resolve())
                yield p


def read_corpus(
    paths: Iterable[str | Path],
    pattern: str = "*",
    exclude: Iterable[str] = (),
    documents: str = "file",
    text_key: str = "text",
) -> Corpus:
    """All documents of files and folders.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds nothing that matches.
        ValueError: as `read_files`, or no path is named.
    """
    paths = list(paths)
    if not paths:
        raise UserError("data must name at least one file or folder")
    return read_files(list(find_files(paths, pattern, exclude)), documents, text_key)


def read_files(files: list[Path], documents: str = "file", text_key: str = "text") -> Corpus:
    """All documents of files, in order.

    `.jsonl`, `.ndjson`: one a line, under `text_key`. `.parquet`, `.pq`: one a row, in the column `text_key`. Anything
    else is bytes: one document a file, or a "paragraph" (up to and with the blank lines after it), or a "line" (with
    its newline); no byte is lost. `.gz` and `.zst` behind any of these.

    Raises:
        ValueError: `documents` is unknown, all files are empty, one is broken, a document has no `text_key`, or the
            library to read one is missing.
    """
    if documents not in DOCUMENTS:
        raise UserError(f"documents must be one of {', '.join(DOCUMENTS)}, got {documents!r}")
    if len(files) == 1 and kind_of(files[0]) == ("", "") and files[0].stat().st_size:
        data = _load(files[0])
        return Corpus.cut(data, _ends(data, documents))
    buffer, ends = bytearray(), array("q")
    for path in files:
        kind, _ = kind_of(path)
        if kind == "":
            begin = len(buffer)
            for chunk in chunks(path):
                buffer += chunk
            ends.frombytes((_ends(np.frombuffer(buffer, dtype=np.uint8)[begin:], documents) + begin).tobytes())
        else:
            for document in (_jsonl if kind == "jsonl" else _parquet)(path, text_key):
                buffer += document
                ends.append(len(buffer))
    corpus = Corpus.cut(np.frombuffer(buffer, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))
    if not len(corpus):
        raise UserError(f"the corpus is empty: no bytes in {', '.join(map(str, files))}")
    return corpus


def kind_of(path: Path) -> tuple[str, str]:
    """("jsonl", "parquet" or "", ".gz", ".zst" or "")"""
    suffixes = [s.lower() for s in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSED else ""
    last = suffixes[-1] if suffixes else ""
    return "jsonl" if last in _JSONL else "parquet" if last in _PARQUET else "", packed


def _load(path: Path) -> np.ndarray:
    # Mapping shares the pages between ranks and workers; but a mapped file that is cut short kills the process, so
    # what is small anyway is read.
    with user_path(path):
        if path.stat().st_size >= _MAP_FROM:
            return np.memmap(path, dtype=np.uint8, mode="r")
        return np.fromfile(path, dtype=np.uint8)


def _ends(data: np.ndarray, documents: str) -> np.ndarray:
    """(documents,) int64: where documents of plain bytes end."""
    if documents == "line":
        steps = range(0, len(data), 16 << 20)
        ends = [np.flatnonzero(data[a : a + (16 << 20)] == 10) + (a + 1) for a in steps]
    elif documents == "paragraph":
        found = (m.end() for m in re.finditer(rb"\n(?:[ \t\r]*\n)+", data.data))
        ends = [np.fromiter(found, dtype=np.int64)]
        if len(ends[0]) and not data[: ends[0][0]].tobytes().strip():  # blank lines at the top open the first paragraph
            ends = [ends[0][1:]]
    else:
        ends = []
    return np.concatenate([*ends, [len(data)]]).astype(np.int64)


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed."""
    _, packed = kind_of(path)
    if packed and not path.stat().st_size:
        raise UserError(f"{path} is not a whole {packed[1:]} file: it has no bytes")
    if packed == ".zst":
        yield from _zstd(path)
    elif packed == ".gz":
        with user_path(path):
            try:
                with gzip.open(path, "rb") as f:
                    yield from iter(lambda: f.read(_CHUNK), b"")
            except (gzip.BadGzipFile, EOFError, zlib.error) as e:
                raise UserError(f"{path} is not a whole gzip file: {e}") from None
    else:
        with user_path(path), path.open("rb") as f:
            yield from iter(lambda: f.read(_CHUNK), b"")


def _zstd(path: Path) -> Iterator[bytes]:
    zstandard = need("zstandard", f"reading {path}", "data")
    frame, rest = None, b""
    # Frame by frame: the library's own reader takes a truncated file for a whole one.
    with user_path(path), path.open("rb") as f:
        while chunk := rest or f.read(_CHUNK >> 2):  # may become thousands of times as much
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(chunk)
            except zstandard.ZstdError as e:
                raise UserError(f"{path} is not a whole zstd file: {e}") from None
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise UserError(f"{path} is not a whole zstd file: it ends inside a frame")


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed, each with its newline."""
    begun: list[bytes] = []  # of a line that is longer than a chunk; joined once
    for chunk in chunks(path):
        for line in io.BytesIO(chunk):
            begun.append(line)
            if line.endswith(b"\n"):
                yield b"".join(begun) if len(begun) > 1 else line
                begun = []
    if begun:
        yield b"".join(begun)


def _jsonl(path: Path, text_key: str) -> Iterator[bytes]:
    for number, line in enumerate(lines(path), 1):
        yield json_document(line, text_key, partial("{} line {}".format, path, number))


def json_document(line: bytes, text_key: str, where: Callable[[], str]) -> bytes:
    """The text of one line of JSONL, b"" for a blank one. `where` names the line if it is broken.

    Raises:
        ValueError: it is not a JSON object with text under `text_key`.
    """
    if not line.strip():
        return b""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where()} is not JSON: {e}") from None
    if isinstance(row, dict) and isinstance(text := row.get(text_key), str):
        return text.encode("utf-8", "surrogatepass")
    if not isinstance(row, dict):
        raise UserError(f"{where()} must be a JSON object with the key {text_key!r}, got {type(row).__name__}")
    return document_of(row, text_key, where())


def _parquet(path: Path, text_key: str) -> Iterator[bytes]:
    with open_parquet(path, text_key) as file:
        for group in range(file.num_row_groups):
            for documents in row_group(file, group, path, text_key):
                yield from documents


@contextmanager
def open_parquet(path: Path, text_key: str) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile` that has the column `text_key`. Pages are read one after another, so that an open
    file costs a few MB however large its row groups are.

    Raises:
        ValueError: it is broken (also raised inside the `with`), or has no such column.
    """
    need("pyarrow", f"reading {path}", "data")
    import pyarrow
    import pyarrow.parquet

    source = io.BytesIO(b"".join(chunks(path))) if kind_of(path)[1] else path
    try:
        with user_path(path):
            opened = pyarrow.OSFile(str(path)) if source is path else source
        with opened, pyarrow.parquet.ParquetFile(opened, buffer_size=_PAGES, pre_buffer=False) as file:
            if text_key not in file.schema_arrow.names:
                raise UserError(_no_key(str(path), text_key, file.schema_arrow.names))
            yield file
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError) as e:  # a damaged page is an OSError to Arrow
        what = " ".join(str(e).split())
        raise UserError(f"{path} is not a Parquet file that can be read: {what}") from None


def row_group(file: Any, group: int, path: Path, text_key: str) -> Iterator[list[bytes]]:
    """The documents of a row group, some rows at a time; null is empty.

    Raises:
        ValueError: the column is not text.
    """
    import pyarrow as pa

    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[text_key], use_threads=False):
        column = batch.column(0)
        if isinstance(column, pa.DictionaryArray):
            column = column.dictionary_decode()
        kind = str(column.type)
        if kind == "null":
            yield [b""] * len(column)
            continue
        if kind not in _TEXT:
            raise UserError(f"{path}: {text_key!r} must be text, got {kind}")
        if kind in ("string", "large_string"):
            column = column.cast(kind.replace("string", "binary"))  # the same bytes, not decoded
        yield [text.encode() if isinstance(text, str) else text or b"" for text in column.to_pylist()]


def document_of(row: dict[str, Any], text_key: str, where: str) -> bytes:
    """The text of one record, as bytes; null is empty.

    Raises:
        ValueError: it has no `text_key`, or something else than text under it.
    """
    if text_key not in row:
        raise UserError(_no_key(where, text_key, row))
    text = row[text_key]
    if text is None:
        return b""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise UserError(f"{where}: {text_key!r} must be text, got {type(text).__name__}")
    return text.encode("utf-8", "surrogatepass")


def _no_key(where: str, text_key: str, keys: Iterable[str]) -> str:
    return f"{where} has no {text_key!r}, it has {', '.join(keys) or 'nothing'}: set text_key"


def need(module: str, what: str, extra: str) -> Any:
    """An optional library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return __import__(module)
    except ImportError:
        raise UserError(f"{what} needs {module}: pip install 'hnet-kernels[{extra}]'") from None
