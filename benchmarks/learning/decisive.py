"""Does a router decide, where, and at what loss? `python -m benchmarks.learning.decisive --data FILE --seeds 0 1 2`.

Trains the laptop recipe with each of `--arms` (`ARMS`), `--targets` (bytes a chunk) and `--seeds` for `--steps` steps,
and scores all of what was held out: nats a symbol, bytes a chunk, F, G, p on and off boundaries, and what the
characters are that hold the boundaries (first positions of sequences, which are boundaries anyway, left out).

--data: a file, whose last tenth is held out (or `--val FILE`), or a folder: its .py files, every tenth held out.
Rows are added to `--results` as runs end; a run that is there already under the same name is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hnet_kernels as hk
from hnet.config.keys import override, read_toml
from hnet.data.packing import eval_batches
from hnet.model.causal_lm import HNetForCausalLM
from hnet.train.config import TrainConfig
from hnet.train.evaluation import evaluate_hnet
from hnet.train.loop import Trainer

from ..harness import machine

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "decisive.json"
OFF: dict[str, Any] = {"entropy_weight": [0.0], "surprisal_weight": [0.0]}
SCHEDULE = {"surprisal_warmup": 0.1, "entropy_start": 0.3, "entropy_warmup": 0.3, "surprisal_gain": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "undecided": OFF,
    "entropy": OFF | SCHEDULE | {"entropy_weight": [0.1]},
    "surprisal": OFF | SCHEDULE | {"surprisal_weight": [0.1]},
    "both": SCHEDULE | {"surprisal_weight": [0.1], "entropy_weight": [0.1]},
    "both_firm": SCHEDULE | {"surprisal_weight": [0.1], "entropy_weight": [0.2]},
    "held_soft": SCHEDULE | {"surprisal_weight": [0.1], "entropy_weight": [0.1], "surprisal_gain": 0.02},
    "held": SCHEDULE | {"surprisal_weight": [0.1], "entropy_weight": [0.2], "surprisal_gain": 0.02},
    "held_early": {
        "surprisal_weight": [0.1], "surprisal_warmup": 0.1, "surprisal_gain": 0.05,
        "entropy_weight": [0.3], "entropy_start": 0.2, "entropy_warmup": 0.2,
    },
}  # fmt: skip
KINDS = ("whitespace", "word_start", "second_letter", "inside_word", "other")


def kinds(text: bytes) -> np.ndarray:
    """(len,) uint8: for every byte the kind, as an index into KINDS, of the character it belongs to"""
    found, sizes, letters = [], [], 0
    for c in text.decode(errors="surrogateescape"):
        # combining marks (vowel signs) are letters of their words
        word = c.isalnum() or c == "_" or (ord(c) > 127 and not c.isspace() and c.isprintable())
        letters = letters + 1 if word else 0
        found.append(min(letters, 3) if word else 0 if c.isspace() else 4)
        sizes.append(len(c.encode(errors="surrogateescape")))
    return np.repeat(np.array(found, dtype=np.uint8), sizes)


@torch.no_grad()
def score(model: HNetForCausalLM, corpus: Any, seq_len: int, batch_bytes: int) -> dict[str, Any]:
    """All of `corpus`: loss, rate and where the outermost boundaries are."""
    loss = evaluate_hnet(model, corpus, nullcontext, seq_len=seq_len, batch_bytes=batch_bytes)
    model.eval()
    p, b, kind, begins = [], [], [], []
    for batch in eval_batches(corpus, seq_len, batch_bytes, None):
        r = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen).routing[0]
        p.append(r.boundary_prob.numpy())
        b.append(r.boundary_mask.numpy())
        ids = batch.input_ids.numpy().astype(np.uint8)
        cu = batch.cu_seqlens.tolist()
        for i, j in zip(cu, cu[1:], strict=False):
            bos = ids[i] >= 254
            kind.append(np.pad(kinds(ids[i + bos : j].tobytes()), (int(bos), 0)))
            begins.append(np.arange(j - i) == 0)
    prob, mask, what, begin = (np.concatenate(x) for x in (p, b, kind, begins))
    on, off = mask & ~begin, ~mask
    free = ~begin
    share = np.bincount(what[on], minlength=5) / max(on.sum(), 1)
    return {
        "val_ce": loss.ce, "bytes_per_chunk": loss.bytes_per_chunk[0], "F": float(mask.mean()), "G": float(prob.mean()),
        "p_on": float(prob[on].mean()), "p_off": float(prob[off].mean()),
        "undecided": float(((prob > 0.1) & (prob < 0.9))[free].mean()),
        "inner": [  # of the stages further in, first positions of sequences among the boundaries
            {"bytes_per_chunk": n, "F": stage / n, **d}
            for n, stage, d in zip(loss.bytes_per_chunk[1:], loss.bytes_per_chunk, loss.decisiveness[1:], strict=False)
        ],
        "boundaries": dict(zip(KINDS, share.tolist(), strict=True)),
        "bytes": dict(zip(KINDS, (np.bincount(what[free], minlength=5) / free.sum()).tolist(), strict=True)),
    }  # fmt: skip


def prepare(data: Path, val: Path | None, out: Path, most: int) -> dict[str, list[str]]:
    """Training and held-out files."""
    if data.is_dir():
        files, room = [], most
        for f in sorted(data.glob("*.py")):
            if (room := room - f.stat().st_size) > 0:
                files.append(str(f))
        return {"data": [f for i, f in enumerate(files) if i % 10], "val_data": files[::10]}
    if val is not None:
        return {"data": [str(data)], "val_data": [str(val)]}
    text = data.read_bytes()
    cut = len(text) * 9 // 10
    for name, part in (("train.txt", text[:cut]), ("held_out.txt", text[cut:])):
        (out / name).write_bytes(part)
    return {"data": [str(out / "train.txt")], "val_data": [str(out / "held_out.txt")]}


def main(argv: list[str] | None = None) -> None:
    a = arguments().parse_args(argv)
    name = a.name or a.data.stem
    for target in a.targets:
        for seed in a.seeds:
            for arm in a.arms:
                key = {"data": name, "arm": arm, "target": target, "seed": seed, "steps": a.steps}
                rows = json.loads(a.results.read_text())["rows"] if a.results.exists() else []
                if not any(key == {k: r[k] for k in key} for r in rows):
                    add(a.results, run(a, key))


def run(a: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        values = override(read_toml(ROOT / "configs" / "laptop.toml", TrainConfig), {
            **ARMS[key["arm"]], **prepare(a.data, a.val, out, a.bytes),
            "seed": key["seed"], "steps": a.steps, "batch_bytes": a.batch_bytes, "seq_len": a.seq_len,
            "documents": a.documents, "boundaries": a.boundaries, "ngrams": a.ngrams, "ngram_dropout": 0.5,
            **shape(a, key["target"]),
            "device": "cpu", "plots": False, "sample_bytes": 0,
            "eval_every": a.steps, "eval_bytes": 4096, "checkpoint_every": a.steps, "out": str(out / "run"),
        })  # fmt: skip
        trainer = Trainer(TrainConfig(**values))
        trainer.train()
        row = key | score(trainer.model, trainer.task.val, a.seq_len, 8192)
    row |= {"boundaries_at": a.boundaries, "batch_bytes": a.batch_bytes, "seq_len": a.seq_len}
    row |= {"settings": ARMS[key["arm"]], "command": command(a, key), "date": datetime.date.today().isoformat()}
    print(json.dumps({k: v for k, v in row.items() if k not in ("settings", "command")}), flush=True)
    return row


def shape(a: argparse.Namespace, target: float) -> dict[str, Any]:
    """Keys of the model, if it is not the recipe's, and its targets."""
    own = {"arch": a.arch, "d_model": a.widths} if a.arch else {}
    return own | {"compression": [target, *a.inner_targets]}


