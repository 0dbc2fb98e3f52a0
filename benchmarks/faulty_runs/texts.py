"""What the runs read: pieces of Python's standard library, as they are or spoilt."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

PACKAGES = ("email", "json", "http", "xml", "logging", "asyncio", "html", "urllib", "importlib", "unittest")
LONGEST = 6000  # bytes of a document, so that many fit into few


def documents(packages: tuple[str, ...] = PACKAGES) -> Iterator[bytes]:
    """Files of these packages, in pieces cut at line ends."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in (p for name in packages for p in sorted((root / name).rglob("*.py"))):
        piece = b""
        for line in path.read_bytes().splitlines(keepends=True):
            piece += line
            if len(piece) > LONGEST:
                yield piece
                piece = b""
        if len(piece) > 200:
            yield piece


def numbers(seed: int = 0) -> bytes:
    """Tables of numbers: text of another kind."""
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(f"{x:.3f}" for x in rng.normal(size=8)) for _ in range(80)).encode()


def plain(data: Path) -> None:
    _write(data, documents())


def few(data: Path) -> None:
    """12 documents to train on, and held-out ones of the same packages that are enough to judge by."""
    every = list(documents())
    _write(data / "text", every[::30][:12])
    _write(data / "held_out", every[7::30])


def random_bytes(data: Path) -> None:
    """Nothing to learn: letters, each as likely as the others."""
    rng = np.random.default_rng(0)
    _write(data, (rng.integers(97, 123, 3000, dtype=np.uint8).tobytes() for _ in range(300)))


def duplicated(data: Path) -> None:
    """Of 150 documents each 5 times."""
    _write(data, list(documents())[:150] * 5)


def nearly_duplicated(data: Path) -> None:
    """Of 150 documents each 4 times, with another first line and a word changed here and there."""
    rng = np.random.default_rng(0)
    out = []
    for n in range(4):
        for i, text in enumerate(list(documents())[:150]):
            lines = text.splitlines(keepends=True)
            for j in rng.integers(0, len(lines), 2):
                lines[j] = b"# changed %d\n" % rng.integers(10**6)
            out.append(b"# copy %d of %d\n" % (n, i) + b"".join(lines))
    _write(data, out)


def invalid(data: Path) -> None:
    """Every 40th byte is any byte, 254 and 255 among them."""
    rng = np.random.default_rng(0)
    out = []
    for text in documents():
        a = np.frombuffer(text, dtype=np.uint8).copy()
        where = rng.integers(0, len(a), len(a) // 40)
        a[where] = rng.integers(0, 256, len(where))
        out.append(a.tobytes())
    _write(data, out)


def utf16(data: Path) -> None:
    _write(data, (text.decode(errors="replace").encode("utf-16") for text in documents()))


def another_kind(data: Path) -> None:
    """Held out is the tail of a corpus that was not shuffled: tables of numbers."""
    _write(data / "text", documents())
    _write(data / "held_out", (numbers(i) for i in range(30)))


def held_out_copies(data: Path) -> None:
    """Most of the held-out documents are trained on, under other names."""
    every = list(documents())
    _write(data / "text", every)
    _write(data / "held_out", every[::12])


def _write(folder: Path, texts: Iterator[bytes] | list[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:05d}.txt").write_bytes(text)


TEXTS: tuple[Callable[[Path], None], ...] = (
    plain, few, random_bytes, duplicated, nearly_duplicated, invalid, utf16, another_kind, held_out_copies,
)  # fmt: skip


def write_texts(root: Path) -> None:
    """root/NAME for every kind of text; what is there stays."""
    for kind in TEXTS:
        done = root / f"{kind.__name__}.done"
        if not done.exists():
            kind(root / kind.__name__)
            done.touch()
