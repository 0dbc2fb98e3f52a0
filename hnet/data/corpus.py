"""Documents as byte strings: read from files and folders, split into training and held-out parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Corpus:
    """Documents end to end: document i is data[offsets[i] : offsets[i + 1]]."""

    data: np.ndarray  # (bytes,) uint8
    offsets: np.ndarray  # (documents + 1,) int64

    @staticmethod
    def of(documents: Iterable[bytes]) -> Corpus:
        """Empty documents are left out."""
        parts = [d for d in documents if d]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return Corpus(np.frombuffer(b"".join(parts), dtype=np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_bytes(self) -> int:
        return int(self.offsets[-1])

    def document(self, i: int) -> np.ndarray:
        return self.data[self.offsets[i] : self.offsets[i + 1]]

    def select(self, documents: Iterable[int]) -> Corpus:
        return Corpus.of(self.document(i).tobytes() for i in documents)

    def split(self, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
        """(rest, held out): whole documents at random until `fraction` of the bytes is held out; each side has one.

        Raises:
            ValueError: fraction outside (0, 1), or fewer than two documents.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"val_fraction must be in (0, 1), got {fraction}")
        if len(self) < 2:
            raise ValueError(
                f"cannot hold documents out of {len(self)}: name held-out files with val_data, or add documents"
            )
        order = np.random.default_rng(seed).permutation(len(self))
        sizes = np.diff(self.offsets)[order].cumsum()
        count = int(np.clip(np.searchsorted(sizes, fraction * self.num_bytes) + 1, 1, len(self) - 1))
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))


def find_files(paths: Iterable[str | Path], pattern: str = "*", exclude: Iterable[str] = ()) -> Iterator[Path]:
    """Files named, and those below folders named that match `pattern`; sorted. Hidden files are left out, and so is
    everything below a folder (or any file) whose name matches one of `exclude`."""
    exclude = list(exclude)

    def wanted(below: Path) -> bool:
        return not below.name.startswith(".") and not any(fnmatch(part, e) for part in below.parts for e in exclude)

    for path in map(Path, paths):
        if path.is_file():
            yield path
        elif path.is_dir():
            found = sorted(p for p in path.rglob(pattern) if p.is_file() and wanted(p.relative_to(path)))
            if not found:
                raise FileNotFoundError(f"no file below {path} matches {pattern!r}")
            yield from found
        else:
            raise FileNotFoundError(f"data path {path} does not exist")


def read_corpus(paths: Iterable[str | Path], pattern: str = "*", exclude: Iterable[str] = ()) -> Corpus:
    """One document a file.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds nothing that matches.
        ValueError: all files are empty.
    """
    paths = list(paths)
    if not paths:
        raise ValueError("data must name at least one file or folder")
    corpus = Corpus.of(p.read_bytes() for p in find_files(paths, pattern, exclude))
    if not len(corpus):
        raise ValueError(f"the corpus is empty: no bytes in {', '.join(map(str, paths))}")
    return corpus
