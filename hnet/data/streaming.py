"""Documents from Hugging Face `datasets`, read as a stream: too large for memory, or not on this machine at all.

An entry is `hf:<repository or builder>?key=value&...`, for instance

    hf:HuggingFaceFW/fineweb-edu?name=sample-10BT&split=train&text=text
    hf:json?data_files=/data/part-*.jsonl        local files through the same code; also parquet, text, csv

`text` is the column (default: the configuration's text_key), `split` is train unless given, and the other keys go to
`datasets.load_dataset`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs

from hnet.errors import UserError

from .corpus import Corpus
from .files import document_of, need

_KEYS = ("name", "split", "text", "data_files", "data_dir", "revision", "sample_by")


class DocumentStream:
    """Windows of at least `window_bytes` of documents, in the order of the source, epoch after epoch.

    A document is held out when the hash of its text and `seed` falls below `held_fraction`: so the same documents are
    held out in every epoch and on every rank, and all copies of one.

    Raises:
        ValueError: a malformed entry, or sizes out of range.
    """

    def __init__(self, entry: str, text_key: str, window_bytes: int, held_fraction: float, seed: int) -> None:
        self.entry, self.path, options = entry, *parse_entry(entry)
        if window_bytes < 1:
            raise UserError(f"shuffle_bytes must be at least 1, got {window_bytes}")
        if not 0 <= held_fraction < 1:
            raise UserError(f"val_fraction must be in (0, 1), got {held_fraction}")
        self.text_key = options.pop("text", text_key)
        self.options = {"split": "train", **options}
        self.window_bytes, self.held_fraction, self.seed = window_bytes, held_fraction, seed

    def describe(self) -> dict[str, Any]:
        return {"stream": self.entry, "shuffle_bytes": self.window_bytes, "val_fraction": self.held_fraction}

    def windows(self, cursor: dict[str, Any] | None, least: int) -> Iterator[tuple[dict[str, Any], Corpus]]:
        """(where it begins, documents) of every window, for ever; `cursor` is where to begin.

        Raises:
            ValueError: a whole epoch has fewer than `least` bytes, or a document has no text.
        """
        cursor = cursor or {"epoch": 0, "stream": None}
        while True:
            whole, total = cursor["stream"] is None, 0
            dataset = self._open(cursor["stream"])
            documents: list[bytes] = []
            size = 0
            for document in self._documents(dataset, held_out=False):
                documents.append(document)
                size += len(document)
                if size >= self.window_bytes:
                    after = {"epoch": cursor["epoch"], "stream": dataset.state_dict()}
                    yield cursor, Corpus.of(documents)
                    cursor, total, documents, size = after, total + size, [], 0
            if whole and total + size < least:
                raise UserError(
                    f"{self.entry} has {total + size} bytes to train on, fewer than one batch of {least}: "
                    "add data or lower batch_bytes"
                )
            if documents:
                yield cursor, Corpus.of(documents)
            cursor = {"epoch": cursor["epoch"] + 1, "stream": None}

    def take(self, max_bytes: int, held_out: bool = False) -> Corpus:
        """The first `max_bytes` (whole documents, at least one) of the training or the held-out documents.

        Raises:
            ValueError: there is none.
        """
        documents, size = [], 0
        for document in self._documents(self._open(None), held_out):
            documents.append(document)
            size += len(document)
            if size >= max_bytes:
                break
        if not documents:
            what = "held out (raise val_fraction, or name val_data)" if held_out else "in it"
            raise UserError(f"{self.entry}: no document {what}")
        return Corpus.of(documents)

    def _open(self, state: dict[str, Any] | None) -> Any:
        datasets = need("datasets", f"data entry {self.entry}", "hf")
        dataset = datasets.load_dataset(self.path, streaming=True, **self.options)
        if state is not None:
            dataset.load_state_dict(state)
        return dataset

    def _documents(self, dataset: Any, held_out: bool) -> Iterator[bytes]:
        for row in dataset:
            document = document_of(row, self.text_key, self.entry)
            if document and self._is_held_out(document) == held_out:
                yield document

    def _is_held_out(self, document: bytes) -> bool:
        if not self.held_fraction:
            return False
        key = self.seed.to_bytes(16, "little", signed=True)
        digest = hashlib.blake2b(document, digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little") < self.held_fraction * 2.0**64


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
