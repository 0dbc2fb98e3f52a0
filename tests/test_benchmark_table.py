"""Tables of a GPU's results: rendered only from a results file, and with the right numbers."""

import json

import pytest

from benchmarks import harness, table


def row(direction: str, D: int = 1024, **changes) -> dict:
    return {
        "op": "dechunk", "T": 65536, "D": D, "chunk": 6, "N": 8, "M": 10923, "dtype": "bfloat16", "device": "cuda",
        "direction": direction, "ours": "ours", "bytes": 300_000_000, "copy_bytes": 300_000_000,
        "seconds": {"ours": 1e-4, "copy": 9e-5, "eager scan": 4e-3, "eager blocked": 2e-3, "compile scan": 5e-4},
        "peak_bytes": {"ours": 2_000_000, "eager scan": 9_000_000, "eager blocked": 7_000_000}, **changes,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)

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
        "dechunk", "65536", "1024", "6", "forward", "0.100 ms", "3000", "90 %", "2.00 ms (20.0x)", "0.50 ms (5.0x)", "",
        "2 / 7",
    ]  # fmt: skip
    assert "50 us, 11 kernel launches" in text
    assert "Decode step of 32 sequences, D = 1024: ours 20 us, cuda 10 us." in text
    assert "| 2048 |" not in text  # the README has the headline shape only
    assert "| 2048 |" in table.render("some-gpu")
    assert "| 2048 |" in table.render("gpus-all")
    assert table.update(text) == text


def test_rows_of_the_cpu_stay_out_of_a_gpus_table(results):
    results("some-gpu", [row("forward", op="of the cpu", device="cpu"), row("forward")])
    assert "of the cpu" not in table.render("some-gpu")


def test_slug():
    assert harness.slug("NVIDIA H200") == "nvidia-h200"
    assert harness.slug("NVIDIA GeForce RTX 4090 (Laptop)") == "nvidia-geforce-rtx-4090-laptop"
