"""Plots of a run as PNG files: loss, learning rate, gradient norm, compression, how decided routers are, and the cutoff
of a ChunkLM."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hnet.disk import replacing
from hnet.errors import MissingPath, UserError, user_path
from hnet.metrics_log import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
Table = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (steps, values)
Panels = list[tuple[str, list[Callable[["Axes"], None]]]]  # (file name, what to draw in each panel from the top)

# Okabe and Ito's colours: told apart under every common kind of colour blindness, and in grey by their dashes.
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442",
)  # fmt: skip
STAGE_COLORS = (BLUE, ORANGE, GREEN, PINK, SKY)
EVENT_COLORS = ("#000000", PINK, GREEN, ORANGE, SKY, YELLOW)
DASHES = ("-", "--", "-.", ":", (0, (1, 3)), (0, (5, 1, 1, 1)))

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.6,
}


def plot_run(run_dir: str | Path, out_dir: str | Path | None = None) -> list[Path]:
    """Draw what `run_dir`/metrics.jsonl holds into `out_dir` (default: `run_dir`/plots).

    Returns the files written: of loss.png, learning_rate.png, gradient_norm.png, compression.png, decisiveness.png and
    cutoff.png those whose data exist.

    Raises:
        FileNotFoundError: run_dir holds no metrics.jsonl.
        ValueError: metrics.jsonl holds nothing to plot.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise MissingPath(f"{run_dir} is not a run directory: it holds no metrics.jsonl")
    written = plot_rows(read_metrics(path), Path(out_dir) if out_dir is not None else path.parent / "plots")
    if not written:
        raise UserError(f"{path} holds nothing to plot: no line with a step and a loss")
    return written


def plot_rows(rows: list[Row], out_dir: Path, figures: Callable[[Table], Panels] | None = None) -> list[Path]:
    """`plot_run` for lines already read; makes out_dir only if there is something to draw. figures: default
    `run_figures`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = [(float(r["step"]), str(r["event"])) for r in rows if "event" in r and _number(r.get("step"))]
    rows = [r for r in rows if "event" not in r and _number(r.get("step"))]
    written: list[Path] = []
    with matplotlib.rc_context(STYLE):
        for name, panels in (figures or run_figures)(_table(rows)):
            if not panels:
                continue
            height = 3.4 if len(panels) == 1 else 2.6 * len(panels)
            figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
            for i, (ax, draw) in enumerate(zip(axes, panels, strict=True)):
                draw(ax)
                _mark(ax, events, labelled=i == 0)
                if ax.get_legend_handles_labels()[0]:
                    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
            axes[-1].set_xlabel("step")
            written.append(out_dir / name)
            with user_path(written[-1], "write"):
                out_dir.mkdir(parents=True, exist_ok=True)
                with replacing(written[-1]) as unfinished:
                    figure.savefig(unfinished)
    return written


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """(n,) centred running mean; windows are cut short at both ends, so nothing is made up there."""
    half = min(window // 2, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / np.maximum(high - low, 1)


def column(rows: list[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines where `name` is a finite number, in step order; the last line of a step wins."""
    found = {float(r["step"]): float(r[name]) for r in rows if _number(r.get(name))}
    steps = sorted(found)
    return np.array(steps), np.array([found[s] for s in steps])


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _table(rows: list[Row]) -> Table:
    """Every column with a finite number."""
    names = dict.fromkeys(k for r in rows for k in r)
    return {n: c for n in names if len((c := column(rows, n))[0])}