def command(a: argparse.Namespace, key: dict[str, Any]) -> str:
    """That makes this row again, but for where the data are."""
    words = ["python -m benchmarks.learning.decisive --data", a.data.name, "--name", key["data"]]
    words += ["--arms", key["arm"], "--targets", f"{key['target']:g}", "--seeds", str(key["seed"])]
    for flag in ("steps", "batch_bytes", "seq_len", "documents", "boundaries"):
        words += [f"--{flag.replace('_', '-')}", str(getattr(a, flag))]
    words += ["--ngrams", *map(str, a.ngrams)] if a.ngrams else []
    words += ["--arch", repr(a.arch), "--widths", *map(str, a.widths)] if a.arch else []
    words += ["--inner-targets", *(f"{n:g}" for n in a.inner_targets)] if a.inner_targets else []
    words += ["--val", a.val.name] if a.val else []
    words += ["--bytes", str(a.bytes)] if a.data.is_dir() else []
    return " ".join(words)


def add(path: Path, row: dict[str, Any]) -> None:
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    here = machine() | {"command": "python -m benchmarks.learning.decisive"}  # each row has its own in full
    path.write_text(json.dumps({"machine": here, "rows": [*rows, row]}, indent=1) + "\n")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--val", type=Path, help="held-out file; default: the last tenth of the data")
    parser.add_argument("--name", help="of the data in the results; default: the file's")
    parser.add_argument("--bytes", type=int, default=2_000_000, help="most of a folder")
    parser.add_argument("--documents", default="file")
    parser.add_argument("--boundaries", default="any")
    parser.add_argument("--ngrams", nargs="*", type=int, default=[], help="of the recipe's embeddings; default: none")
    parser.add_argument("--arch", default="", help="another model, as for `hnet train --arch`; name its rows by --name")
    parser.add_argument("--widths", nargs="*", type=int, default=[], help="its d_model")
    parser.add_argument("--inner-targets", nargs="*", type=float, default=[], help="of the stages further in")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--targets", nargs="+", type=float, default=[4.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1110)
    parser.add_argument("--batch-bytes", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    hk.keep_memory()
    main()
