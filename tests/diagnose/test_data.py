"""Passes, batch, split, throughput."""

import numpy as np
import pytest

from .logs import after, findings, healthy_rows, write_run


def corpus(tmp_path, size, name="train.txt"):
    path = tmp_path / name
    path.write_bytes(np.random.default_rng(len(name)).integers(97, 122, size, dtype=np.uint8).tobytes())
    return str(path)


def test_passes(tmp_path):
    """400 steps of 32768 bytes are 13.1 MB."""
    small, fair, large = (corpus(tmp_path, n, f"{n}.txt") for n in (500_000, 5_000_000, 50_000_000))
    f = findings(write_run(tmp_path / "a", healthy_rows(), data=[small], val_data=[corpus(tmp_path, 9999, "v.txt")]))
    assert "26 passes" in f["many_passes"].title
    found = findings(write_run(tmp_path / "b", healthy_rows(), data=[fair], preset="laptop"))
    assert not {"many_passes", "few_passes"} & found.keys()
    found = findings(write_run(tmp_path / "c", healthy_rows(), data=[large], preset="laptop"))
    assert found["few_passes"].severity == "note"
    assert "28 %" in found["few_passes"].title
    assert "many_passes" in findings(write_run(tmp_path / "d", [], data=[small]) / "config.toml")  # planned ones


def test_epochs_of_a_foreign_log(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("\n".join(f"{{'loss': {3 - s / 100}, 'epoch': {s / 5}}}" for s in range(1, 100)))
    assert "20 passes" in findings(path)["many_passes"].title
    path.write_text("\n".join(f"{{'loss': {3 - s / 100}, 'epoch': {s / 50}}}" for s in range(1, 100)))
    assert "many_passes" not in findings(path)


def test_few_bytes_for_the_model(tmp_path):
    assert "few_bytes" in findings(write_run(tmp_path / "a", healthy_rows(), preset="hnet_1stage_L"))
    assert "few_bytes" not in findings(write_run(tmp_path / "b", healthy_rows(), preset="tiny"))


def test_small_batch(tmp_path):
    rows = healthy_rows()
    rng = np.random.default_rng(3)
    for r in after(rows, 0):
        r["ce"] *= 1 + 0.2 * rng.standard_normal()
    f = findings(write_run(tmp_path / "a", rows))["small_batch"]
    assert f.severity == "warning"
    factor = f.keys["batch_bytes"] / 32768
    assert factor in (16, 32)  # (0.2 / 0.05)^2 and the noise of its estimate


@pytest.mark.parametrize(("sequences", "told"), [(1, True), (3, True), (8, False)])
def test_few_sequences_and_some_noise(sequences, told, tmp_path):
    """7 % of scatter is usual at 8 sequences, and too much where it comes of one."""
    rows = healthy_rows()
    rng = np.random.default_rng(3)
    for r in after(rows, 0):
        r["ce"] *= 1 + 0.063 * rng.standard_normal()
    found = findings(write_run(tmp_path / "a", rows, batch_bytes=1024 * sequences))
    assert ("small_batch" in found) is told
    if told:
        assert found["small_batch"].keys["batch_bytes"] >= 8 * 1024


def test_another_trainers_batch(tmp_path):
    log = tmp_path / "log.csv"
    rng = np.random.default_rng(0)
    log.write_text("step,loss\n" + "".join(f"{s},{2 + 0.15 * rng.standard_normal()}\n" for s in range(200)))
    for text, told in (("micro_batch_size: 1\n", True), ("micro_batch_size: 1\ngrad_accum: 16\n", False)):
        (tmp_path / "config.yaml").write_text(text)
        assert ("small_batch" in findings(log)) is told


@pytest.mark.parametrize(("last", "told"), [(200, True), (105, False)])
def test_data_in_order_of_length(last, told, tmp_path):
    rows = healthy_rows()
    for r in after(rows, 0):
        length = 100 + (last - 100) * r["step"] / 400 + 5 * np.sin(r["step"])
        r["stage0/chunks_per_sequence"] = length / r["stage0/bytes_per_chunk"]
    assert ("data_order" in findings(write_run(tmp_path / "a", rows))) is told


def test_the_same_batches(tmp_path):
    """13.1 MB are read of 50: what is learnt by heart came several times, which another kind of text is not."""
    large = tmp_path / "large.txt"
    with large.open("wb") as f:
        f.truncate(50_000_000)
    data = [str(large)]
    rows = healthy_rows()
    for r in after(rows, 0):
        if "val_ce" in r:
            r["val_ce"] = 3 + abs(r["step"] - 100) / 100
        r["ce"] = 5.5 * np.exp(-r["step"] / 40)
    found = findings(write_run(tmp_path / "a", rows, data=data))
    assert found["same_batch"].severity == "critical"
    assert "split_shift" not in found
    for r in after(rows, 0):
        r["ce"] = 0.7 * max(3 - r["step"] / 200, 1)
        if "val_ce" in r:
            r["val_ce"] = max(3 - r["step"] / 200, 1)
    found = findings(write_run(tmp_path / "b", rows, data=data))
    assert "same_batch" not in found
    assert "split_shift" in found


def test_split(tmp_path):
    train, other = corpus(tmp_path, 100_000), corpus(tmp_path, 5000, "other.txt")
    tail = tmp_path / "tail.txt"
    tail.write_bytes((tmp_path / "train.txt").read_bytes()[-20_000:])
    inside = {"data": [train], "preset": "tiny"}
    assert "split_overlap" not in findings(write_run(tmp_path / "a", [], val_data=[other], **inside))
    f = findings(write_run(tmp_path / "b", [], val_data=[train, other], **inside))["split_overlap"]
    assert f.severity == "critical"
    assert "1 files are in data and in val_data" in f.evidence[0]
    f = findings(write_run(tmp_path / "c", [], val_data=[str(tail)], **inside))["split_overlap"]
    assert "ends with the 20000 bytes" in f.evidence[0]


def test_held_out_text_of_another_kind(tmp_path):
    data = [corpus(tmp_path, 20_000_000)]
    rows = healthy_rows()
    assert "split_shift" not in findings(write_run(tmp_path / "a", rows, data=data))
    for r in rows:
        if "val_ce" in r and r["step"]:
            r["val_ce"] *= 1.3
    f = findings(write_run(tmp_path / "b", rows, data=data))["split_shift"]
    assert f.severity == "warning"


def test_throughput(tmp_path):
    rows = healthy_rows()
    for r in after(rows, 300):
        r["bytes_per_second"] /= 2
    f = findings(write_run(tmp_path / "a", rows))["slow"]
    assert f.severity == "warning"
    assert "it stayed slow" in f.evidence[0]
    rows = healthy_rows()
    for r in after(rows, 200)[:60]:
        r["bytes_per_second"] /= 3
    f = findings(write_run(tmp_path / "b", rows))["slow"]
    assert f.severity == "note"
    assert "it came back" in f.evidence[0]


def test_data_wait(tmp_path):
    rows = healthy_rows()
    for r in after(rows, 0):
        r["data_wait_share"] = 0.3
    assert "30 %" in findings(write_run(tmp_path / "a", rows))["data_wait"].evidence[0]
    for r in after(rows, 0):
        del r["data_wait_share"]
        r["data_wait"] = 0.01  # seconds, of steps of 0.5
    assert "data_wait" not in findings(write_run(tmp_path / "b", rows))
    for r in after(rows, 0):
        r["data_wait"] = 0.2
    assert "40 %" in findings(write_run(tmp_path / "c", rows))["data_wait"].evidence[0]
