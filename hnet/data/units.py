"""Files too large for memory, as units that can be read alone: row groups of Parquet, ranges of lines, whole files."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hnet.errors import UserError, user_path

from .files import DOCUMENTS, chunks, json_document, kind_of, lines, open_parquet, row_group

LEAST_SHARD = 1 << 20  # bytes on disk; below, shards only add overhead
_RANGE = 8 << 20  # bytes of a range of lines, at most
_SNAP = 0.02  # of a shard: how far its end may move to the end of a unit
_SPREAD = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: multiples of it are evenly spread at every length


class Part(NamedTuple):
    """What a shard reads of a unit: all, or a share of its rows, evenly spread."""

    unit: int
    low: float = 0.0
    high: float = 1.0

    def has(self, row: int) -> bool:
        return self.high - self.low >= 1 or self.low <= (row * _SPREAD % 2**64) / 2**64 < self.high


@dataclass(frozen=True)
class Units:
    """Unit i is file `file[i]` from `begin[i]` to `end[i]`: a row group of Parquet (its number, and that + 1), a range
    of bytes whose lines are read, or a whole file (0, -1). `size[i]`: bytes on disk, to share the work by."""

    files: list[Path]
    documents: str
    text_key: str
    file: np.ndarray  # (units,) int64
    begin: np.ndarray  # (units,) int64
    end: np.ndarray  # (units,) int64
    size: np.ndarray  # (units,) int64, positive

    @staticmethod
    def of(files: list[Path], documents: str, text_key: str, shards: int) -> Units:
        """
        Raises:
            ValueError: `documents` is unknown, nothing but empty files, or a Parquet file that is broken, has no
                `text_key`, or is compressed as a whole.
        """
        if documents not in DOCUMENTS:
            raise UserError(f"documents must be one of {', '.join(DOCUMENTS)}, got {documents!r}")
        step = int(np.clip(sum(p.stat().st_size for p in files) // (32 * shards), LEAST_SHARD >> 4, _RANGE))
        with ThreadPoolExecutor(8) as pool:  # footers may lie on a slow disk
            found = pool.map(lambda p: _units_of(p, documents, text_key, step), files)
            table = [(i, *unit) for i, units in enumerate(found) for unit in units]
        if not table:
            raise UserError(f"the corpus is empty: no bytes in {', '.join(map(str, files))}")
        return Units(files, documents, text_key, *np.array(table, dtype=np.int64).T)

    def __len__(self) -> int:
        return len(self.size)

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return int(self.size.sum())

    @property
    def crc(self) -> int:
        """Changes with any file's size or cut."""
        return zlib.crc32(np.stack([self.file, self.begin, self.end, self.size]).tobytes())

    def splits(self, shards: int) -> bool:
        """Whether each shard would get a unit and 1 MiB."""
        return shards == 1 or shards <= min(len(self), self.num_bytes // LEAST_SHARD)

    def shard(self, shard: int, shards: int) -> list[Part]:
        """The parts of one of `shards` shards, of equal size on disk. Ends near the end of a unit move there; elsewhere
        two shards share the rows of a unit, which both decode."""
        ends = self.size.cumsum()
        (first, low), (last, high) = (self._cut(ends, s, shards) for s in (shard, shard + 1))
        if first == last:
            return [Part(first, low, high)] if high > low else []
        parts = [Part(first, low), *map(Part, range(first + 1, last))]
        return parts + ([Part(last, 0.0, high)] if high > 0 else [])

    def _cut(self, ends: np.ndarray, shard: int, shards: int) -> tuple[int, float]:
        total = int(ends[-1])
        at = total * shard / shards
        unit = min(int(np.searchsorted(ends, at, side="right")), len(self))
        if unit == len(self):
            return unit, 0.0
        size = int(self.size[unit])
        used = at - (int(ends[unit]) - size)
        if used <= _SNAP * total / shards:
            return unit, 0.0
        if size - used <= _SNAP * total / shards:
            return unit + 1, 0.0
        return unit, used / size

    def read(self, part: Part, row: int) -> Iterator[tuple[int, bytes]]:
        """(row, document) of a part from a row on; a blank line or null is an empty document.

        Raises:
            ValueError: a row is broken, or has no text.
        """
        for number, document in self._rows(part, row):
            if number >= row and part.has(number):
                yield number, document

    def _rows(self, part: Part, row: int) -> Iterator[tuple[int, bytes]]:
        path = self.files[self.file[part.unit]]
        begin, end = int(self.begin[part.unit]), int(self.end[part.unit])
        kind = kind_of(path)[0]
        if kind == "parquet":
            with open_parquet(path, self.text_key) as file:
                yield from enumerate(chain.from_iterable(row_group(file, begin, path, self.text_key)))
        elif kind == "jsonl":
            for number, (at, line) in enumerate(_lines_of(path, begin, end)):
                if number >= row and part.has(number):
                    yield number, json_document(line, self.text_key, partial(_where, path, at))
        elif self.documents == "line":
            yield from enumerate(line for _, line in _lines_of(path, begin, end))
        elif self.documents == "paragraph":
            yield from enumerate(_paragraphs(path))
        else:
            yield 0, b"".join(chunks(path))


def _units_of(path: Path, documents: str, text_key: str, step: int) -> list[tuple[int, int, int]]:
    """(begin, end, size) of the units of a file."""
    kind, packed = kind_of(path)
    size = path.stat().st_size
    if kind == "parquet":
        if packed:
            raise UserError(f"{path} cannot be streamed: decompress it (Parquet compresses inside), or stream = off")
        with open_parquet(path, text_key) as file:
            groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
            share = size / max(sum(g.total_byte_size for g in groups), 1)
            sizes = [max(int(g.total_byte_size * share), 1) if g.num_rows else 0 for g in groups]
            return [(g, g + 1, size) for g, size in enumerate(sizes) if size]
    if packed or (kind == "" and documents != "line"):
        return [(0, -1, size)] if size or packed else []
    pieces = -(-size // step)
    cuts = [size * i // pieces for i in range(pieces + 1)] if pieces else []
    return [(a, b, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]


def _lines_of(path: Path, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(where it begins, line) of the lines that begin in a range of bytes, with their newlines; end -1: of all lines of
    a compressed file."""
    if end < 0:
        at = 0
        for line in lines(path):
            yield at, line
            at += len(line)
        return
    with user_path(path), path.open("rb") as f:
        at = begin
        if begin:
            f.seek(begin - 1)
            at += len(f.readline()) - 1
        while at < end and (line := f.readline()):
            yield at, line
            at += len(line)
        if at < end:
            raise UserError(f"{path} ends at byte {at}, but had {end} or more when the run began")


def _where(path: Path, at: int) -> str:
    """The line that begins at a byte, by its number: counted only when it is to be complained of."""
    before = number = 0
    for chunk in chunks(path):
        part = chunk[: at - before]
        number += part.count(b"\n")
        before += len(chunk)
        if before >= at:
            break
    return f"{path} line {number + 1}"


def _paragraphs(path: Path) -> Iterator[bytes]:
    """As `files.read_files` cuts them, without holding the file."""
    begun: list[bytes] = []
    text = blank = False  # seen in this paragraph
    for line in lines(path):
        if line.strip(b" \t\r\n") or not line.endswith(b"\n"):
            if text and blank:
                yield b"".join(begun)
                begun = []
            text, blank = True, False
        else:
            blank = True
        begun.append(line)
    if begun:
        yield b"".join(begun)
