"""`python -m benchmarks.faulty_runs`: make the runs, judge them, write the confusion table."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch

from ..harness import RESULTS, machine
from ..tables.faulty_runs import faulty_runs_section
from .faults import FAULTS, HEALTHY, UNSEEN
from .judge import folder, judge, make_all
from .texts import write_texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faulty_runs", description=__doc__)
    parser.add_argument("--runs", type=Path, help="where runs are made, and found by a later call; default: nowhere")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these runs; nothing is written to the results")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS / "faulty_runs.json")
    args = parser.parse_args(argv)
    runs = [r for r in (*FAULTS, *UNSEEN, *HEALTHY[::-1]) if not args.only or r.name in args.only]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.runs or Path(temporary)
        write_texts(root / "texts")
        torch.set_num_threads(1)
        shares = [runs[i :: args.processes] for i in range(args.processes)]
        if args.processes == 1:
            make_all(runs, root, root / "texts")
        else:
            context = multiprocessing.get_context("spawn")
            workers = [context.Process(target=make_all, args=(s, root, root / "texts")) for s in shares]
            for w in workers:
                w.start()
            for w in workers:
                w.join()
        rows = [judge(r, root) for r in runs if (folder(root, r) / ".done").exists()]
    about = machine() | {"command": "python -m benchmarks.faulty_runs"}
    data = {"machine": about, "seconds": round(time.perf_counter() - begin), "rows": rows}
    print(faulty_runs_section(data))
    if not args.only:
        args.results.write_text(json.dumps(data, indent=1) + "\n")
    return 0 if len(rows) == len(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
