"""What is predicted of the GPU kernels is what they are given: launches and bytes, counted here by hand."""

import pytest

pytest.importorskip("triton")

from benchmarks import predict
from benchmarks.shapes import Shape

SHAPE = Shape(4096, 512, 8, 4)
T, D, M, N = 4096, 512, 512, 4


@pytest.fixture(scope="module")
def traced():
    return predict.traced(SHAPE)


def test_launches_of_an_op(traced):
    found = {name: [launch.kernel for launch in launches] for name, (_, _, launches) in traced.items()}
    assert found["pool", "forward"] == ["pool_boundary_fwd"]
    assert found["dechunk", "forward"] == ["dechunk_fwd"]
    assert len(found["route, dropping half", "forward"]) > len(found["route", "forward"])
    assert ("dechunk, fp32 residual", "backward") in found
    assert all(found.values())


def test_bytes_by_hand(traced):
    minimal, written, _ = traced["pool", "forward"]
    layout = 4 * M + 2 * 4 * (N + 1)  # chunk_start, cu_chunks, cu_seqlens
    assert written == [2 * (2 * M * D) + layout]
    assert minimal == 2 * (2 * M * D) + 4 * M
    rows = 2 * T * D + 2 * M * D + 2 * T * D + 4 * M * D  # residual, z, out, y
    assert rows < sum(traced["dechunk", "forward"][1]) < 1.05 * rows
    rows = 2 * T * D + 4 * T * D + 2 * M * D  # dout, the residual's gradient in fp32, dz; and y and sums, twice each
    assert rows + 4 * 4 * M * D < sum(traced["dechunk, fp32 residual", "backward"][1]) < 1.1 * (rows + 4 * 4 * M * D)


def test_nothing_is_written_in_fewer_bytes_than_it_takes(traced):
    for name, (minimal, written, _) in traced.items():
        most = 12 if name[0] == "mamba2" else 4  # the states of every chunk, in fp32
        assert 0.99 * minimal <= sum(written) < most * max(minimal, 1000), name


def test_rows_and_time(monkeypatch):
    monkeypatch.setattr(predict, "usage", lambda kernel, D: predict.Usage(80, 4, 24))
    monkeypatch.setattr(predict, "ProcessPoolExecutor", InOneProcess)
    rows = {(r["op"], r["direction"]): r for r in predict.predict(SHAPE)}
    loss = rows["ratio_loss", "forward"]
    assert loss["seconds"] == predict.LEAST * len(loss["launches"])
    assert loss["launches"][0] == {
        "kernel": "ratio_loss_batch", "bytes": loss["bytes"], "registers": 80, "warps": 4, "resident": 24,
    }  # fmt: skip
    large = {(r["op"], r["direction"]): r for r in predict.predict(Shape(131072, 1024, 8))}["pool", "backward"]
    assert large["seconds"] == pytest.approx(large["bytes"] / (0.85 * 4.3e12))


def test_registers_of_a_kernel():
    found = predict.usage("ratio_loss_batch", 1)
    assert 0 < found.registers <= 255
    assert found.warps == 2
    assert found.resident % 2 == 0


class InOneProcess:
    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    map = staticmethod(map)
