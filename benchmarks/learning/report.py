"""Tables and curves of `python -m benchmarks.learning`, from its results alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from hnet.plots.run import STAGE_COLORS, STYLE

DOCS = Path(__file__).parents[2] / "docs"
Row = dict[str, Any]


def spread(values: list[float]) -> str:
    """'1.532 (1.529 to 1.536)'"""
    low, high = min(values), max(values)
    return f"{mean(values):.3f}" + (f" ({low:.3f} to {high:.3f})" if len(values) > 1 else "")


def groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """By corpus and unit, in order of appearance."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["corpus"], row["unit"]), []).append(row)
    return found


def names(rows: list[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def of_length(rows: list[Row], amount: float) -> list[Row]:
    return [r for r in rows if r["amount"] == amount]


def table(rows: list[Row]) -> list[str]:
    """A line for each amount of training and model, over the seeds; the last column compares with our H-Net by seed."""
    lines = [
        f"| {rows[0]['unit']} | model | held-out nats a byte, mean (range) | seeds | steps | kB/s | MFLOP a byte | "
        "behind `hnet`, by seed |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for amount in sorted(names(rows, "amount")):
        here = [r for r in rows if r["amount"] == amount]
        first = {r["seed"]: r["val"] for r in here if r["model"] == "hnet"}
        for model in sorted(names(here, "model"), key=lambda name: name != "hnet"):
            own = [r for r in here if r["model"] == model]
            behind = [r["val"] - first[r["seed"]] for r in own if r["seed"] in first]
            rate = mean(r["bytes"] / r["seconds"] for r in own) / 1e3
            cost = 1e6 * sum(r["teraflops"] for r in own) / sum(r["bytes"] for r in own)
            cells = [
                f"{amount:g}", f"`{model}`", spread([r["val"] for r in own]), str(len(own)),
                f"{mean(r['steps'] for r in own):.0f}", f"{rate:.1f}", f"{cost:.2f}",
                f"{min(behind):+.3f} to {max(behind):+.3f}" if behind and model != "hnet" else "",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def learning_section(data: dict[str, Any]) -> str:
    m, out = data["machine"], [""]
    for (corpus, unit), rows in groups(data["rows"]).items():
        own = [
            f"{r['model']} {r['parameters'] / 1e6:.2f}M parameters, {r['context']} bytes of context"
            for r in {r["model"]: r for r in rows}.values()
        ]
        sizes = f"{rows[0]['train_bytes']:,} bytes to learn from, {rows[0]['held_out_bytes']:,} held out and scored"
        out += [f"### {corpus}, equal {unit}", "", f"{sizes}. {'; '.join(own)}.", "", *table(rows), ""]
        if unit == "seconds":
            out += [f"![What is held out, against seconds of training]({picture(corpus).name})", ""]
    out.append(f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, {m['date']}: `{m['command']}`.")
    return "\n".join([*out, ""])


def picture(corpus: str) -> Path:
    return DOCS / f"learning_{corpus}.png"


def draw(rows: list[Row], path: Path) -> None:
    """The runs of the greatest length that most models have, on their way, the rate decaying to its end: mean over
    seeds, and every seed."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        longest = max(names(rows, "amount"), key=lambda n: (len(names(of_length(rows, n), "model")), n))
        for i, model in enumerate(names(of_length(rows, longest), "model")):
            own = [r["curve"] for r in of_length(rows, longest) if r["model"] == model]
            for curve in own:
                axes.plot([p[0] for p in curve], [p[-1] for p in curve], "o", ms=3.5, color=STAGE_COLORS[i])
            means = [[mean(values) for values in zip(*points, strict=True)] for points in zip(*own, strict=True)]
            axes.plot([p[0] for p in means], [p[-1] for p in means], color=STAGE_COLORS[i], label=model)
        axes.set_xlabel(f"seconds of training, of {longest:g}")
        axes.set_ylabel("held-out nats a byte")
        axes.legend()
        figure.savefig(path, metadata={"Software": None})