def _get(table: Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    return table.get(name, (np.zeros(0), np.zeros(0)))


def _stages(table: Table, key: str) -> list[int]:
    return sorted(int(m[1]) for n in table if (m := re.fullmatch(rf"stage(\d+)/{key}", n)))


def _has(table: Table, *names: str) -> bool:
    return any(n in table for n in names)


def run_figures(table: Table) -> Panels:
    """(file name, what to draw in each panel from the top); no panels: no data for that file."""

    def panels(*pairs: tuple[bool, Callable[[Table, Axes], None]]) -> list[Callable[[Axes], None]]:
        return [partial(draw, table) for there, draw in pairs if there]

    return [
        (
            "loss.png",
            panels(
                (_has(table, "bpb", "ce", "loss", "val_bpb", "val_ce"), _draw_loss),
                (_has(table, "ratio_loss") or bool(_stages(table, "ratio_loss")), _draw_ratio_loss),
            ),
        ),
        ("learning_rate.png", panels((_has(table, "lr") or bool(_stages(table, "lr")), _draw_lr))),
        ("gradient_norm.png", panels((_has(table, "grad_norm") or bool(_stages(table, "grad_norm")), _draw_grad))),
        (
            "compression.png",
            panels(
                (bool(_stages(table, "bytes_per_chunk")), _draw_compression),
                (bool(_stages(table, "F") or _stages(table, "G")), _draw_rates),
            ),
        ),
        (
            "decisiveness.png",
            panels(
                (bool(_stages(table, "p_on") or _stages(table, "p_off")), _draw_probabilities),
                *((bool(_stages(table, name)), draw) for name, draw in SHARES.items()),
            ),
        ),
        ("cutoff.png", panels((_has(table, "cutoff"), _draw_cutoff), (_has(table, "cutoff"), _draw_bins))),
    ]


def line(ax: Axes, table: Table, name: str, label: str, color: str, dash: Any = "-", raw: bool = True) -> None:
    """The smoothed series, over the raw one drawn faintly."""
    steps, values = _get(table, name)
    if not len(steps):
        return
    window = max(len(values) // 50, 1)
    if raw and window > 1:
        ax.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
    dot = "." if len(steps) < 3 else None
    ax.plot(steps, smooth(values, window), color=color, linestyle=dash, label=label, marker=dot)


def _draw_loss(table: Table, ax: Axes) -> None:
    """Bits per byte when logged, else cross entropy, else the loss; a foreign log may have only one of them."""
    choices = (
        ("bpb", "val_bpb", "bits per byte"),
        ("ce", "val_ce", "cross entropy (nats)"),
        ("loss", "val_ce", "loss"),
    )
    train, held_out, unit = next(((t, v, u) for t, v, u in choices if _has(table, t)), choices[0])
    if not _has(table, train) and not _has(table, held_out):
        held_out, unit = "val_ce", "cross entropy (nats)"
    line(ax, table, train, "train", BLUE)
    steps, values = _get(table, held_out)
    if len(steps):
        ax.plot(steps, values, "o", color=RED, markersize=5, label="held out")
    _, trained = _get(table, train)
    if len(trained) > 20:  # the first steps of a run would flatten everything after them
        low = min(trained.min(), values.min()) if len(values) else trained.min()
        high = np.quantile(trained[len(trained) // 20 :], 0.99)
        ax.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    ax.set_ylabel(unit)


def _draw_stages(table: Table, ax: Axes, name: str, label: str) -> None:
    """A line for each stage that has `name`, or the run's own where no stage has."""
    stages = _stages(table, name)
    for i in stages:
        line(ax, table, f"stage{i}/{name}", f"stage {i}", _color(i), _dash(i))
    if not stages:
        line(ax, table, name, label, BLUE)


def _draw_ratio_loss(table: Table, ax: Axes) -> None:
    _draw_stages(table, ax, "ratio_loss", "ratio loss")
    ax.set_ylabel("ratio loss")


def _draw_lr(table: Table, ax: Axes) -> None:
    stages = _stages(table, "lr")
    for i in stages:
        ax.plot(*_get(table, f"stage{i}/lr"), color=_color(i), linestyle=_dash(i), label=f"stage {i}")
    if not stages:
        ax.plot(*_get(table, "lr"), color=BLUE)
    ax.set_ylabel("learning rate")
    ax.set_ylim(bottom=0)


def _draw_grad(table: Table, ax: Axes) -> None:
    _draw_stages(table, ax, "grad_norm", "all")
    if any(np.max(np.asarray(line.get_ydata(), dtype=float), initial=0.0) > 0 for line in ax.lines):
        ax.set_yscale("log")
    ax.set_ylabel("gradient norm")


def _draw_compression(table: Table, ax: Axes) -> None:
    """Bytes per chunk count from the bytes, targets from one stage to the next: a stage's line is their product."""
    product: Any = 1.0
    for i in _stages(table, "bytes_per_chunk"):
        line(ax, table, f"stage{i}/bytes_per_chunk", f"stage {i}", _color(i), _dash(i))
        steps, target = _get(table, f"stage{i}/target")
        if not len(steps) or (not np.isscalar(product) and len(product) != len(target)):
            continue
        product = product * target
        ax.plot(steps, product, color=_color(i), linestyle=":", linewidth=1.2, label=f"target of stage {i}")
    ax.set_ylabel("bytes per chunk")


def _draw_rates(table: Table, ax: Axes) -> None:
    for i in sorted({*_stages(table, "F"), *_stages(table, "G")}):
        line(ax, table, f"stage{i}/F", f"F, stage {i}", _color(i), "-")
        line(ax, table, f"stage{i}/G", f"G, stage {i}", _color(i), "--", raw=False)
    ax.set_ylim(0, None)
    ax.set_ylabel("F: boundaries\nG: mean probability")


def _draw_probabilities(table: Table, ax: Axes) -> None:
    """The closer the two lines of a stage, the less decided its router."""
    ax.axhspan(0.4, 0.6, color="#888888", alpha=0.15, linewidth=0, label="undecided")
    for i in sorted({*_stages(table, "p_on"), *_stages(table, "p_off")}):
        line(ax, table, f"stage{i}/p_on", f"on boundaries, stage {i}", _color(i), "-")
        line(ax, table, f"stage{i}/p_off", f"elsewhere, stage {i}", _color(i), "--")
    ax.set_ylim(0, 1)
    ax.set_ylabel("mean boundary\nprobability")


def _draw_share(table: Table, ax: Axes, name: str, unit: str) -> None:
    _draw_stages(table, ax, name, name)
    ax.set_ylabel(unit)


SHARES: dict[str, Callable[[Table, Axes], None]] = {
    "undecided": partial(_draw_share, name="undecided", unit="share of positions\nwith |p - 1/2| < 0.1"),
    "G_minus_F": partial(_draw_share, name="G_minus_F", unit="G - F"),
    "flips": partial(_draw_share, name="flips", unit="flips: boundaries moved\nsince last evaluation"),
}


def _draw_cutoff(table: Table, ax: Axes) -> None:
    name = next((n for n in ("ce", "loss") if _has(table, n)), "loss")
    line(ax, table, name, "train", BLUE)
    steps, cutoffs = _get(table, "cutoff")
    for s, low, high in [(s, a, b) for s, a, b in zip(steps[1:], cutoffs, cutoffs[1:], strict=False) if b != a]:
        ax.axvline(s, color="#888888", linewidth=0.9)
        ax.annotate(
            f"{low:g} → {high:g}", (s, 1), xycoords=("data", "axes fraction"), xytext=(3, -3), fontsize=9,
            textcoords="offset points", va="top", rotation=90, color="#444444",
        )  # fmt: skip
    ax.set_ylabel("loss" if name == "loss" else "cross entropy (nats)")


def _draw_bins(table: Table, ax: Axes) -> None:
    steps, cutoffs = _get(table, "cutoff")
    ax.step(steps, cutoffs, where="post", color=BLUE)
    ax.set_ylabel("cutoff (bins)")
    ax.set_ylim(bottom=0)


def _mark(ax: Axes, events: list[tuple[float, str]], labelled: bool) -> None:
    """A vertical line at each event; one entry of the legend for each kind."""
    kinds = sorted({name for _, name in events})
    for step, name in events:
        i = kinds.index(name)
        ax.axvline(step, color=EVENT_COLORS[i % len(EVENT_COLORS)], linestyle=_dash(i + 1), linewidth=1.1, alpha=0.9)
    if labelled:
        for i, name in enumerate(kinds):
            count = sum(n == name for _, n in events)
            label = name.replace("_", " ") + (f" (×{count})" if count > 1 else "")
            ax.plot([], [], color=EVENT_COLORS[i % len(EVENT_COLORS)], linestyle=_dash(i + 1), label=label)


def _color(i: int) -> str:
    return STAGE_COLORS[i % len(STAGE_COLORS)]


def _dash(i: int) -> Any:
    return DASHES[i % len(DASHES)]
