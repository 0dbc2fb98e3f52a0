"""Documents that are read as a stream, window by window: too large for memory, or not on this machine at all.

`LocalStream` reads local files with pyarrow and our own line reader, because `datasets` and torchdata split work by
whole files. `DocumentStream` reads what only Hugging Face `datasets` can. An entry is
`hf:<repository or builder>?key=value&...`, for instance

    hf:HuggingFaceFW/fineweb-edu?name=sample-10BT&split=train&text=text
    hf:csv?data_files=/data/part-*.csv      local files that we do not read ourselves; also json, parquet, text

`text` is the column (default: the configuration's text_key), `split` is train unless given, and the other keys go to
`datasets.load_dataset`.

Both can be read in `shards` disjoint parts, each with its own windows and cursor; see `pack_stream.PackStream`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np

from hnet.errors import UserError

from .corpus import Corpus
from .files import document_of, need
from .units import Units

_KEYS = ("name", "split", "text", "data_files", "data_dir", "revision", "sample_by")
_SAMPLE = 16  # shards a sample of local files is taken from

Cursor = dict[str, Any]  # {"epoch": int, "stream": the place within it, None: its beginning}
Reader = tuple[Iterable[bytes], Callable[[], Any]]  # documents, and the place after the last one taken


class Split:
    """Whether a document is held out: by the hash of its text and `seed`, with probability `fraction`. So the same
    documents are held out in every epoch and on every rank, and all copies of one.

    Raises:
        ValueError: fraction outside [0, 1).
    """

    def __init__(self, fraction: float, seed: int) -> None:
        if not 0 <= fraction < 1:
            raise UserError(f"val_fraction must be in [0, 1), got {fraction}")
        self.fraction, self.below = fraction, int(fraction * 2.0**64)
        self.key = seed.to_bytes(16, "little", signed=True)

    def held_out(self, document: bytes) -> bool:
        if not self.below:
            return False
        digest = hashlib.blake2b(document, digest_size=8, key=self.key).digest()
        return int.from_bytes(digest, "little") < self.below

    def trained_on(self, documents: Iterable[bytes]) -> Iterator[bytes]:
        return (d for d in documents if d and not self.held_out(d))


class LocalStream:
    """Documents of local files, in windows of about `window_bytes` (of all shards together).

    Each shard reads its own row groups and lines, in an order shuffled anew every epoch.

    Raises:
        ValueError: a size out of range, or files that cannot be streamed (see `Units.of`).
    """

    def __init__(
        self, files: list[Path], documents: str, text_key: str, window_bytes: int, held_fraction: float, seed: int,
        shards: int = 1,
    ) -> None:  # fmt: skip
        _check_window(window_bytes)
        self.window_bytes, self.split, self.seed = window_bytes, Split(held_fraction, seed), seed
        self.units = Units.of(files, documents, text_key, shards)
        self.name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"

    @property
    def amount(self) -> str:
        files = "1 file" if len(self.units.files) == 1 else f"{len(self.units.files):,} files"
        return f"{self.units.num_bytes:,} bytes on disk in {files}, streamed"

    def describe(self) -> dict[str, Any]:
        u = self.units
        return {
            "files": len(u.files), "units": len(u), "bytes": u.num_bytes, "crc": u.crc,
            "shuffle_bytes": self.window_bytes, "val_fraction": self.split.fraction,
        }  # fmt: skip

    def splits(self, shards: int) -> bool:
        return self.units.splits(shards)

    def passes(self, cursor: Cursor | None) -> float:
        return cursor["epoch"] + (cursor["stream"] or {}).get("share", 0.0) if cursor else 0.0

    def windows(
        self, cursor: Cursor | None, least: int, shard: int = 0, shards: int = 1
    ) -> Iterator[tuple[Cursor, Corpus]]:
        """(where it begins, documents) of every window of a shard, for ever; `cursor` is where to begin.

        Raises:
            ValueError: a whole epoch has fewer than `least` bytes, or a document has no text.
        """
        name = self.name if shards == 1 else f"shard {shard} of {shards} of {self.name}"

        def epoch(number: int, place: dict[str, Any] | None) -> Reader:
            return self._epoch(number, place, shard, shards)

        return _windows(epoch, cursor, self.split, self.window_bytes // shards, least, name)

    def take(self, max_bytes: int, held_out: bool = False) -> Corpus:
        """`max_bytes` (whole documents, at least one) of the training or the held-out documents, from all over.

        Raises:
            ValueError: there is none.
        """
        shards = next(s for s in range(_SAMPLE, 0, -1) if self.splits(s))
        found = [iter(self._epoch(0, None, s, shards)[0]) for s in range(shards)]

        def in_turn() -> Iterator[bytes]:
            while found:
                for documents in list(found):
                    document = next((d for d in documents if d and self.split.held_out(d) == held_out), None)
                    if document is None:
                        found.remove(documents)
                    else:
                        yield document

        return _first(in_turn(), max_bytes, held_out, self.name)

    def _epoch(self, epoch: int, place: dict[str, Any] | None, shard: int, shards: int) -> Reader:
        parts = self.units.shard(shard, shards)
        order = np.random.default_rng((self.seed, epoch, shard)).permutation(len(parts)).tolist()
        at = place or {"part": 0, "row": 0}
        now = [at["part"], at["row"]]

        def documents() -> Iterator[bytes]:
            for i in range(at["part"], len(parts)):
                for row, document in self.units.read(parts[order[i]], at["row"] if i == at["part"] else 0):
                    now[:] = i, row + 1
                    yield document

        return documents(), lambda: {"part": now[0], "row": now[1], "share": round(now[0] / len(parts), 6)}


class DocumentStream:
    """Documents of a Hugging Face dataset, in windows of about `window_bytes` (of all shards together), in the order of
    the source.

    Raises:
        ValueError: a malformed entry, or sizes out of range.
    """

    def __init__(self, entry: str, text_key: str, window_bytes: int, held_fraction: float, seed: int) -> None:
        self.name, self.path, options = entry, *parse_entry(entry)
        _check_window(window_bytes)
        self.text_key = options.pop("text", text_key)
        self.options = {"split": "train", **options}
        self.window_bytes, self.split = window_bytes, Split(held_fraction, seed)
        self._files: int | None = None

    @property
    def amount(self) -> str:
        return f"the stream {self.name}"

    def describe(self) -> dict[str, Any]:
        return {"stream": self.name, "shuffle_bytes": self.window_bytes, "val_fraction": self.split.fraction}

    def splits(self, shards: int) -> bool:
        """Whether shards would get about equally many of the dataset's files."""
        if shards == 1:
            return True
        if self._files is None:
            self._files = self._open(None).num_shards
        return self._files % shards == 0 or self._files >= 16 * shards

    def passes(self, cursor: Cursor | None) -> float:
        return float(cursor["epoch"]) if cursor else 0.0

    def windows(
        self, cursor: Cursor | None, least: int, shard: int = 0, shards: int = 1
    ) -> Iterator[tuple[Cursor, Corpus]]:
        """As `LocalStream.windows`."""

        def epoch(number: int, place: Any) -> Reader:
            dataset = self._open(place, shard, shards)
            return self._documents(dataset), dataset.state_dict

        return _windows(epoch, cursor, self.split, self.window_bytes // shards, least, self.name)

    def take(self, max_bytes: int, held_out: bool = False) -> Corpus:
        """The first `max_bytes` (whole documents, at least one) of the training or the held-out documents.

        Raises:
            ValueError: there is none.
        """
        found = (d for d in self._documents(self._open(None)) if d and self.split.held_out(d) == held_out)
        return _first(found, max_bytes, held_out, self.name)

    def _open(self, state: dict[str, Any] | None, shard: int = 0, shards: int = 1) -> Any:
        datasets = need("datasets", f"data entry {self.name}", "hf")
        dataset = datasets.load_dataset(self.path, streaming=True, **self.options)
        if shards > 1:
            dataset = dataset.shard(shards, shard)
        if state is not None:
            dataset.load_state_dict(state)
        return dataset

    def _documents(self, dataset: Any) -> Iterator[bytes]:
        for row in dataset:
            yield document_of(row, self.text_key, self.name)


def _windows(
    epoch: Callable[[int, Any], Reader], cursor: Cursor | None, split: Split, window_bytes: int, least: int, name: str
) -> Iterator[tuple[Cursor, Corpus]]:
    cursor = cursor or {"epoch": 0, "stream": None}
    while True:
        whole, total, size = cursor["stream"] is None, 0, 0
        source, place = epoch(cursor["epoch"], cursor["stream"])
        documents: list[bytes] = []
        for document in split.trained_on(source):
            documents.append(document)
            size += len(document)
            if size >= window_bytes:
                after = {"epoch": cursor["epoch"], "stream": place()}
                window, documents = Corpus.of(documents), []
                yield cursor, window
                del window  # its memory, before the next takes as much
                cursor, total, size = after, total + size, 0
        if whole and total + size < least:
            raise UserError(
                f"{name} has {total + size} bytes to train on, fewer than one batch of {least}: "
                "add data or lower batch_bytes"
                if least > 1
                else f"{name} has no text to train on: set shards = 1"
            )
        if documents:
            window, documents = Corpus.of(documents), []
            yield cursor, window
            del window
        cursor = {"epoch": cursor["epoch"] + 1, "stream": None}


def _first(documents: Iterator[bytes], max_bytes: int, held_out: bool, name: str) -> Corpus:
    found, size = [], 0
    for document in documents:
        found.append(document)
        size += len(document)
        if size >= max_bytes:
            break
    if not found:
        what = "held out (raise val_fraction, or name val_data)" if held_out else "in it"
        raise UserError(f"{name}: no document {what}")
    return Corpus.of(found)


def _check_window(window_bytes: int) -> None:
    if window_bytes < 1:
        raise UserError(f"shuffle_bytes must be at least 1, got {window_bytes}")


def parse_entry(entry: str) -> tuple[str, dict[str, Any]]:
    """("HuggingFaceFW/fineweb-edu", {"name": ..., ...}); data_files, which may be given more than once, is a list.

    Raises:
        ValueError: no name, or a key that is unknown, empty or given twice.
    """
    path, _, query = entry.removeprefix("hf:").partition("?")
    if not path:
        raise UserError(f"data entry {entry!r} must be hf:<repository or builder>?key=value&...")
    options: dict[str, Any] = {}
    for key, values in parse_qs(query, keep_blank_values=True).items():
        if key not in _KEYS:
            raise UserError(f"data entry {entry!r}: unknown key {key!r}; known are {', '.join(_KEYS)}")
        if not all(values) or (key != "data_files" and len(values) > 1):
            raise UserError(f"data entry {entry!r}: {key} must have one value, got {values}")
        options[key] = values if key == "data_files" else values[0]
    return path, options
