"""Tables of a GPU's results: rendered only from a results file, and with the right numbers."""

import json

import pytest

from benchmarks import harness, table
from benchmarks.tables import files


def row(direction: str, D: int = 1024, **changes) -> dict:
    return {
        "op": "dechunk", "T": 65536, "D": D, "chunk": 6, "N": 8, "M": 10923, "dtype": "bfloat16", "device": "cuda",
        "direction": direction, "ours": "ours", "bytes": 300_000_000, "copy_bytes": 300_000_000,
        "seconds": {
            "ours": 1e-4, "graph": 9.5e-5, "copy": 9e-5, "eager scan": 4e-3, "eager blocked": 2e-3,
            "compile scan": 5e-4,
        },
        "peak_bytes": {"ours": 2_000_000, "eager scan": 9_000_000, "eager blocked": 7_000_000}, **changes,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RESULTS", tmp_path)

    def write(name: str, rows: list[dict]) -> None:
        machine = dict.fromkeys(("driver", "cuda", "torch", "triton", "python", "date", "command"), "x")
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": {"gpu": "Some GPU", **machine}, "rows": rows}))

    return write


PLACE = "before\n<!-- benchmarks:gpus -->\nold\n<!-- end -->\nafter\n"


def test_no_results_no_section(results):
    assert table.update(PLACE) == "before\n<!-- benchmarks:gpus -->\n<!-- end -->\nafter\n"
    results("some-gpu.unfinished", [row("forward")])
    assert "Some GPU" not in table.update(PLACE)


def test_numbers_of_a_row(results):
    graph = row("", op="round trip in a CUDA graph", seconds={"ours": 5e-5}, kernels=11)
    del graph["direction"]
    step = {"op": "decode step", "device": "cuda", "B": 32, "D": 1024, "seconds": {"ours": 2e-5, "cuda": 1e-5}}
    results("some-gpu", [row("forward"), row("backward", D=2048), graph, step])
    text = table.update(PLACE)
    assert "### Some GPU" in text
    cells = [c.strip() for c in next(x for x in text.splitlines() if x.startswith("| dechunk")).split("|")[1:-1]]
    assert cells == [
        "dechunk", "65536", "1024", "6", "forward", "0.100 ms", "3000", "90 %", "0.095 ms (95 %)", "2.00 ms (20.0x)",
        "0.50 ms (5.0x)", "", "2 / 7",
    ]  # fmt: skip
    assert "50 us, 11 kernel launches" in text
    assert "Decode step of 32 sequences, D = 1024: ours 20 us, cuda 10 us." in text
    assert "| 2048 |" not in text  # the README has the headline shape only
    assert "| 2048 |" in table.render("some-gpu")
    assert "| 2048 |" in table.render("gpus-all")
    assert table.update(text) == text


def cells_of(text: str, start: str) -> list[list[str]]:
    return [[c.strip() for c in x.split("|")[1:-1]] for x in text.splitlines() if x.startswith(f"| {start}")]


def test_replays_and_training_steps(results):
    replay = row("forward", op="route, dropping half, replayed", seconds={"ours": 1e-4, "cuda": 9e-5, "copy": 9e-5})
    step = {
        "op": "training step", "model": "laptop", "T": 8192, "L": 1024, "device": "cuda", "ours": "eager",
        "seconds": {"eager": 4e-3, "captured": 2e-3}, "flops_per_byte": {"eager": 5e6, "captured": 5.1e6},
        "mfu": {"eager": 0.01, "captured": None}, "peak_bytes": {"eager": 2e9, "captured": 2.5e9},
        "bytes_per_chunk": {"eager": 4.04, "captured": None}, "left_out": {"compiled": "it broke"},
    }  # fmt: skip
    decoding = {
        "op": "decoding",
        "model": "laptop",
        "device": "cuda",
        "B": 32,
        "dtype": "bfloat16",
        "seconds": {"ours": 1e-3},
    }
    prefill = {**decoding, "op": "prefill", "B": 4, "length": 512, "seconds": {"ours": 1e-2}}
    results("some-gpu", [replay, step, decoding, prefill])
    text = table.update(PLACE)
    assert cells_of(text, "route") == [["route, dropping half", "65536", "1024", "forward", "100", "90 %", "", "90"]]
    assert cells_of(text, "laptop") == [
        ["laptop", "8192", "eager", "4.0", "2.05", "5.0", "1.0 %", "2.0", "4.0"],
        ["laptop", "8192", "captured", "2.0", "4.10", "5.1", "", "2.5", ""],
        ["laptop", "8192", "compiled", "left out: it broke", "", "", "", "", ""],
    ]
    assert "Decoding 32 sequences with laptop, bfloat16: ours 32000 bytes/s." in text
    assert "Prefill, 4 x 512 bytes, with laptop, bfloat16: ours 204800 bytes/s." in text


def test_predictions_stand_beside_what_was_measured(results, tmp_path):
    launch = {"kernel": "k", "bytes": 10, "registers": 80, "warps": 4, "resident": 24}
    made = {
        "op": "dechunk", "direction": "forward", "T": 65536, "D": 1024, "chunk": 6, "N": 8, "dtype": "bfloat16",
        "minimal_bytes": 290e6, "bytes": 335e6, "seconds": 92e-6, "launches": [launch, {**launch, "registers": 96}],
    }  # fmt: skip
    machine = {"triton": "3", "target": "sm_90", "bandwidth": 4.3e12, "share": 0.85, "least": 2.5e-6}
    (tmp_path / "predicted.json").write_text(json.dumps({"machine": machine, "rows": [made]}))
    place = PLACE.replace("gpus", "predicted")
    text = table.update(place)
    want = ["dechunk", "forward", "290", "335", "2", "80 x 4, 96 x 4", "24, 24", "92"]
    assert cells_of(text, "dechunk") == [want]
    assert "**Predicted, none of it measured**" in text
    results("some-gpu", [row("forward", op="dechunk, replayed"), row("backward", op="dechunk, replayed")])
    text = table.update(place)
    assert cells_of(text, "dechunk") == [[*want, "100"]]
    assert "measured µs, Some GPU" in text
    assert "none of it measured" not in text


def test_rows_of_the_cpu_stay_out_of_a_gpus_table(results):
    results("some-gpu", [row("forward", op="of the cpu", device="cpu"), row("forward")])
    assert "of the cpu" not in table.render("some-gpu")


def test_slug():
    assert harness.slug("NVIDIA H200") == "nvidia-h200"
    assert harness.slug("NVIDIA GeForce RTX 4090 (Laptop)") == "nvidia-geforce-rtx-4090-laptop"
