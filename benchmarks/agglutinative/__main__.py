"""Does the agglutinative recipe work? `python -m benchmarks.agglutinative --minutes 30 --seeds 0 1 2`.

Trains a small H-Net (the laptop's network) with the recipe of configs/agglutinative.toml and a teacher, and with each
of the other `--arms`, for equally many steps: as many as the recipe makes in `--minutes`, or `--steps`. Then scores the
tenth that was held out: rate against target, boundaries on edges of characters, word starts found, F1 of morphemes
beside white space, random characters and BPE at the same rate, bits per byte.

--text: synthetic (Telugu script, every morpheme known, of `--bytes`), or a file with a sentence or paragraph a line, of
which `--morphemes` may have the words (scripts/agglutinative_corpus.py makes both). Rows are added to `--results` as
runs end; one that is there already is not run again. `python -m benchmarks.table` puts them into docs/segmentation.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import hnet_kernels as hk
from hnet.segment.morphemes import read_morphemes
from hnet.segment.report import plain

from ..harness import machine
from .arms import ARMS
from .run import Gold, configuration, run, steps_in
from .synthetic import generate

RESULTS = Path(__file__).parents[1] / "results" / "agglutinative.json"
KEY = ("text", "arm", "seed", "steps", "chars_per_chunk")


def read(a: argparse.Namespace) -> tuple[str, list[str], Gold | None]:
    """Name, lines, and morphemes if they are known"""
    if a.text == "synthetic":
        return a.text, *generate(a.bytes)
    path = Path(a.text)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return path.stem, lines, read_morphemes(a.morphemes, a.separator) if a.morphemes else None


def main(argv: list[str] | None = None) -> None:
    a = arguments().parse_args(argv)
    name, lines, gold = read(a)
    steps = a.steps
    for seed in a.seeds:
        for arm in a.arms:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder)
                if steps is None:
                    steps = steps_in(a.minutes, configuration("recipe", lines, a.chars_per_chunk, 0, 10_000, out))
                key = dict(zip(KEY, (name, arm, seed, steps, a.chars_per_chunk), strict=True))
                if any(key == {k: r[k] for k in KEY} for r in rows_of(a.results)):
                    continue
                config = configuration(arm, lines, a.chars_per_chunk, seed, steps, out)
                row = key | plain(run(config, gold))
            row |= {
                "batch_bytes": config.batch_bytes,
                "seq_len": config.seq_len,
                "bytes": sum(len(line.encode()) + 1 for line in lines),
            }
            row |= {"command": command(a, key), "date": datetime.date.today().isoformat()}
            add(a.results, row)
            print(json.dumps({k: v for k, v in row.items() if k not in ("baselines", "command")}), flush=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def add(path: Path, row: dict[str, Any]) -> None:
    here = machine() | {"command": "python -m benchmarks.agglutinative"}  # each row has its own in full
    path.write_text(json.dumps({"machine": here, "rows": [*rows_of(path), row]}, indent=1, ensure_ascii=False) + "\n")


def command(a: argparse.Namespace, key: dict[str, Any]) -> str:
    """That makes this row again, but for where the text is."""
    words = ["python -m benchmarks.agglutinative --text", Path(a.text).name, "--arms", repr(key["arm"])]
    words += ["--seeds", str(key["seed"]), "--steps", str(key["steps"]), "--chars-per-chunk", f"{a.chars_per_chunk:g}"]
    words += ["--bytes", str(a.bytes)] if a.text == "synthetic" else []
    words += ["--morphemes", a.morphemes.name] if a.morphemes else []
    return " ".join(words)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="synthetic")
    parser.add_argument("--bytes", type=int, default=3_000_000, help="of the synthetic text")
    parser.add_argument("--morphemes", type=Path, help="words of the text, one a line, cut into morphemes")
    parser.add_argument("--separator", default=" ")
    parser.add_argument("--chars-per-chunk", type=float, default=3.0, help="N, in characters of the text")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=30.0, help="of the recipe; every arm makes as many steps")
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    hk.keep_memory()
    main()
