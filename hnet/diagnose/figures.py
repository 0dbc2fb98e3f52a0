"""The plots of a report: of the log, and of the chunks that the checkpoint makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hnet.disk import replacing
from hnet.errors import user_path
from hnet.plots.run import STAGE_COLORS, STYLE, Panels, Table, line, plot_rows, run_figures
from hnet.segment import segment
from hnet.segment.render import show

from .checkpoint import Material
from .runs import Log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    "loss.png": "loss_curves.png",
    "learning_rate.png": "learning_rates.png",
    "gradient_norm.png": "grad_norms.png",
}
SHOWN, ROW = 800, 100  # bytes of the segmentation that is drawn, and of a line of it
TEXT = 32768  # bytes that chunk lengths are counted in


def plot_log(log: Log, out: Path) -> list[Path]:
    """loss_curves.png (loss and perplexity), learning_rates.png, grad_norms.png, compression.png, decisiveness.png and
    cutoff.png: those whose data exist."""
    return plot_rows(log.rows, out, _figures)


def _figures(table: Table) -> Panels:
    found = [(NAMES.get(name, name), panels) for name, panels in run_figures(table)]
    for i, (name, panels) in enumerate(found):
        if name == NAMES["loss.png"] and any(n in table for n in ("ce", "loss", "bpb", "val_ce", "val_bpb")):
            found[i] = name, [*panels, lambda ax: _draw_perplexity(table, ax)]
    return found


def _draw_perplexity(table: Table, ax: Axes) -> None:
    """exp of the nats a symbol, or of a byte's where only bits a byte are known."""
    own = next((n for n in ("ce", "loss", "bpb") if n in table), None)
    held_out = next((n for n in ("val_ce", "val_bpb") if n in table), None)
    for name, label, color in ((own, "train", STAGE_COLORS[0]), (held_out, "held out", STAGE_COLORS[1])):
        if name:
            steps, values = table[name]
            nats = np.minimum(values * (np.log(2) if name.endswith("bpb") else 1), 50)
            line(ax, {label: (steps, np.exp(nats))}, label, label, color)
    ax.set_yscale("log")
    ax.set_ylabel("perplexity")


def plot_chunks(material: Material, out: Path) -> list[Path]:
    """chunk_lengths.png and sample_segmentation.png, of held-out text."""
    import matplotlib
    from matplotlib.figure import Figure

    found = segment(material.model, material.held_out[:TEXT])
    lengths = [np.diff([*s.starts.tolist(), len(found.text)]) for s in found.stages]
    if not lengths:
        return []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 2.6 * len(lengths)), dpi=150, layout="constrained")
        for i, (ax, sizes) in enumerate(
            zip(figure.subplots(len(lengths), 1, squeeze=False)[:, 0], lengths, strict=True)
        ):
            top = int(np.quantile(sizes, 0.99)) + 1
            ax.hist(sizes, bins=np.arange(0.5, top + 1.5), color=STAGE_COLORS[i % len(STAGE_COLORS)])
            spread = sizes.std() / sizes.mean()
            ax.set_title(f"stage {i}: {len(sizes)} chunks, mean {sizes.mean():.2f} bytes, CV {spread:.2f}", fontsize=10)
            ax.set_ylabel("chunks")
        ax.set_xlabel("bytes of a chunk")
        written = [_save(figure, out / "chunk_lengths.png")]
        written.append(_save(_segmentation(found.text[:SHOWN], found.depth[:SHOWN]), out / "sample_segmentation.png"))
    return written


def _segmentation(text: bytes, depth: np.ndarray) -> Figure:
    """Text in lines of ROW bytes; a chunk's background changes with every chunk of the outermost stage, and a bar
    stands where a chunk of a stage further in begins."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    rows = -(-len(text) // ROW)
    figure = Figure(figsize=(12, 0.26 * rows + 0.2), dpi=120)
    ax = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    shade = np.full(rows * ROW, 2)
    shade[: len(text)] = np.cumsum(depth > 0) % 2
    colors = ListedColormap(["#dbe9f6", "#fbe3c4", "#ffffff"])
    ax.imshow(shade.reshape(rows, ROW), colors, vmin=0, vmax=2, extent=(0, ROW, rows, 0), aspect="auto")
    inner = np.flatnonzero(depth > 1)
    ax.vlines(inner % ROW, inner // ROW, inner // ROW + 1, color="#D55E00", linewidth=1.5)
    for i, byte in enumerate(text):
        sign = show(bytes([byte]))[0] if byte < 128 else "·"
        place = i % ROW + 0.5, i // ROW + 0.5
        ax.text(*place, sign.replace("$", r"\$"), ha="center", va="center", fontsize=7, family="monospace")
    ax.set_xlim(0, ROW)
    ax.set_ylim(rows, 0)
    ax.axis("off")
    return figure


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with user_path(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            figure.savefig(unfinished)
    return path
