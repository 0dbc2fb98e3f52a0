"""Reading a folder that is large: `python -m benchmarks.data_streaming [--megabytes 2000] [--results NAME]`.

Generates text in Parquet and in JSONL, half the size each, in a temporary folder, and makes the packs of one epoch from
each, from the moment the folder is opened:

    memory            all documents in memory (stream = off), one process
    hf stream         the same files through Hugging Face `datasets` as one shard; left out where it is not installed
    stream, 1 reader  row groups and ranges of lines, 48 shards read by one process
    stream, 4 readers 48 shards read by four processes, each its own twelve

Every contender runs in fresh processes. rows/s and MB/s are of all readers together and include the opening; peak RSS
is of the largest reader, above what the imports took. The generated files are in the page cache: this measures reading
and packing, not the disk. Results go to benchmarks/results/data.json with machine, date and command.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .harness import RESULTS, machine

FILES, ROW_GROUP, PACK, SEQ_LEN = 8, 1000, 32768, 1024
SEED, HELD = 0, 0.01


@dataclass
class Config:
    """Of `hnet.data.sources.open_data`."""

    data: list[Any]
    stream: str
    pattern: str = "*"
    exclude: list[str] = field(default_factory=list)
    val_data: list[str] = field(default_factory=list)
    val_fraction: float = HELD
    documents: str = "file"
    text_key: str = "text"
    shards: int = 48
    shuffle_bytes: int = 32 << 20
    eval_bytes: int = 1 << 16
    seed: int = SEED


def peak_rss() -> int:
    """Bytes. Linux's getrusage would count what the parent had before this program began."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def generate(folder: Path, kind: str, size: int) -> dict[str, int]:
    """Files of documents of about 3 kB, words drawn as in a language (Zipf); what they hold."""
    rng = np.random.default_rng(SEED)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 10))) for _ in range(20_000)]
    pool = " ".join(words[i] for i in (rng.zipf(1.3, 2_000_000) - 1) % len(words))
    rows = total = 0
    for f in range(FILES):
        texts, mine = [], 0
        while mine < size // FILES:
            length = int(np.clip(rng.lognormal(7.6, 0.9), 50, 100_000))
            begin = int(rng.integers(0, len(pool) - length))
            texts.append(f"{rows + len(texts)} {pool[begin : begin + length]}")
            mine += len(texts[-1])
        if kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pa.table({"id": np.arange(len(texts)), "text": texts})
            pq.write_table(table, folder / f"part-{f}.parquet", row_group_size=ROW_GROUP)
        else:
            with (folder / f"part-{f}.jsonl").open("w") as out:
                out.writelines(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts))
        rows, total = rows + len(texts), total + mine
    return {"rows": rows, "bytes": total, "disk": sum(p.stat().st_size for p in folder.iterdir())}


def read(data: str, stream: str, positions: int, rank: int, readers: int) -> dict[str, float]:
    """One reader's part of an epoch, in this process."""
    from hnet.data.pack_stream import PackStream
    from hnet.data.sources import open_data

    before = peak_rss()
    begin = time.perf_counter()
    source, _ = open_data(Config([data], stream), lambda _: None)
    packs = PackStream(source, SEQ_LEN, PACK, SEED, rank, readers, 48 if stream == "on" else 1)
    next(packs)
    first = time.perf_counter() - begin
    count = positions // (PACK * readers)
    for _ in range(count - 1):
        next(packs)
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds, "first_pack_seconds": first, "bytes": count * PACK, "shards": packs.shards,
        "peak_rss": peak_rss() - before, "imports_rss": before,
    }  # fmt: skip


def race(name: str, data: str, stream: str, readers: int, made: dict[str, int]) -> dict[str, Any]:
    positions = int((1 - HELD) * (made["bytes"] + made["rows"]))
    processes = []
    for rank in range(readers):
        job = json.dumps([data, stream, positions, rank, readers])
        command = [sys.executable, "-m", "benchmarks.data_streaming", "--read", job]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    outs = [p.communicate()[0] for p in processes]
    if any(p.returncode for p in processes):
        raise RuntimeError(f"{name}: a reader ended with exit code {[p.returncode for p in processes]}")
    found = [json.loads(out.splitlines()[-1]) for out in outs]
    seconds = max(f["seconds"] for f in found)
    rate = sum(f["bytes"] for f in found) / seconds
    return {
        "name": name, "readers": readers, "shards": found[0]["shards"], "seconds": seconds,
        "first_pack_seconds": max(f["first_pack_seconds"] for f in found), "mb_per_second": rate / 1e6,
        "rows_per_second": rate * made["rows"] / made["bytes"],
        "peak_rss_mb": max(f["peak_rss"] for f in found) / 1e6, "imports_rss_mb": found[0]["imports_rss"] / 1e6,
    }  # fmt: skip


def measure(megabytes: float) -> list[dict[str, Any]]:
    rows = []
    for kind in ("parquet", "jsonl"):
        with tempfile.TemporaryDirectory() as name:
            made = generate(Path(name), kind, int(megabytes * 1e6 / 2))
            builder = "json" if kind == "jsonl" else kind
            contenders = [("memory", name, "off", 1)]
            if importlib.util.find_spec("datasets"):
                contenders.append(("hf stream", f"hf:{builder}?data_files={name}/*.{kind}", "off", 1))
            contenders += [("stream, 1 reader", name, "on", 1), ("stream, 4 readers", name, "on", 4)]
            for contender in contenders:
                rows.append({"kind": kind, **made, **race(*contender, made)})
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_streaming")
    parser.add_argument("--megabytes", type=float, default=2000, help="of text, half in Parquet and half in JSONL")
    parser.add_argument("--results", default="data", help="name of the file in benchmarks/results; '' writes none")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(*json.loads(args.read))))
        return
    rows = measure(args.megabytes)
    if args.results:
        about = machine() | {"command": f"python -m benchmarks.data_streaming --megabytes {args.megabytes:g}"}
        (RESULTS / f"{args.results}.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
