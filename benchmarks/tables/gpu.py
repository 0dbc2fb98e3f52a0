"""One section for every results file of a GPU."""

from __future__ import annotations

from .decoding import decode_lines
from .files import gpu_results
from .markdown import KINDS, against, line, of_copy
from .peers import peers_table

OURS = ("triton", "cuda")  # backends of ours that race each other


def peak(row: dict) -> str:
    """MB above the inputs: ours, and the least of the others."""
    peaks = row.get("peak_bytes") or {}
    others = [b for name, b in peaks.items() if name != row["ours"] and name not in OURS]
    if row["ours"] not in peaks:
        return ""
    return f"{peaks[row['ours']] / 1e6:.0f}" + (f" / {min(others) / 1e6:.0f}" if others else "")


def gpu_table(rows: list[dict]) -> list[str]:
    lines = [
        "| op | T | D | chunk | | ours | GB/s | of copy | in a graph | eager | torch.compile | published | peak MB |",
        "|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        ours = r["seconds"][r["ours"]]
        cells = [r["op"], *(str(r[k]) for k in ("T", "D", "chunk")), r["direction"], f"{1e3 * ours:.3f} ms"]
        cells += [
            f"{r['bytes'] / ours / 1e9:.0f}",
            f"{of_copy(r):.0f} %",
            in_a_graph(r),
            *(against(r, kind) for kind in KINDS),
            peak(r),
        ]
        lines.append(line(cells))
    return lines


def in_a_graph(row: dict) -> str:
    """Ours without the host"""
    t = row["seconds"].get("graph")
    return "" if t is None else f"{1e3 * t:.3f} ms ({of_copy({**row, 'ours': 'graph'}):.0f} %)"


def replay_table(rows: list[dict]) -> list[str]:
    """Ours alone; where an op has two routes, both."""
    lines = ["| replayed | T | D | | us | of copy | triton us | cuda us |", "|---|--:|--:|---|--:|--:|--:|--:|"]
    for r in rows:
        s = r["seconds"]
        cells = [r["op"].removesuffix(", replayed"), str(r["T"]), str(r["D"]), r["direction"]]
        cells += [f"{1e6 * s[r['ours']]:.0f}", f"{of_copy(r):.0f} %"]
        lines.append(line([*cells, *(f"{1e6 * s[b]:.0f}" if b in s else "" for b in ("triton", "cuda"))]))
    return lines


def train_table(rows: list[dict]) -> list[str]:
    lines = [
        "| training step | bytes | | ms | MB/s | MFLOP a byte | MFU | peak GB | bytes a chunk |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        for name, t in r["seconds"].items():
            mfu, peak, chunk = (r[k][name] for k in ("mfu", "peak_bytes", "bytes_per_chunk"))
            cells = [r["model"], str(r["T"]), name, f"{1e3 * t:.1f}", f"{r['T'] / t / 1e6:.2f}"]
            cells += [f"{r['flops_per_byte'][name] / 1e6:.1f}", "" if mfu is None else f"{100 * mfu:.1f} %"]
            cells += ["" if peak is None else f"{peak / 1e9:.1f}", "" if chunk is None else f"{chunk:.1f}"]
            lines.append(line(cells))
        lines += [
            line([r["model"], str(r["T"]), name, f"left out: {why}", *[""] * 5]) for name, why in r["left_out"].items()
        ]
    return lines


def graph_lines(rows: list[dict]) -> list[str]:
    return [
        f"{r['op'].capitalize()}, T = {r['T']}, D = {r['D']}, forward and backward: "
        f"{1e6 * r['seconds'][r['ours']]:.0f} us, {r['kernels']} kernel launches."
        for r in rows
    ]


def headline(row: dict) -> bool:
    return row["op"] in ("training step", "peers") or (row["D"] == 1024 and row["chunk"] == 6)


def gpu_section(data: dict, full: bool) -> str:
    m, rows = data["machine"], [r for r in data["rows"] if r.get("device") == "cuda"]
    timed = [r for r in rows if "direction" in r and r["op"] != "peers"]
    ops = [r for r in timed if not r["op"].endswith(", replayed")]
    replays = [r for r in timed if r["op"].endswith(", replayed")]
    steps, peers = ([r for r in rows if r["op"] == op] for op in ("training step", "peers"))
    copy = [r["copy_bytes"] / r["seconds"]["copy"] / 1e9 for r in timed]
    about = (
        f"{m['gpu']}, driver {m['driver']}, CUDA {m['cuda']}, torch {m['torch']}, triton {m['triton']}, "
        f"Python {m['python']}, {m['date']}: `{m['command']}`. bf16, ragged sequences; medians, cold cache, forward "
        f"and backward timed apart. Every input counts once and every output once; a copy of as many bytes in the same "
        f"run moved up to {max(copy, default=0):.0f} GB/s. In a graph: the same kernels without the host that launches "
        f"them. Peak MB: ours / the least of the others."
    )
    single = graph_lines([r for r in rows if "kernels" in r]) + decode_lines([r for r in rows if "B" in r])
    lines = [x for one in single for x in (one, "")]  # a paragraph each
    tables = [
        make([r for r in found if full or headline(r)])
        for found, make in ((ops, gpu_table), (replays, replay_table), (steps, train_table), (peers, peers_table))
        if found
    ]
    return "\n".join([f"### {m['gpu']}", "", *(x for t in tables for x in (*t, "")), about, "", *lines])


def gpu_sections(full: bool) -> str:
    sections = [gpu_section(data, full) for data in gpu_results()]
    return "\n".join(["", "## Speed on a GPU", "", *sections]) if sections else ""
