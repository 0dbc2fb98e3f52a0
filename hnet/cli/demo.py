"""`hnet demo`: a small H-Net learns Python's own standard library in a few minutes, then shows what it learned."""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
from pathlib import Path

from rich.console import Console

from hnet.errors import PathTaken, user_path
from hnet.generate.texts import stream_text
from hnet.segment import render_plain, render_rich, segment
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

MARKER = ".demo"  # the digest of the config.toml that the demo wrote: by it a later demo knows its own
WRITTEN = {MARKER, "config.toml", "metrics.jsonl", "held_out.jsonl", "checkpoints", "samples", "plots"}
PROMPT = 'def read_lines(path):\n    """'


def config(out: str, steps: int) -> TrainConfig:
    return TrainConfig(
        data=[sysconfig.get_paths()["stdlib"]],
        pattern="*.py",
        exclude=["site-packages", "dist-packages", "test", "tests"],
        preset="laptop",
        ngrams=[2, 3, 4],
        ngram_rows=16384,
        compression=[4.0],
        ratio_weight="auto",
        rate_control="bias",
        surprisal_weight=[0.1],
        entropy_weight=[0.2],
        surprisal_gain=0.0,
        seq_len=512,
        batch_bytes=8192,
        steps=steps,
        optimizer="muon",
        learning_rate=1e-2,
        warmup_steps=min(50, steps),
        decay_fraction=0.4,
        eval_every=max(steps // 4, 1),
        eval_bytes=1 << 17,
        checkpoint_every=max(steps // 4, 1),
        out=out,
    )


def clear(out: Path) -> None:
    """Remove an earlier demo.

    Raises:
        UserError: `out` holds anything else; nothing is removed.
    """
    with user_path(out):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        found = {p.name for p in out.iterdir()} if out.is_dir() else set()
        if MARKER not in found:
            raise PathTaken(f"{out} is not a demo's: name another --out, or remove it yourself")
        if others := found - WRITTEN:
            raise PathTaken(f"{out} holds {min(others)}, which no demo wrote: name another --out, or move that away")
        run = out / "config.toml"
        if run.is_file() and _digest(run.read_bytes()) != (out / MARKER).read_text():
            raise PathTaken(f"{out} was trained on with other keys than the demo's: name another --out")
    shutil.rmtree(out)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def demo(out: str, steps: int) -> None:
    """Train (an earlier demo in `out` is replaced), then print held-out bits per byte before and after, a continuation,
    and a segmented snippet."""
    console = Console(highlight=False)
    c = config(out, steps)
    clear(Path(out))
    trainer = Trainer(c)
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / MARKER).write_text(_digest(trainer.config.to_toml().encode()))
    size = sum(p.numel() for p in trainer.model.parameters())
    corpus = trainer.task.stream.corpus
    console.print(
        f"An H-Net of {size / 1e6:.1f}M parameters learns {corpus.num_bytes / 1e6:.1f} MB of Python "
        f"({len(corpus)} files of the standard library), byte by byte, without a tokenizer."
    )
    before = trainer.evaluate()["val_bpb"]
    after = trainer.train().get("val_bpb")
    if after is None:  # stopped before the first evaluation
        return
    model = trainer.model.eval()
    console.print(f"\n[bold]Held-out bits per byte:[/] {before:.2f} before, {after:.2f} after")
    console.print("\n[bold]A continuation[/] (the prompt, then its own bytes)")
    console.print(PROMPT, end="", markup=False, style="bold")
    for piece in stream_text(model, PROMPT, max_new_bytes=320, temperature=0.6, top_p=0.95, seed=0):
        console.print(piece, end="", markup=False)
    text = snippet(trainer)
    chunks = segment(model, text)
    starts = chunks.stages[0].starts
    console.print(
        f"\n\n[bold]Chunks[/] it learned, on held-out code ({len(text) / max(len(starts), 1):.1f} bytes a chunk)"
    )
    console.print(render_rich(chunks) if console.is_terminal else render_plain(chunks), markup=False)
    console.print(f"\nEverything is in {out}. More text: hnet generate {out} --prompt 'class '")


def snippet(trainer: Trainer, size: int = 600) -> bytes:
    """Some whole lines from the middle of the longest held-out file."""
    document = trainer.task.val.longest()
    at = document.find(b"\ndef ", len(document) // 3) + 1
    piece = document[at : at + size]
    return piece[: piece.rfind(b"\n") + 1] or piece
