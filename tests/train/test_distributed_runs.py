"""Whole runs of two processes: with the same numbers on both, killed and resumed, and their checkpoints read by other
numbers of processes."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch

from hnet import HNetForCausalLM
from hnet.data.pack_stream import PackStream
from hnet.data.sources import open_data
from hnet.train.checkpoint import latest_checkpoint, load_trainer
from hnet.train.config import TrainConfig
from hnet.train.loop import Trainer

from .conftest import tiny
from .processes import RUN, found, job, run, state_of
from .test_resume import equal, same_runs


@pytest.fixture(scope="module")
def ran(tmp_path_factory, one_thread):
    """(folder, base config): every run that ends by itself, in one pair of processes."""
    folder = tmp_path_factory.mktemp("runs")
    base = tiny(folder / "run")
    alone = Trainer(dataclasses.replace(base, **RUN, out=str(folder / "alone")))  # unsharded, for fsdp to start from
    alone.train()
    torch.save(state_of(alone), folder / "alone.pt")
    jobs = []
    for p in ("ddp", "fsdp"):
        c = dataclasses.replace(base, **RUN, parallel=p, out=str(folder / f"straight-{p}"))
        jobs.append(job(f"straight-{p}", c, "train"))
    c = dataclasses.replace(base, **RUN, parallel="fsdp", out=str(folder / "alone"))
    jobs.append(job("spread", c, "load", resume="latest"))
    jobs.append(job("streamed", streamed(base, folder), "train"))
    assert run(folder, jobs) == [0, 0]
    return folder, base


def streamed(base: TrainConfig, folder: Path) -> TrainConfig:
    """A run on two sources of 2 MiB and more, read in two shards; a window is a few documents."""
    data: list = []
    for name, weight in (("a", 1.0), ("b", 3.0)):
        rows = ({"text": f"{name}{i} " * (20 + i % 30)} for i in range(17_000))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        data.append({"path": str(folder / f"{name}.jsonl"), "weight": weight})
    return dataclasses.replace(
        base, data=data, pattern="*", stream="on", shards=2, shuffle_bytes=1000, out=str(folder / "streamed")
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_have_the_same_rows_biases_and_weights(ran, parallel):
    first, second = (found(ran[0], f"straight-{parallel}", rank) for rank in (0, 1))
    assert len(first["rows"]) == 8
    equal(first, second)
    assert first["bias"][0] != 0


def test_ddp_and_fsdp_train_alike(ran):
    a, b = (found(ran[0], f"straight-{p}")["rows"] for p in ("ddp", "fsdp"))
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-4)
    assert a[-1]["ema_val_ce"] == pytest.approx(b[-1]["ema_val_ce"], rel=1e-4)
    assert b[-1]["ema_val_ce"] != b[-1]["val_ce"]


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_kill_9_and_resume_is_exact(ran, parallel, tmp_path):
    folder, base = ran
    c = dataclasses.replace(base, **RUN, parallel=parallel, out=str(tmp_path / "run"))
    assert run(tmp_path, [job("killed", c, "train", at={6: "kill"})]) == [-signal.SIGKILL] * 2
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "step_00000004"
    assert run(tmp_path, [job("resumed", c, "train", resume="latest")]) == [0, 0]
    same_runs(folder / f"straight-{parallel}", tmp_path / "run")
    for rank in (0, 1):
        straight, resumed = (found(f, n, rank) for f, n in ((folder, f"straight-{parallel}"), (tmp_path, "resumed")))
        equal(straight["state"], resumed["state"])
        equal(straight["rows"][4:], resumed["rows"])


@pytest.mark.slow
def test_a_sharded_checkpoint_is_read_by_one_process_and_by_three(ran, tmp_path):
    folder, base = ran
    path, saved = folder / "straight-fsdp", found(folder, "straight-fsdp")["state"]
    assert (latest_checkpoint(path / "checkpoints") / "sharded" / ".metadata").is_file()
    c = dataclasses.replace(base, **RUN, parallel="fsdp", out=str(path))
    alone = Trainer(c, resume=True)
    equal(saved, state_of(alone))
    alone.train_step()
    model = HNetForCausalLM.from_pretrained(latest_checkpoint(path / "checkpoints"))
    equal(dict(model.state_dict()), {k[7:]: v for k, v in saved.items() if k.startswith("weight/")})

    c = dataclasses.replace(c, batch_bytes=768)
    assert run(tmp_path, [job("three", c, "load", resume="latest")], processes=3) == [0, 0, 0]
    equal(saved, found(tmp_path, "three", 2)["state"])


def test_a_sharded_run_starts_from_an_unsharded_checkpoint(ran):
    folder, _ = ran
    equal(torch.load(folder / "alone.pt", weights_only=True), found(folder, "spread", 1)["state"])


def test_a_checkpoint_has_the_place_of_every_process_in_the_stream_it_reads(ran):
    folder, base = ran
    c = streamed(base, folder)
    train, _ = open_data(c, lambda _: None)
    alone = PackStream(train, c.seq_len, c.batch_bytes // 2, c.seed, shards=c.shards)
    assert alone.shards == 2
    for _ in range(2 * c.steps):
        next(alone)
    saved = load_trainer(latest_checkpoint(folder / "streamed" / "checkpoints"))["data"]
    assert saved["rows"] == alone.state_dict()["rows"]
    assert all(row["window"] > 0 for shard in saved["rows"] for row in shard)
