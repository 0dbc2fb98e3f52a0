"""PNG files of a run."""

import json
import struct
import zlib

import numpy as np
import pytest

from hnet.plots.run import column, plot_run, smooth


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def rows(n=60, **more):
    return [{"step": s, "loss": 3 - s / n, "ce": 2 - s / n, "bpb": 3 - s / n, **more} for s in range(1, n + 1)]


def pixels(path):
    """(height, width, 4) uint8 of a PNG as matplotlib writes them."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, packed, width, height = 8, b"", 0, 0
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        if kind == b"IHDR":
            width, height, depth, color = struct.unpack(">IIBB", data[at + 8 : at + 18])
            assert (depth, color) == (8, 6)
        packed += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 4 * width)
    return height, width, lines


def test_all_plots_of_a_run(tmp_path):
    run = write(
        tmp_path / "run",
        [
            {"step": 0, "val_bpb": 8.0, "val_ce": 5.5},
            *rows(
                ratio_loss=1.0, grad_norm=0.5, lr=1e-3,
                **{"stage0/F": 0.2, "stage0/G": 0.3, "stage0/p_on": 0.6, "stage0/p_off": 0.4, "stage1/p_on": 0.9,
                   "stage0/undecided": 0.3, "stage0/G_minus_F": 0.1,
                   "stage0/bytes_per_chunk": 5.0, "stage0/target": 4.0,
                   "stage1/F": 0.3, "stage1/bytes_per_chunk": 15.0, "stage1/target": 3.0,
                   "stage0/ratio_loss": 1.0, "stage0/grad_norm": 0.4, "stage1/grad_norm": 0.1,
                   "stage0/lr": 2e-3, "stage1/lr": 1e-3, "cutoff": 128},
            ),
            {"step": 30, "event": "loss_spike", "message": "x"},
            {"step": 40, "event": "rollback"},
            {"step": 60, "loss": 2.0, "val_bpb": 2.5, "cutoff": 256, "unknown": "key",
             "stage0/flips": 0.1},
        ],
    )  # fmt: skip
    written = plot_run(run)
    names = ["loss.png", "learning_rate.png", "gradient_norm.png", "compression.png", "decisiveness.png"]
    names.append("cutoff.png")
    assert written == [run / "plots" / n for n in names]
    for path in written:
        height, width, lines = pixels(path)
        assert height >= 400
        assert width >= 800
        assert len(np.unique(lines)) > 20  # something is drawn


def test_only_plots_whose_data_exist(tmp_path):
    run = write(tmp_path / "run", rows(5))
    assert [p.name for p in plot_run(run, tmp_path / "out")] == ["loss.png"]
    run = write(tmp_path / "run", [{"step": 1, "lr": 1e-3}, {"step": 2, "lr": 1e-3}])
    assert [p.name for p in plot_run(run, tmp_path / "out2")] == ["learning_rate.png"]


def test_decisiveness_is_drawn_from_what_there_is(tmp_path):
    """A log without the probabilities, and one with nothing else; what is drawn depends on the numbers."""
    run = write(tmp_path / "flips", [{"step": s, "stage0/flips": 0.1} for s in (5, 10)])
    assert [p.name for p in plot_run(run)] == ["decisiveness.png"]
    heights = []
    for i, p_off in enumerate((0.4, 0.05)):
        run = write(tmp_path / str(i), [{"step": s, "stage0/p_on": 0.6, "stage0/p_off": p_off} for s in range(1, 9)])
        (path,) = plot_run(run)
        heights.append(pixels(path))
    assert heights[0][0] == heights[1][0]
    assert not np.array_equal(heights[0][2], heights[1][2])


def test_nulls_zeros_and_single_points_are_fine(tmp_path):
    more = {"grad_norm": 0.0, "stage0/grad_norm": None, "stage0/F": None, "lr": 0.0}
    run = write(tmp_path / "run", [{"step": 1, "loss": None, "val_bpb": 3.0, **more}])
    assert [p.name for p in plot_run(run)] == ["loss.png", "learning_rate.png", "gradient_norm.png"]


def test_events_are_drawn(tmp_path):
    plain = plot_run(write(tmp_path / "a", rows()))[0]
    marked = plot_run(write(tmp_path / "b", [*rows(), {"step": 30, "event": "rollback", "message": ""}]))[0]
    assert not np.array_equal(pixels(plain)[2], pixels(marked)[2])


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        plot_run(tmp_path)
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_run(write(tmp_path / "run", [{"step": 1, "note": "x"}]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_column_and_smooth():
    at, v = column([{"step": 2, "x": 1.0}, {"step": 1, "x": 5}, {"step": 2, "x": 3.0}, {"step": 3, "x": None}], "x")
    assert list(at) == [1, 2]
    assert list(v) == [5, 3]
    v = np.arange(7.0) ** 2
    expected = [v[max(0, i - 2) : i + 3].mean() for i in range(7)]
    assert smooth(v, 5) == pytest.approx(expected)
    assert list(smooth(v, 1)) == list(v)
    assert len(smooth(np.zeros(0), 9)) == 0
