"""`hnet segment`: the chunks a model makes of a file."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import click

from hnet.device import pick_device
from hnet.disk import replacing
from hnet.errors import UserError, user_path

from .evaluate import SEQ_LEN, trained_with
from .models import checkpoint_of, load_hnet
from .options import device_options

if TYPE_CHECKING:
    from hnet.segment import Segmentation

FORMATS = ("ansi", "html", "jsonl", "png")
SUFFIXES = {".html": "html", ".htm": "html", ".jsonl": "jsonl", ".png": "png"}
PICTURE = 4000  # bytes of a picture, where --bytes says nothing


@click.command()
@click.argument("model", type=click.Path())
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--stage", type=int, help="Only this stage's chunks, 0 is the outermost. Default: all, nested.")
@click.option(
    "--format", "kind", type=click.Choice(FORMATS),
    help="ansi: colours; html: one page that needs nothing else; jsonl: an object for every piece; png: a picture. "
    "Default: as --out ends, else colours on a terminal and bars in a pipe.",
)  # fmt: skip
@click.option("--out", type=click.Path(), help="Write there. Default: standard output.")
@click.option("--bytes", "limit", type=click.IntRange(1), help=f"How much of FILE. Default: all; png: {PICTURE}.")
@click.option("--seq-len", type=int, help=f"Bytes seen at once. Default: as in training, or {SEQ_LEN}.")
@click.option(
    "--score", is_flag=True,
    help="Numbers instead: sizes, where chunks begin, agreement with words, beside baselines at the same rate. The "
    "text is held in memory. As tables, or with --format jsonl.",
)  # fmt: skip
@click.option(
    "--morphemes", metavar="FILE",
    help="With --score: also agreement with morphemes. A file of segmented words, one a line, or the word morfessor, "
    "which is trained on the words of the text.",
)  # fmt: skip
@click.option("--separator", default=" ", help="What stands between the morphemes of a word in FILE.  [default: space]")
@click.option(
    "--timeline", is_flag=True,
    help="No FILE: one page of a run's held-out lines, in which boundaries move from evaluation to evaluation.",
)  # fmt: skip
@device_options
def segment(
    model: str, file: BinaryIO, stage: int | None, kind: str | None, out: str | None, limit: int | None,
    seq_len: int | None, score: bool, morphemes: str | None, separator: str, timeline: bool, device: str, dtype: str,
) -> None:  # fmt: skip
    """Show the chunks MODEL makes of FILE (default: standard input), of any size: it is read piece by piece, each piece
    seen after the quarter of seq-len bytes before it. docs/segmentation.md has the formats."""
    from hnet.segment import segment_file

    if timeline:
        write_timeline(model, out)
        return
    kind = kind or SUFFIXES.get(Path(out or "").suffix.lower())
    if score and kind not in (None, "jsonl"):
        raise UserError(f"--score prints tables, or with --format jsonl a line a row, got {kind}")
    if morphemes and not score:
        raise UserError("--morphemes goes with --score")
    path = checkpoint_of(model)
    lm = load_hnet(path, pick_device(device), dtype)
    stages = list(range(lm.config.num_stages - 1))
    if not stages:
        raise UserError(f"{model} makes no chunks: its architecture has one stage")
    if stage is not None and stage not in stages:
        raise UserError(f"stage must be 0 to {stages[-1]} for this model, got {stage}")
    if kind == "png":
        limit = limit or PICTURE
    seq_len = trained_with(path).get("seq_len", SEQ_LEN) if seq_len is None else seq_len
    found = segment_file(lm, file, seq_len=seq_len, max_bytes=limit)
    if score:
        from .segment_score import write_scores

        with opened(out) as stream:
            shown = stages if stage is None else [stage]
            write_scores(stream, found, shown, morphemes=morphemes, separator=separator, as_json=kind == "jsonl")
        return
    name = Path(getattr(file, "name", "")).name
    write(found, kind, out, stages, stage, "standard input" if name in ("<stdin>", "") else name, model)


def write(
    found: Iterator[Segmentation], kind: str | None, out: str | None, stages: list[int], stage: int | None, name: str,
    model: str,
) -> None:  # fmt: skip
    shown = stages if stage is None else [stage]
    if kind == "png":
        from hnet.segment.picture import draw, joined

        if out is None:
            raise UserError("out must name a file for --format png, such as --out chunks.png")
        picture = io.BytesIO()
        draw(joined(list(found)), picture, stages=shown, title=f"{name}, {model}")
        with opened(out, "wb") as stream:
            stream.write(picture.getvalue())
        return
    with opened(out) as stream:
        if kind == "html":
            from hnet.segment.page import write_page

            write_page(stream, found, title=name, model=model, stages=len(stages), shown=shown)
        elif kind == "jsonl":
            from hnet.segment.jsonl import json_line

            for piece in found:
                stream.write(json_line(piece, shown) + "\n")
        else:
            write_text(stream, found, stage, colours=kind == "ansi")


def write_timeline(run: str, out: str | None) -> None:
    from hnet.segment.timeline import timeline

    page = timeline(run)
    with opened(out) as stream:
        stream.write(page)


def write_text(stream: TextIO, found: Iterator[Segmentation], stage: int | None, *, colours: bool) -> None:
    """On a terminal always in colours."""
    from rich.console import Console

    from hnet.segment import render_plain, render_rich

    console = Console(file=stream, highlight=False, force_terminal=colours or None)
    turns = [0, 0, 0]
    for piece in found:
        if console.is_terminal:
            console.print(render_rich(piece, stage, turns), soft_wrap=True, end="")
        else:
            stream.write(render_plain(piece, stage))
    stream.write("\n")


@contextmanager
def opened(out: str | None, mode: str = "w") -> Iterator[Any]:
    """The file to write, whole or not there; or standard output."""
    if out is None:
        yield sys.stdout
        return
    with replacing(Path(out)) as partial, ExitStack() as stack:
        with user_path(out, "write"):
            stream = stack.enter_context(partial.open(mode, encoding=None if "b" in mode else "utf-8"))
        yield stream
