"""Markdown tables from benchmarks/results: `python -m benchmarks.table` rewrites them in README.md and docs.

A table stands between `<!-- benchmarks:NAME -->` and `<!-- end -->` and comes from results/NAME.json. The place named
`gpus` holds one section for every results file of a GPU, with the rows of D = 1024 and mean chunk 6 (`gpus-all`: with
every row); it stays empty as long as there is no such file. `chunk_lm` is ChunkLM's training step, `training_*` are
those of `python -m benchmarks.training`, `learning` is that of `python -m benchmarks.learning`, `decisive` that of
`python -m benchmarks.learning.decisive`, `layer_ops`, `scaling` and `decoding` are rows of cpu.json, and `predicted` is
that of `python -m benchmarks.predict`.
`python -m benchmarks.table NAME` prints one table in full (`card`: that of the GPU here).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

from .learning.report import learning_section

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- benchmarks:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = ("eager", "compile", "published")
LAYER_OPS = ("add_rms_norm", "attention", "cross_entropy", "gated_conv", "swiglu")
OURS = ("triton", "cuda")  # backends of ours that race each other


def best(seconds: dict[str, float], kind: str) -> float | None:
    return min((t for name, t in seconds.items() if name.startswith(kind)), default=None)


def of_copy(row: dict) -> float:
    """Share of the copy bandwidth of the same run, in percent."""
    s = row["seconds"]
    return 100 * (row["bytes"] / s[row["ours"]]) / (row["copy_bytes"] / s["copy"])


def against(row: dict, kind: str) -> str:
    t = best(row["seconds"], kind)
    return "" if t is None else f"{1e3 * t:.2f} ms ({t / row['seconds'][row['ours']]:.1f}x)"


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def op_table(rows: list[dict]) -> list[str]:
    lines = [
        "| op | T | dtype | | ours | of copy bandwidth | fastest eager | fastest torch.compile |",
        "|---|--:|---|---|--:|--:|--:|--:|",
    ]
    for r in rows:
        ours = r["seconds"][r["ours"]]
        cells = [r["op"], str(r["T"]), r["dtype"], r["direction"], f"{1e3 * ours:.2f} ms"]
        cells.append(f"{of_copy(r):.0f} %" if r["bytes"] else "")
        lines.append(line([*cells, against(r, "eager"), against(r, "compile")]))
    return lines


def step_table(rows: list[dict]) -> list[str]:
    """A training step of the laptop model; every other setting with how many times longer it takes"""
    others = [name for name in rows[0]["seconds"] if name != "ours"]
    lines = [line(["bytes", "dtype", "ours", *others]), "|--:|---|--:|" + "--:|" * len(others)]
    for r in rows:
        s, ours = r["seconds"], r["seconds"]["ours"]
        cells = [f"{1e3 * s[n]:.0f} ms ({s[n] / ours:.2f}x)" for n in others]
        lines.append(line([str(r["T"]), r["dtype"], f"{1e3 * ours:.0f} ms ({r['T'] / ours / 1e3:.0f} kB/s)", *cells]))
    return lines


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def cpu_section(data: dict) -> str:
    m, rows = data["machine"], data["rows"]
    ops = [r for r in rows if "direction" in r and r["op"] not in LAYER_OPS]
    shape = ops[0]
    about = (
        f"{m['cpu']} ({m['isa']}, {m['threads']} threads), torch {m['torch']}, {m['date']}, memory {m['memory']}. "
        f"D = {shape['D']}, {shape['N']} ragged sequences, mean chunk about 5; medians, one run: "
        f"`{m['command']}`."
    )
    return "\n".join([*op_table(ops), "", about, ""])


def layers_section(data: dict) -> str:
    rows = data["rows"]
    steps = step_table([r for r in rows if r["op"] == "training step" and r["model"] == "laptop"])
    return "\n".join([*steps, "", where(data["machine"]), ""])


def layer_ops_section(data: dict) -> str:
    rows = [r for r in data["rows"] if r["op"] in LAYER_OPS]
    about = "Of attention no bytes are counted: it is bound by arithmetic. " + where(data["machine"])
    return "\n".join([*op_table(rows), "", about, ""]) if rows else ""


def scaling_section(data: dict) -> str:
    rows = [r for r in data["rows"] if "slope" in r]
    lines = ["| over | sizes | ms | slope | expected, at most |", "|---|---|---|--:|--:|"]
    for r in rows:
        ms = " / ".join(f"{1e3 * t:.1f}" for t in r["seconds"].values())
        cells = [r["op"].removeprefix("round trip over "), " / ".join(r["seconds"]), ms]
        lines.append(line([*cells, f"{r['slope']:.2f}", f"{r['most']:g}"]))
    return "\n".join([*lines, "", where(data["machine"]), ""]) if rows else ""


def decoding_section(data: dict) -> str:
    rows = [r for r in data["rows"] if r["op"] == "decoding"]
    return (
        "\n".join([*(x for one in decode_lines(rows) for x in (one, "")), where(data["machine"]), ""]) if rows else ""
    )


def where(m: dict) -> str:
    return f"{m['cpu']} ({m['isa']}, {m['threads']} threads), torch {m['torch']}, {m['date']}: `{m['command']}`."


# --- longer experiments, and ChunkLM ------------------------------------------------------------------------------


def chunk_lm_section(data: dict) -> str:
    lines = ["| windows x bytes | | ms a step |", "|--:|---|--:|"]
    for r in data["rows"]:
        if r.get("model") == "ChunkLM" and r["op"] == "training step":
            for name, t in r["seconds"].items():
                lines.append(line([f"{r['B']} x {r['T']}", name, f"{1e3 * t:.0f}"]))
    return "\n".join([*lines, "", where(data["machine"]), ""])


def rate_section(data: dict) -> str:
    lines = [
        "| target | rate control | bytes per chunk, held out | off | held-out bits per byte |",
        "|--:|---|--:|--:|--:|",
    ]
    for r in data["rows"]:
        cells = [f"{r['target']:g}", r["rate_control"], f"{r['realised']:.2f}", f"{100 * r['off']:+.1f} %"]
        lines.append(line([*cells, f"{r['val_bpb']:.3f}"]))
    return "\n".join([*lines, "", where(data["machine"]), ""])


def curriculum_section(data: dict) -> str:
    """Mean and spread (standard deviation) over the seeds, and of the differences between runs of the same seed."""
    runs = {kind: [r for r in data["rows"] if r["curriculum"] == kind] for kind in ("plateau", "none")}
    lines = ["| curriculum | seconds in steps | steps | raises | held-out bits per byte |", "|---|--:|--:|---|--:|"]
    for kind, rows in runs.items():
        raises = "; ".join(", ".join(f"{step}" for step, _ in r["raises"]) or "-" for r in rows)
        name = "plateau" if kind == "plateau" else "none: full bandwidth"
        steps = mean_and_spread([r["steps"] for r in rows], 0)
        bpb = mean_and_spread([r["val_bpb"] for r in rows], 3)
        lines.append(line([name, f"{rows[0]['seconds']:.0f}", steps, raises if kind == "plateau" else "-", bpb]))
    if len(runs["none"]) > 1:
        full = {r["seed"]: r["val_bpb"] for r in runs["none"]}
        gains = [r["val_bpb"] - full[r["seed"]] for r in runs["plateau"]]
        lines.append(line([f"difference, {len(gains)} seeds", "", "", "", mean_and_spread(gains, 3, "+")]))
    return "\n".join([*lines, "", where(data["machine"]), ""])


def decisive_section(data: dict) -> str:
    """The rows of the same data, target and arm in one line; of where boundaries are, the mean and the worst seed."""
    groups: dict[tuple, list[dict]] = {}
    for r in data["rows"]:
        groups.setdefault((r["data"], r["boundaries_at"], r["steps"], r["target"], r["arm"]), []).append(r)
    lines = [
        "| data, steps | N | | seeds | held-out nats a symbol | bytes a chunk | F / G | p on / off, worst seed | at "
        "spaces or word starts, worst seed | spaces / word starts / second letters / inside words / other |",
        "|---|--:|---|--:|---|--:|---|---|--:|---|",
    ]
    for (name, at, steps, target, arm), rows in sorted(groups.items(), key=lambda g: (order(g[0][0]), g[0][3])):
        where = [[r["boundaries"][k] for k in r["boundaries"]] for r in rows]
        values = [r["val_ce"] for r in rows]
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(rows) > 1 else ""
        weights = [
            f"{k.partition('_')[0]} {v[0]:g}" for k, v in rows[0]["settings"].items() if "weight" in k and any(v)
        ]
        cells = [f"{name}{'' if at == 'any' else ', ' + at}, {steps}", f"{target:g}"]
        held = ", share held" if rows[0]["settings"].get("surprisal_gain") else ""
        cells += [(" + ".join(weights) or arm) + held, str(len(rows))]
        cells += [f"{mean(values):.3f}{spread}", f"{mean(r['bytes_per_chunk'] for r in rows):.2f}"]
        cells += [f"{mean(r['F'] for r in rows):.3f} / {mean(r['G'] for r in rows):.3f}"]
        cells += [f"{min(r['p_on'] for r in rows):.2f} / {max(r['p_off'] for r in rows):.2f}"]
        cells += [f"{100 * min(w[0] + w[1] for w in where):.0f} %"]
        cells += [" / ".join(f"{mean(column):.2f}" for column in zip(*where, strict=True))]
        lines.append(line(cells))
    m = data["machine"]
    about = f"{m['cpu']} ({m['isa']}, 1 thread), torch {m['torch']}, {rows[0]['date']}; each row's command is in "
    return "\n".join([*lines, "", about + "`benchmarks/results/decisive.json`.", ""])


def order(name: str) -> int:
    known = ["tinyshakespeare", "tinyshakespeare-ngrams", "python", "telugu"]
    return known.index(name) if name in known else len(known)


def mean_and_spread(values: list[float], digits: int, sign: str = "") -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{spread}"


# --- what the GPU kernels should cost -----------------------------------------------------------------------------


def predicted_section(data: dict) -> str:
    """With a column for every GPU whose replays of the same shape have been measured."""
    rows, m = data["rows"], data["machine"]
    cards = gpu_results()
    head = ["op", "", "least MB", "MB as written", "launches", "registers x warps", "warps on an SM", "predicted µs"]
    head += [f"measured µs, {card['machine']['gpu']}" for card in cards]
    lines = [line(head), "|---|---|" + "--:|" * (len(head) - 2)]
    for r in rows:
        launches = r["launches"]
        cells = [
            r["op"],
            r["direction"],
            f"{r['minimal_bytes'] / 1e6:.0f}",
            f"{r['bytes'] / 1e6:.0f}",
            str(len(launches)),
        ]
        cells += [", ".join(f"{x['registers']} x {x['warps']}" for x in launches)]
        cells += [", ".join(str(x["resident"]) for x in launches), f"{1e6 * r['seconds']:.0f}"]
        lines.append(line([*cells, *(replay_of(r, card["rows"]) for card in cards)]))
    shape = rows[0]
    about = (
        f"**Predicted{'' if cards else ', none of it measured'}**, at T = {shape['T']}, D = {shape['D']}, mean chunk "
        f"{shape['chunk']}, {shape['dtype']}, {shape['N']} sequences, a budget, a gradient to come: from the bytes as "
        f"written, at {m['share']:g} of the {m['bandwidth'] / 1e12:g} TB/s that a copy moves on an H200, and at least "
        f"{1e6 * m['least']:g} µs a launch. As written: every tensor that a launch reads or writes, once. Registers of "
        f"a thread x warps of a block, and how many warps fit on a multiprocessor, of 64: as compiled for "
        f"{m['target']} by Triton {m['triton']}."
    )
    if any(r["op"] == "mamba2" for r in rows):
        about += " The products of a mamba2 layer take time besides."
    return "\n".join([*lines, "", about, ""])


def replay_of(row: dict, measured: list[dict]) -> str:
    same = [
        r for r in measured
        if r["op"] == f"{row['op']}, replayed" and all(r[k] == row[k] for k in ("direction", "T", "D", "chunk"))
    ]  # fmt: skip
    return f"{1e6 * same[0]['seconds'][same[0]['ours']]:.0f}" if same else ""


SECTIONS = {"chunk_lm": ("chunk_lm", chunk_lm_section), "training_rate": ("training_rate", rate_section),
            "training_curriculum": ("training_curriculum", curriculum_section),
            "layers": ("layers", layers_section), "learning": ("learning", learning_section),
            "decisive": ("decisive", decisive_section), "layer_ops": ("cpu", layer_ops_section),
            "scaling": ("cpu", scaling_section), "decoding": ("cpu", decoding_section),
            "predicted": ("predicted", predicted_section)}  # fmt: skip


# --- GPU ----------------------------------------------------------------------------------------------------------


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


def decode_lines(rows: list[dict]) -> list[str]:
    lines = []
    for r in rows:
        if "D" in r:
            text = ", ".join(f"{name} {1e6 * t:.0f} us" for name, t in r["seconds"].items())
            lines.append(f"{r['op'].capitalize()} of {r['B']} sequences, D = {r['D']}: {text}.")
        else:
            text = ", ".join(f"{name} {r['B'] / t:.0f} bytes/s" for name, t in r["seconds"].items())
            lines.append(f"{r['op'].capitalize()} {r['B']} sequences with {r['model']}, {r['dtype']}: {text}.")
    return lines


def headline(row: dict) -> bool:
    return row["op"] == "training step" or (row["D"] == 1024 and row["chunk"] == 6)


def gpu_section(data: dict, full: bool) -> str:
    m, rows = data["machine"], [r for r in data["rows"] if r.get("device") == "cuda"]
    timed = [r for r in rows if "direction" in r]
    ops = [r for r in timed if not r["op"].endswith(", replayed")]
    replays = [r for r in timed if r["op"].endswith(", replayed")]
    steps = [r for r in rows if r["op"] == "training step"]
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
        for found, make in ((ops, gpu_table), (replays, replay_table), (steps, train_table))
        if found
    ]
    return "\n".join([f"### {m['gpu']}", "", *(x for t in tables for x in (*t, "")), about, "", *lines])


def gpu_results() -> list[dict]:
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json")) if ".unfinished" not in p.name]
    return [data for data in found if "gpu" in data["machine"]]


def gpu_sections(full: bool) -> str:
    sections = [gpu_section(data, full) for data in gpu_results()]
    return "\n".join(["", "## Speed on a GPU", "", *sections]) if sections else ""


def render(name: str) -> str:
    if name in ("gpus", "gpus-all"):
        return gpu_sections(full=name == "gpus-all")
    if name in SECTIONS:
        file, section = SECTIONS[name]
        return section(load(file)) if (RESULTS / f"{file}.json").is_file() else ""
    data = load(name)
    return gpu_section(data, full=True) if "gpu" in data["machine"] else cpu_section(data)


def update(text: str) -> str:
    return MARK.sub(lambda m: m[1] + render(m[2]) + m[3], text)


def main(names: list[str]) -> int:
    for name in names:
        if name == "card":
            import torch

            from .harness import slug

            name = slug(torch.cuda.get_device_name())
        print(render(name))
    if names:
        return 0
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        if (new := update(text)) != text:
            path.write_text(new)
            print(f"updated {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
