"""From a configuration to training and held-out documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from hnet.errors import UserError

from .corpus import Corpus, hold_out
from .files import find_files, read_files
from .splits import by_role
from .streaming import DocumentStream


class DataConfig(Protocol):
    """The keys of a training configuration that are read here."""

    data: list[str]
    pattern: str
    exclude: list[str]
    val_data: list[str]
    val_fraction: float
    documents: str
    text_key: str
    shuffle_bytes: int
    eval_bytes: int
    seed: int


def open_data(config: DataConfig, say: Callable[[str], None] = print) -> tuple[Corpus | DocumentStream, Corpus]:
    """(training, held-out) documents, the same for the same configuration and files on every rank and machine.

    Held out is what `val_data` names, which is then not trained on (unless nothing else is there); else files whose
    names say so (see `by_role`); else a share at random, of whole documents where possible. Files named as a test set
    are left alone. Held-out documents come in random order, so that the first `eval_bytes` of them are a sample. `say`
    gets a line on what was done.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds nothing that matches.
        ValueError: no data, or data that cannot be read or split; the message names the file, line or key.
    """
    c = config
    if not c.data:
        raise UserError("data must name at least one file or folder")
    fraction = 0.0 if c.val_data else c.val_fraction
    stream = _stream(c.data, "data", c, fraction)
    if stream is not None:
        if c.val_data:
            return stream, _held_out(c)
        val = stream.take(c.eval_bytes, held_out=True)
        say(f"held out of {c.data[0]}: every document at random with probability {c.val_fraction:g}")
        return stream, val

    files = list(find_files(c.data, c.pattern, c.exclude))
    if c.val_data:
        val = _held_out(c)
        held = {p.resolve() for p in find_files(_paths(c.val_data), c.pattern, c.exclude)}
        rest = [p for p in files if p.resolve() not in held]
        if not rest:  # an explicit wish, for instance to see a model learn one file by heart
            say("val_data names all training files: the evaluation is on training data")
        files = rest or files
    parts = by_role(files, [p for p in map(Path, c.data) if p.is_file()])
    train = read_files(parts["train"], c.documents, c.text_key)
    if parts["val"] or parts["test"]:
        say(
            f"by their names, {_count(parts['train'])} trained on, {_count(parts['val'])} held out, "
            f"{_count(parts['test'])} left alone"
        )
    if c.val_data:
        return train, val
    if parts["val"]:
        return train, read_files(parts["val"], c.documents, c.text_key).shuffled(c.seed)
    train, val, what = hold_out(train, c.val_fraction, c.seed)
    say(what)
    return train, val.shuffled(c.seed)


def _held_out(c: DataConfig) -> Corpus:
    stream = _stream(c.val_data, "val_data", c, 0.0)
    if stream is not None:
        return stream.take(c.eval_bytes)
    return read_files(list(find_files(c.val_data, c.pattern, c.exclude)), c.documents, c.text_key).shuffled(c.seed)


def _stream(entries: list[str], name: str, c: DataConfig, fraction: float) -> DocumentStream | None:
    if not any(e.startswith("hf:") for e in entries):
        return None
    if len(entries) > 1:
        raise UserError(f"{name} must name files and folders, or one hf: stream alone, got {', '.join(entries)}")
    return DocumentStream(entries[0], c.text_key, c.shuffle_bytes, fraction, c.seed)


def _paths(entries: list[str]) -> list[str]:
    return [e for e in entries if not e.startswith("hf:")]


def _count(files: list[Path]) -> str:
    if len(files) == 1:
        return f"{files[0].name} is"
    return f"{len(files)} files are" if files else "nothing is"
