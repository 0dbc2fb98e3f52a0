"""Tables of ops and layers on a CPU, how they scale, and of whole training steps: README.md, docs/benchmarks.md."""

from __future__ import annotations

from .markdown import against, line, of_copy, where

LAYER_OPS = ("add_rms_norm", "attention", "cross_entropy", "gated_conv", "swiglu")


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


def cpu_section(data: dict) -> str:
    m, rows = data["machine"], data["rows"]
    ops = [r for r in rows if "direction" in r and r["op"] not in (*LAYER_OPS, "peers")]
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
