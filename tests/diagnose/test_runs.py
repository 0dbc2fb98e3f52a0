"""Reading: every format into one table."""

import json

import numpy as np
import pytest

from hnet.diagnose.names import canonical
from hnet.diagnose.runs import read_log

from .logs import healthy_rows, write_run


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def test_our_run(tmp_path):
    rows = healthy_rows(50)
    rows.insert(20, {"step": 19, "event": "loss_spike", "message": "rolled back"})
    rows[30]["loss"] = None
    rows[31]["a_key_of_tomorrow"] = [1, 2]
    log = read_log(write_run(tmp_path / "run", rows, a_key_of_tomorrow="x"))
    assert log.kind == "run"
    assert len(log.step) == 51
    assert log.last_step == 50
    assert log.total_steps == 400
    assert log.config["a_key_of_tomorrow"] == "x"
    assert log.config["weight_decay"] == 0.1  # a default, though the file lacks it
    assert [(e.step, e.name, e.message, e.row) for e in log.events] == [(19, "loss_spike", "rolled back", 20)]
    assert log.non_finite == {"loss": [29]}
    assert len(log.series("loss")[0]) == 49
    assert len(log.series("ce")[0]) == 50
    assert log.stages("F") == [0]
    assert log.stages("grad_norm") == [0, 1]
    at, val = log.series("val_ce")
    assert list(at) == [0, 20, 40]
    assert val[0] == 5.6


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", healthy_rows(30))
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 31, "loss": 2.')
    assert read_log(run).last_step == 30


def test_a_step_logged_twice_counts_once_in_series_and_twice_in_the_table(tmp_path):
    rows = [{"step": s, "loss": v} for s, v in ((1, 3.0), (2, 2.5), (3, 2.2), (2, 2.4), (3, 2.1))]
    log = read_log(write(tmp_path, "metrics.jsonl", "\n".join(map(json.dumps, rows))))
    assert list(log.step) == [1, 2, 3, 2, 3]
    at, v = log.series("loss")
    assert list(at) == [1, 2, 3]
    assert list(v) == [3.0, 2.4, 2.1]


