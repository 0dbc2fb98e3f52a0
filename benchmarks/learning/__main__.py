"""What an H-Net learns in equal time, beside models without chunks: `python -m benchmarks.learning --data FILE`.

Each model trains for each of `--seconds` (or `--teraflops`) on the first nine tenths of the bytes and is scored on the
last tenth: nats a byte, every byte once. Runs take turns, each in a process of its own; the machine must have nothing
else to do. Rows are added to `--results` as they come. Without an amount, what `plan.PLAN` says, in under an hour
(`--dry-run`: only says how long).

    python -m benchmarks.learning --data tinyshakespeare.txt
    python -m benchmarks.learning --data tinyshakespeare.txt --seconds 30 60 120 --seeds 3
    python -m benchmarks.learning --corpus python --seconds 120 --models hnet isotropic --eval-bytes 262144
    python -m benchmarks.learning --data FILE --models hnet "hnet compression=[6.0]" "hnet rate_control='none'"
    python -m benchmarks.learning plot       draws docs/learning_*.png and writes the tables in docs/learning.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .. import table
from .plan import estimate, planned
from .report import draw, groups, picture
from .run import LEARNERS, UNITS, Run, measure_all

RESULTS = Path(__file__).parents[1] / "results" / "learning.json"


def runs(args: argparse.Namespace) -> list[Run]:
    """Models take turns, so that a machine that slows down slows all of them; short runs first."""
    corpus = "python" if args.corpus == "python" else str(args.data)
    if not (args.seconds or args.teraflops):
        return planned(corpus, args.eval_bytes)
    return [
        Run(model, corpus, amount, unit, seed, args.eval_bytes)
        for unit in UNITS
        for amount in sorted(getattr(args, unit))
        for seed in range(args.seeds or 3)
        for model in args.models or LEARNERS
    ]


def plot() -> None:
    for (corpus, unit), rows in groups(json.loads(RESULTS.read_text())["rows"]).items():
        if unit == "seconds":
            draw(rows, picture(corpus))
            print(f"drew {picture(corpus)}")
    table.main([])


def main() -> None:
    if sys.argv[1:] == ["plot"]:
        return plot()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="a file of text")
    what.add_argument("--corpus", choices=("python",), help="Python's standard library")
    parser.add_argument("--seconds", type=float, nargs="*", default=[])
    parser.add_argument("--teraflops", type=float, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, help="default: 3")
    parser.add_argument("--models", nargs="+", help=f"default: {' '.join(LEARNERS)}")
    parser.add_argument("--eval-bytes", type=int, default=0, help="of the last tenth; default: all of it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="only say how many runs, and how long they take")
    args = parser.parse_args()
    if (args.seeds or args.models) and not (args.seconds or args.teraflops):
        parser.error("name --seconds or --teraflops")
    for model in args.models or []:
        if model.split()[0] not in LEARNERS:
            parser.error(f"models are {', '.join(LEARNERS)}, not {model!r}")
    if args.data and not args.data.is_file():
        parser.error(f"{args.data} is no file")
    print(estimate(runs(args)), flush=True)
    if args.dry_run:
        return
    measure_all(runs(args), args.results)
    print(f"wrote {args.results}")


if __name__ == "__main__":
    main()
