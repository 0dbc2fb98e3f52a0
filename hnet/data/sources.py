"""From a configuration to training and held-out documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from hnet.config.entries import parse_data
from hnet.errors import UserError

from .corpus import Corpus, Source, hold_out
from .files import find_files, kind_of, read_files
from .mixture import Mixture
from .splits import by_role
from .streaming import DocumentStream, LocalStream

STREAM_FROM = 1 << 30  # bytes on disk; stream = auto keeps in memory what is smaller


class CorpusConfig(Protocol):
    """The keys of a training configuration that are read here."""

    data: list[Any]  # paths and hf: streams, or tables with their weights: see mixture.parse_data
    pattern: str
    exclude: list[str]
    val_data: list[str]
    val_fraction: float
    documents: str
    text_key: str
    shuffle_bytes: int
    eval_bytes: int
    seed: int


class DataConfig(CorpusConfig, Protocol):
    """And those of models that can read a stream."""

    stream: str
    shards: int


def open_data(config: DataConfig, say: Callable[[str], None] = print) -> tuple[Source | Mixture, Corpus]:
    """(training, held-out) documents, the same for the same configuration and files on every rank and machine.

    Files are read into memory, or streamed where `stream` says so: "auto" is from `STREAM_FROM` bytes on disk on (a
    single plain text is mapped whatever its size). Entries with weights are a mixture.

    Held out is what `val_data` names, which is then not trained on (unless nothing else is there); else files whose
    names say so (see `by_role`); else a share at random, of whole documents where possible. Files named as a test set
    are left alone. Held-out documents come in random order, so that the first `eval_bytes` of them are a sample (of a
    mixture: of every source by its weight). `say` gets a line on what was done.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds nothing that matches.
        ValueError: no data, or data that cannot be read or split; the message names the file, line or key.
    """
    c, wanted = config, _wanted(config)
    val = _held_out(c, c.stream) if c.val_data else None
    opened = [_open(c, w, c.stream, c.shards, say) for w in wanted]
    if len(opened) == 1:
        train, held = opened[0]
        return train, held if val is None else val
    weights = [w.share for w in wanted]
    mixture = Mixture([train for train, _ in opened], weights)
    return mixture, _sample([held for _, held in opened], weights, c.eval_bytes, c.seed) if val is None else val


def open_corpus(config: CorpusConfig, say: Callable[[str], None] = print) -> tuple[Corpus, Corpus]:
    """`open_data` for a model that needs all documents in memory.

    Raises:
        ValueError: also data that can only be streamed, or several sources with weights.
    """
    c, wanted = config, _wanted(config)
    if len(wanted) > 1 or any(p.startswith("hf:") for p in wanted[0].paths):
        raise UserError("a ChunkLM reads random windows: data must be files, not an hf: stream, and without weights")
    train, held = _open(c, wanted[0], "off", 1, say)
    assert isinstance(train, Corpus)
    return train, _held_out(c, "off") if c.val_data else held


class _Wanted(NamedTuple):
    paths: list[str]
    text_key: str
    share: float = 1.0


def _wanted(c: CorpusConfig) -> list[_Wanted]:
    if not c.data:
        raise UserError("data must name at least one file or folder")
    entries = parse_data(c.data)
    total = sum(e.weight or 0.0 for e in entries)
    if not total:
        return [_Wanted([e.path for e in entries], c.text_key)]
    return [_Wanted([e.path], e.text_key or c.text_key, (e.weight or 0.0) / total) for e in entries]


def _open(
    c: CorpusConfig, wanted: _Wanted, stream: str, shards: int, tell: Callable[[str], None]
) -> tuple[Source, Corpus]:
    """One source, and what is held out of it: nothing when `val_data` says what is."""
    paths, text_key, share = wanted

    def say(line: str) -> None:
        tell(line if share == 1 else f"{paths[0]} ({share:.1%}): {line}")

    val = bool(c.val_data)
    nothing, window = Corpus.of([]), max(int(c.shuffle_bytes * share), 1)
    fraction = 0.0 if val else c.val_fraction
    remote = _stream(paths, "data", text_key, window, fraction, c.seed)
    if remote is not None:
        if val:
            return remote, nothing
        held = remote.take(c.eval_bytes, held_out=True)
        say(f"held out of {paths[0]}: every document at random with probability {c.val_fraction:g}")
        return remote, held

    files = list(find_files(paths, c.pattern, c.exclude))
    if val:
        out = {p.resolve() for p in find_files(_local(c.val_data), c.pattern, c.exclude)}
        rest = [p for p in files if p.resolve() not in out]
        if not rest:  # an explicit wish, for instance to see a model learn one file by heart
            say("val_data names all training files: the evaluation is on training data")
        files = rest or files
    parts = by_role(files, [p for p in map(Path, paths) if p.is_file()])
    if parts["val"] or parts["test"]:
        say(
            f"by their names, {_count(parts['train'])} trained on, {_count(parts['val'])} held out, "
            f"{_count(parts['test'])} left alone"
        )
    if _too_large(parts["train"], stream):
        fraction = 0.0 if parts["val"] else fraction
        local = LocalStream(parts["train"], c.documents, text_key, window, fraction, c.seed, shards)
        say(f"{local.amount}, shuffled within {window / 2**20:.3g} MiB")
        if fraction:
            say(f"held out of {local.name}: every document at random with probability {fraction:g}")
            return local, local.take(c.eval_bytes, held_out=True)
        return local, nothing if val else _read(c, parts["val"], text_key, stream)
    train = read_files(parts["train"], c.documents, text_key)
    if val:
        return train, nothing
    if parts["val"]:
        return train, _read(c, parts["val"], text_key, stream)
    train, held, what = hold_out(train, c.val_fraction, c.seed)
    say(what)
    return train, held.shuffled(c.seed)


def _too_large(files: list[Path], stream: str) -> bool:
    if stream != "auto":
        return stream == "on"
    return sum(p.stat().st_size for p in files) >= STREAM_FROM and (len(files) > 1 or kind_of(files[0]) != ("", ""))


def _read(c: CorpusConfig, files: list[Path], text_key: str, stream: str) -> Corpus:
    """Held-out files, or the sample of them that an evaluation uses."""
    if _too_large(files, "off" if stream == "off" else "auto"):
        return LocalStream(files, c.documents, text_key, 1, 0.0, c.seed).take(c.eval_bytes).shuffled(c.seed)
    return read_files(files, c.documents, text_key).shuffled(c.seed)


def _held_out(c: CorpusConfig, stream: str) -> Corpus:
    remote = _stream(c.val_data, "val_data", c.text_key, c.shuffle_bytes, 0.0, c.seed)
    if remote is not None:
        return remote.take(c.eval_bytes)
    return _read(c, list(find_files(c.val_data, c.pattern, c.exclude)), c.text_key, stream)


def _sample(corpora: list[Corpus], weights: list[float], size: int, seed: int) -> Corpus:
    """About `size` bytes of whole documents, of every corpus by its weight, in random order."""
    documents: list[bytes] = []
    for corpus, weight in zip(corpora, weights, strict=True):
        count = int(np.searchsorted(corpus.sizes.cumsum(), size * weight)) + 1
        documents += [corpus.document(i).tobytes() for i in range(min(count, len(corpus)))]
    return Corpus.of(documents).shuffled(seed)


def _stream(
    entries: list[str], name: str, text_key: str, window: int, fraction: float, seed: int
) -> DocumentStream | None:
    if not any(e.startswith("hf:") for e in entries):
        return None
    if len(entries) > 1:
        raise UserError(
            f"{name} must name files and folders, or one hf: stream alone, got {', '.join(entries)}"
            + ("; several with a weight each are a mixture" if name == "data" else "")
        )
    return DocumentStream(entries[0], text_key, window, fraction, seed)


def _local(entries: list[str]) -> list[str]:
    return [e for e in entries if not e.startswith("hf:")]


def _count(files: list[Path]) -> str:
    if len(files) == 1:
        return f"{files[0].name} is"
    return f"{len(files)} files are" if files else "nothing is"