LOGS = {
    "nanoGPT": (
        "tokens per iteration will be: 12,288\nstep 0: train loss 4.2874, val loss 4.2823\n"
        "iter 0: loss 4.2663, time 18.66ms, mfu -100.00%\niter 10: loss 3.2006, time 12.00ms, mfu 3.10%\n"
        "step 250: train loss 2.1, val loss 2.25\niter 250: loss 2.11, time 13.5ms, mfu 3.1%\n",
        {"step": [0, 10, 250], "loss": [4.2874, 3.2006, 2.1], "val_ce": [4.2823, None, 2.25],
         "step_ms": [18.66, 12, 13.5]},
    ),
    "torchtitan": (
        "\x1b[32m[rank0]:[titan] 2026-05-18 16:04:46,338 - root - INFO - \x1b[31mstep: 14  \x1b[32mloss:  3.24405  "
        "grad_norm:  0.8319  memory:  9.46GiB(64.99%)  tps: 7,282  tflops: 0.52  mfu: 0.17%\x1b[39m\n"
        "[titan] 2026-05-18 16:04:47,456 - root - INFO - step: 15  loss:  3.10680  grad_norm: 0.8587  tps: 12,334\n",
        {"step": [14, 15], "loss": [3.24405, 3.1068], "grad_norm": [0.8319, 0.8587],
         "tokens_per_second": [7282, 12334]},
    ),
    "HF Trainer": (
        "  1%|          | 10/1000 [00:01<01:00]\r{'loss': 2.3, 'grad_norm': 1.5, 'learning_rate': 1e-4, 'epoch': 0.1}\n"
        "{'loss': '2.1', 'grad_norm': 'nan', 'learning_rate': '9e-5', 'epoch': '0.2'}\n"
        "{'eval_loss': 2.05, 'eval_runtime': 1.5, 'epoch': 0.2}\n"
        "{'loss': nan, 'grad_norm': 1.2, 'learning_rate': 8e-05, 'epoch': 0.3}\n",
        {"step": [1, 2, 3], "loss": [2.3, 2.1, None], "lr": [1e-4, 9e-5, 8e-5], "grad_norm": [1.5, None, 1.2],
         "val_ce": [None, 2.05, None], "epoch": [0.1, 0.2, 0.3]},
    ),
    "Megatron": (
        " [2024-01-01 10:00:00] iteration      100/  500000 | consumed samples:        1600 | elapsed time per "
        "iteration (ms): 250.1 | learning rate: 1.500E-04 | batch size: 16 | lm loss: 6.1E+00 | grad norm: 1.2 |\n"
        " [2024-01-01] iteration      200/  500000 | learning rate: 1.400E-04 | lm loss: 5.5E+00 | grad norm: 1 |\n",
        {"step": [100, 200], "loss": [6.1, 5.5], "lr": [1.5e-4, 1.4e-4], "grad_norm": [1.2, 1.0]},
    ),
    "llm.c": (
        "step    1/19560 | loss 10.990 (+nanz)| norm 15.36 (+nanz)| lr 8.57e-07 | 2000.1 ms | 55.1% bf16 MFU\n"
        "step    2/19560 | loss 10.5 (+1.2z)| norm 14.1 (-0.3z)| lr 1.71e-06 | 1900 ms\n",
        {"step": [1, 2], "loss": [10.99, 10.5], "grad_norm": [15.36, 14.1], "lr": [8.57e-7, 1.71e-6]},
    ),
    "nanochat": (
        "Step 00000 | Validation bpb: 3.2\nstep 00000/21400 (0.00%) | loss: 9.2 | lrm: 1.0 | dt: 1200.00ms | "
        "tok/sec: 435,000 | mfu: 45.0\nstep 00001/21400 (0.00%) | loss: 8.9 | dt: 1100.00ms | tok/sec: 440,000\n",
        {"step": [0, 1], "val_bpb": [3.2, None], "loss": [9.2, 8.9], "tokens_per_second": [435e3, 440e3],
         "step_ms": [1200, 1100]},
    ),
    "our console": (
        "step 100/1000  loss 2.318  bpb 2.632  bytes/chunk 4.25  26.1 kB/s  ETA 0:40\n"
        "step 250: held-out bits per byte 2.201\n"
        "step 250/1000  loss 2.1  bpb 2.2  bytes/chunk 4.10, 9.8  26.1 kB/s  ETA 1:00\n",
        {"step": [100, 250], "loss": [2.318, 2.1], "bpb": [2.632, 2.2], "stage0/bytes_per_chunk": [4.25, 4.1],
         "val_bpb": [None, 2.201]},
    ),
    "key=value": (
        "2024-01-01 INFO global_step=5 train/loss=3.25 lr=2e-4 F=0.31 G=0.29 ratio_loss=1.01 stage1/F=0.2\n"
        "2024-01-01 INFO global_step=6 train/loss=inf lr=2e-4 F=0.30 G=0.29 ratio_loss=1.0 stage1/F=0.2\n",
        {"step": [5, 6], "loss": [3.25, None], "lr": [2e-4, 2e-4], "stage0/F": [0.31, 0.3], "stage0/G": [0.29, 0.29],
         "ratio_loss": [1.01, 1.0], "stage1/F": [0.2, 0.2]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGS)
def test_printed_logs(name, tmp_path):
    text, expected = LOGS[name]
    log = read_log(write(tmp_path, "train.log", text))
    assert log.kind == "text"
    assert list(log.step) == expected.pop("step")
    for column, values in expected.items():
        got = [None if np.isnan(v) else v for v in log.columns[column]]
        assert got == pytest.approx(values), column


def chunk_lm(epochs, start=0, per_epoch=30, cutoffs=(128, 128, 256)):
    lines = []
    for e in range(start, epochs):
        if e and cutoffs[e] > cutoffs[e - 1]:
            lines.append(f"\nEpoch {e} 🚀 CUTOFF RAISED: {cutoffs[e - 1]} -> {cutoffs[e]} (loss plateaued)")
        for s in range(10, per_epoch + 1, 10):
            lines.append(f"  step {s}/{per_epoch} loss={3 - 0.3 * e - 0.005 * s:.4f} lr=2.0e-4 cutoff={cutoffs[e]}")
        lines.append(f"Epoch {e + 1} avg_loss={3 - 0.3 * e:.2f} cutoff={cutoffs[e]}/1025")
    return lines


def test_chunk_lm_epochs_are_put_end_to_end(tmp_path):
    log = read_log(write(tmp_path, "train.log", "\n".join(chunk_lm(3))))
    assert list(log.step) == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert [(e.step, e.name) for e in log.events] == [(60, "cutoff_raised")]
    assert list(log.series("cutoff")[1]) == [128] * 6 + [256] * 3
    assert log.columns["steps_per_epoch"][0] == 30
    assert log.series("epoch_loss")[1] == pytest.approx([3, 2.7, 2.4])


def test_chunk_lm_resumed_with_a_stale_epoch_goes_back(tmp_path):
    lines = [*chunk_lm(3), "Resumed chunklm_ckpt.pt", *chunk_lm(2, start=1)]
    log = read_log(write(tmp_path, "train.log", "\n".join(lines)))
    assert "resume" in [e.name for e in log.events]
    assert list(log.step) == [10, 20, 30, 40, 50, 60, 70, 80, 90, 40, 50, 60]
    assert list(log.columns["cutoff"][8:10]) == [256, 128]


def test_a_log_that_begins_in_the_middle(tmp_path):
    log = read_log(write(tmp_path, "train.log", "\n".join(chunk_lm(3, start=1))))
    assert list(log.step) == [40, 50, 60, 70, 80, 90]


def test_steps_that_go_on_over_the_epochs(tmp_path):
    lines = [
        f"step {s}/90 loss={3 - s / 100}" + f"\nEpoch {s // 30} avg_loss=1" * (s % 30 == 0) for s in range(10, 91, 10)
    ]
    log = read_log(write(tmp_path, "train.log", "\n".join(lines)))
    assert list(log.step) == [10, 20, 30, 40, 50, 60, 70, 80, 90]


def test_chunk_lm_epoch_lines_alone(tmp_path):
    text = "Epoch 1 avg_loss=2.86 cutoff=128/1025\nEpoch 2 avg_loss=2.5 cutoff=256/1025\n"
    log = read_log(write(tmp_path, "train.log", text))
    assert list(log.step) == [1, 2]
    assert list(log.columns["loss"]) == [2.86, 2.5]
    assert list(log.columns["cutoff"]) == [128, 256]


def test_csv_and_tensorboard_exports(tmp_path):
    log = read_log(write(tmp_path, "a.csv", "step,train_loss,learning_rate\n1,3.5,1e-3\n2,3.25,\n"))
    assert log.kind == "csv"
    assert list(log.columns["loss"]) == [3.5, 3.25]
    assert log.columns["lr"][0] == 1e-3
    assert np.isnan(log.columns["lr"][1])
    folder = tmp_path / "tb"
    folder.mkdir()
    write(folder, "run-a-tag-train_loss.csv", "Wall time,Step,Value\n1.0,0,4.0\n2.0,10,3.0\n")
    write(folder, "run-a-tag-eval_loss.csv", "Wall time,Step,Value\n2.0,10,3.1\n")
    log = read_log(folder)
    assert list(log.step) == [0, 10]
    assert list(log.columns["loss"]) == [4.0, 3.0]
    assert log.series("val_ce")[1] == [3.1]
    log = read_log(write(tmp_path, "scalars.csv", "Wall time,Step,Value\n1.0,5,4.0\n"))
    assert list(log.columns["loss"]) == [4.0]


def test_trainer_state_and_foreign_json_lines(tmp_path):
    state = {"best_metric": None, "log_history": [
        {"epoch": 0.1, "learning_rate": 1e-4, "loss": 2.5, "step": 10}, {"epoch": 0.2, "eval_loss": 2.4, "step": 10},
        {"epoch": 0.2, "loss": 2.25, "step": 20}, {"train_runtime": 12.0, "total_flos": 1e9}]}  # fmt: skip
    log = read_log(write(tmp_path, "trainer_state.json", json.dumps(state, indent=1)))
    assert list(log.step) == [10, 10, 20]
    assert list(log.series("loss")[1]) == [2.5, 2.25]
    assert log.series("val_ce")[1] == [2.4]
    lines = '{"iter": 3, "train/loss": 2.0, "val/loss": 2.1}\n{"iter": 4, "train/loss": NaN}\n'
    log = read_log(write(tmp_path, "wandb.jsonl", lines))
    assert list(log.columns["loss"][:1]) == [2.0]
    assert log.non_finite == {"loss": [4]}


def test_config_alone_and_a_run_that_has_not_begun(tmp_path):
    run = write_run(tmp_path / "run", [])
    assert read_log(run).kind == "config"
    log = read_log(run / "config.toml")
    assert log.kind == "config"
    assert log.config["steps"] == 400
    assert len(log.step) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("novel.txt", b"It was the best of times, in 1859, it was the worst.\n", "no training log recognised"),
        ("model.bin", b"\0\1\2\3", "is not text"),
        ("events.out.tfevents.1", b"x", "TensorBoard event file"),
        ("config.toml", b"steps = ", "is not TOML"),
        ("empty.jsonl", b"", "no training log recognised"),
    ],
)
def test_unreadable(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        read_log(path)
    assert name in str(e.value)


def test_missing_and_ambiguous_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_log(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        read_log(tmp_path)
    write(tmp_path, "a.log", "step 1 loss 2")
    assert read_log(tmp_path).columns["loss"] == [2]
    write(tmp_path, "b.log", "step 1 loss 3")
    with pytest.raises(ValueError, match="several logs"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("name", "ours"),
    [("Train Loss", "loss"), ("train/loss", "loss"), ("eval_loss", "val_ce"), ("Validation loss", "val_ce"),
     ("F", "stage0/F"),
     ("stage2/bytes_per_chunk", "stage2/bytes_per_chunk"), ("f", None), ("memory", None), ("lr", "lr")],
)  # fmt: skip
def test_names(name, ours):
    assert canonical(name) == ours


LINES = "".join(f"step {s} loss {3 - s / 100}\n" for s in range(50))
TABLE = "step;loss\n" + "".join(f"{s};{3 - s / 100:.2f}\n" for s in range(50))


@pytest.mark.parametrize(
    "data",
    [
        ("\ufeff" + TABLE).encode(),
        TABLE.replace(".", ",").encode(),  # a decimal comma
        LINES.encode("utf-16"),
        ("x" * 100_000 + "\n" + LINES).encode(),  # a line that no pattern must try to read whole
    ],
    ids=["byte order mark", "decimal comma", "UTF-16", "a long line"],
)
def test_other_peoples_files(data, tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(data)
    steps, loss = read_log(path).series("loss")
    assert steps.tolist() == list(range(50))
    assert loss == pytest.approx(3 - steps / 100)


def test_noise_is_no_log(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(np.random.default_rng(0).integers(1, 256, 20_000, dtype=np.uint8).tobytes())
    with pytest.raises(ValueError, match="not text"):
        read_log(path)


def test_seconds_are_no_milliseconds(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(LINES.replace("\n", ", dt: 0.25s\n"))
    assert set(read_log(path).series("step_ms")[1]) == {250.0}


def test_numbers_with_a_broken_byte_are_left_out(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(LINES.encode().replace(b"2.7", b"\xff2.7").replace(b"step 40", b"step 4\xfe"))
    steps, loss = read_log(path).series("loss")
    assert loss == pytest.approx(3 - steps / 100)
    assert 20 < len(steps) < 50
