"""Two real processes over gloo against one. This file is also what those processes run: a list of jobs, one trainer
each, whose results they leave in files."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hnet import HNetForCausalLM
from hnet.data.pack_stream import PackStream
from hnet.data.packing import Batch
from hnet.data.sources import open_data
from hnet.errors import RunFailed
from hnet.metrics_log import read_metrics
from hnet.train.checkpoint import latest_checkpoint, load_trainer, verify
from hnet.train.config import TrainConfig
from hnet.train.distributed import finish, named_state
from hnet.train.loop import Trainer
from hnet.train.shards import all_rows

from .conftest import fill, make_room, tiny
from .test_resume import NOT_EXACT, equal, same_runs

ROOT = Path(__file__).parents[2]
STEP = {"max_grad_norm": 0.05, "warmup_steps": 0, "schedule": "constant", "dtype": "fp32"}  # the norm is about 1
STEPS = {  # of one optimiser step
    "batch": {},
    "accumulated": {"accumulation": 2, "recompute": True},
    "global": {"ratio_reduction": "global"},
    "bf16": {"dtype": "bf16"},
}
MUON = {"optimizer": "muon", "weight_decay": 0.1, "clipping": "off"}
RUN = {"rate_control": "bias", "weight_ema": 0.9, "dropout": 0.1, "dtype": "fp32", "ratio_reduction": "global"}


# --- in the processes -----------------------------------------------------------------------------------------------


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    weights = {f"weight/{n}": p for n, p in trainer.model.named_parameters()}
    average = {} if trainer.ema is None else {f"ema/{n}": a for n, a in trainer.ema.named().items()}
    tensors = {**weights, **named_state(trainer.model, trainer.optimizers), **average}
    return {k: all_rows(v).detach().clone() for k, v in tensors.items()}


def work(jobs: str, results: str) -> None:
    for job in json.loads(Path(jobs).read_text()):
        error = ""
        try:
            do(job, results)
        except (RunFailed, OSError) as e:
            if "fails" not in job:
                raise
            error = f"{type(e).__name__}: {e}"
        if "fails" in job:
            (Path(results) / f"{job['name']}.{os.environ['RANK']}.error").write_text(error)


class Traffic(TorchDispatchMode):
    """Collectives of fsdp, by kind and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for kind in ("allgather_base", "reduce_scatter_base"):
            if kind in func._schema.name:
                self.counts[f"{kind} {tree_leaves(args)[0].dtype}"] += 1
        return func(*args, **(kwargs or {}))


def skipped(trainer: Trainer) -> bool:
    """Whether an update that is not finite, as taken on a GPU, leaves everything as it was."""
    before = state_of(trainer)
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    trainer.optimizers.step_without_waiting(torch.tensor(False))
    trainer.optimizers.zero_grad()
    after = state_of(trainer)
    return all(torch.equal(v, after[k]) for k, v in before.items() if not k.startswith("step/"))


def do(job: dict, results: str) -> None:
    rank = int(os.environ["RANK"])
    if "out_by_process" in job:
        job["config"]["out"] = job["out_by_process"][rank]
    if "resume_by_process" in job:
        job["resume"] = job["resume_by_process"][rank]
    trainer = Trainer(TrainConfig(**job["config"]), resume=job.get("resume", False))
    launch, rows = trainer.start_step, []
    at = {int(step): what for step, what in job.get("at", {}).items()}

    def report(row, rows=rows, trainer=trainer):
        rows.append({k: v for k, v in row.items() if k not in NOT_EXACT})
        Trainer._report(trainer, row)

    def step(at=at, rank=rank, launch=launch, trainer=trainer):
        what = at.get(trainer.step)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "interrupt" and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if what == "raise" and rank == 1:
            raise ValueError("something is wrong on one process")
        if what == "fill" and rank == 0:
            fill(Path(job["disk"]), job["left"])
        if what == "make room" and rank == 0:
            make_room(Path(job["disk"]))
        if what == "roll back":
            trainer.state.roll_back()
        return launch()

    trainer.start_step, trainer._report = step, report
    found = {}
    if job["do"] == "step":
        with Traffic() as traffic:
            rows.append(trainer.train_step())
        found["traffic"] = dict(traffic.counts)
    elif job["do"] == "steps":
        rows += [trainer.train_step() for _ in range(4)]
    elif job["do"] == "train":
        trainer.train()
    if "fails" in job:  # perhaps on one process alone
        return
    bias = [s.logit_bias for s in trainer.task.compression.stages]
    found |= {"rows": rows, "bias": bias, "state": state_of(trainer)}
    if job["do"] == "steps":
        found["skipped"] = skipped(trainer)
    torch.save(found, Path(results) / f"{job['name']}.{rank}.pt")


if __name__ == "__main__":
    try:
        work(*sys.argv[1:])
    finally:
        finish()


# --- outside of them ------------------------------------------------------------------------------------------------


def run(folder: Path, jobs: list[dict], processes: int = 2) -> list[int]:
    """Exit codes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    shared |= {"WORLD_SIZE": str(processes), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.train.test_distributed", str(folder / "jobs.json"), str(folder)]
    started = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)}, cwd=ROOT,
                         stdout=subprocess.DEVNULL)
        for r in range(processes)
    ]  # fmt: skip
    try:
        return [p.wait(timeout=600) for p in started]
    finally:
        for p in started:
            p.kill()


def job(name: str, config: TrainConfig, do: str, **more) -> dict:
    return {"name": name, "config": dataclasses.asdict(config), "do": do, **more}


def found(folder: Path, name: str, rank: int = 0) -> dict:
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def one_thread():
    """As the processes have: the order of sums is theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, one_thread):
    """(folder, base config): every job that ends by itself, in one pair of processes."""
    folder = tmp_path_factory.mktemp("two")
    base = tiny(folder / "run")
    alone = Trainer(dataclasses.replace(base, **RUN, out=str(folder / "alone")))  # unsharded, for fsdp to start from
    alone.train()
    torch.save(state_of(alone), folder / "alone.pt")
    jobs = []
    for p in ("ddp", "fsdp"):
        for name, change in STEPS.items():
            c = dataclasses.replace(base, **{**STEP, **change}, parallel=p, out=str(folder / f"{name}-{p}"))
            jobs.append(job(f"{name}-{p}", c, "step"))
        c = dataclasses.replace(base, **STEP, **MUON, parallel=p, out=str(folder / f"muon-{p}"))
        jobs.append(job(f"muon-{p}", c, "steps"))
        c = dataclasses.replace(base, **RUN, parallel=p, out=str(folder / f"straight-{p}"))
        jobs.append(job(f"straight-{p}", c, "train"))
        c = dataclasses.replace(c, steps=50, checkpoint_every=50, eval_every=50, out=str(folder / f"stopped-{p}"))
        jobs.append(job(f"stopped-{p}", c, "train", at={2: "interrupt"}))
    c = dataclasses.replace(base, **RUN, parallel="fsdp", out=str(folder / "alone"))
    jobs.append(job("spread", c, "load", resume="latest"))
    jobs += agreeing(folder, base)
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


def close(one: dict, two: dict, names: list[str]) -> None:
    """The moments (the clipped gradient) agree to rounding of the largest value of each tensor, and the weights to a
    ten-thousandth of the step, 1e-3, and their own last bit, but for what AdamW makes of the gradient's rounding where
    that is as small as eps."""
    assert one["state"].keys() == two["state"].keys()
    for k, v in one["state"].items():
        error = (v - two["state"][k]).abs()
        limit = 1e-5 * v.abs().max()
        if k.startswith("weight/"):
            moments = [x["state"][k.replace("weight", "exp_avg", 1)] for x in (one, two)]
            updates = [10 * m / ((10 * m).abs() + 1e-8) for m in moments]  # of the first step: beta1 is 0.9
            limit = 1e-7 + 2**-23 * v.abs() + 2e-3 * (updates[0] - updates[1]).abs()
        assert (error <= limit).all(), f"{k}: {(error - limit).max()} too much"
    a, b = one["rows"][-1], two["rows"][-1]
    for k in names:
        assert a[k] == pytest.approx(b[k], rel=1e-5), k
    assert a["grad_norm"] > 2 * STEP["max_grad_norm"]  # clipping did something


NAMES = ["bytes", "loss", "ce", "ratio_loss", "grad_norm", "stage0/grad_norm", "stage1/grad_norm", "stage0/G"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["batch", "accumulated"])
def test_a_step_is_that_of_one_process(ran, parallel, name):
    folder, base = ran
    twice = 2 * STEPS[name].get("accumulation", 1)
    alone = Trainer(dataclasses.replace(base, **STEP, accumulation=twice, out=str(folder / "x")))
    row = alone.train_step()
    close({"rows": [row], "state": state_of(alone)}, found(folder, f"{name}-{parallel}"), NAMES)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_muon_is_that_of_one_process(ran, parallel):
    """To the bit, over four steps; clipping off, as the norm's last bit would not be, which the iterations multiply."""
    folder, base = ran
    alone = Trainer(dataclasses.replace(base, **STEP, **MUON, accumulation=2, out=str(folder / "x")))
    before = {n: p.detach().clone() for n, p in alone.model.named_parameters()}
    for _ in range(4):
        alone.train_step()
    two = found(folder, f"muon-{parallel}")
    equal(state_of(alone), two["state"])
    moments = [k.partition("/")[2] for k in two["state"] if k.startswith("momentum_buffer/")]
    assert len(moments) > 4
    assert all((alone.model.get_parameter(n) - before[n]).abs().max() > 1e-4 for n in moments)
    assert two["skipped"]
    equal(two["state"], found(folder, f"muon-{parallel}", 1)["state"])


def test_fsdp_reduces_gradients_once_a_step_and_in_fp32(ran):
    once, twice, half = (found(ran[0], f"{name}-fsdp")["traffic"] for name in ("batch", "accumulated", "bf16"))
    reduced = "reduce_scatter_base torch.float32"
    assert once[reduced] == twice[reduced] > 4
    assert {k for k in half if k.startswith("reduce")} == {reduced}


def test_fsdp_sends_linear_maps_in_bf16_and_computes_what_ddp_does(ran):
    plain, half = (found(ran[0], f"{name}-fsdp")["traffic"] for name in ("batch", "bf16"))
    assert {k for k in plain if k.startswith("allgather")} == {"allgather_base torch.float32"}
    assert half["allgather_base torch.bfloat16"] > 4
    close(found(ran[0], "bf16-ddp"), found(ran[0], "bf16-fsdp"), NAMES)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_step_with_the_global_ratio_loss_is_that_of_both_packs_as_one(ran, parallel):
    folder, base = ran
    alone = Trainer(dataclasses.replace(base, **STEP, out=str(folder / "x")))
    source, half = alone.task.stream.source, base.batch_bytes // 2
    a, b = (next(PackStream(source, base.seq_len, half, base.seed, rank, 2)) for rank in (0, 1))
    merged = Batch(
        torch.cat([a.input_ids, b.input_ids]), torch.cat([a.targets, b.targets]),
        torch.cat([a.cu_seqlens, a.cu_seqlens[-1] + b.cu_seqlens[1:]]), max(a.max_seqlen, b.max_seqlen),
        a.num_bytes + b.num_bytes,
    )  # fmt: skip
    alone.task.stream.take = lambda: SimpleNamespace(batch=lambda: merged)
    row = alone.train_step()
    one, two = {"rows": [row], "state": state_of(alone)}, found(folder, f"global-{parallel}")
    close(one, two, NAMES)
    assert found(folder, f"batch-{parallel}")["rows"][0]["ratio_loss"] != pytest.approx(row["ratio_loss"], rel=1e-5)


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


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_interrupt_of_one_process_stops_all_at_the_same_step(ran, parallel):
    folder, _ = ran
    for rank in (0, 1):
        assert [r["step"] for r in found(folder, f"stopped-{parallel}", rank)["rows"]] == [1, 2, 3]
    assert latest_checkpoint(folder / f"stopped-{parallel}" / "checkpoints").name == "step_00000003"


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


def test_a_sharded_run_starts_from_an_unsharded_checkpoint(ran):
    folder, _ = ran
    equal(torch.load(folder / "alone.pt", weights_only=True), found(folder, "spread", 1)["state"])


def test_a_full_disk_costs_a_checkpoint_on_all_processes(tmp_path, small_disk):
    """Once where all write (no room at all), once where one does (room for the shards alone); then the last save."""
    base = dataclasses.replace(tiny(tmp_path), parallel="fsdp", weight_ema=0.9, steps=4, checkpoint_every=2)
    jobs = []
    for left in (0, 3 << 20):
        c = dataclasses.replace(base, out=str(small_disk / f"run{left}"))
        at = {1: "fill", 3: "make room"}
        jobs.append(job(f"goes-on{left}", c, "train", at=at, disk=str(small_disk), left=left))
    c = dataclasses.replace(base, out=str(small_disk / "last"))
    jobs.append(job("last", c, "train", at={3: "fill"}, disk=str(small_disk), left=3 << 20, fails=True))
    assert run(tmp_path, jobs) == [0, 0]
    for left in (0, 3 << 20):
        root = small_disk / f"run{left}" / "checkpoints"
        assert sorted(p.name for p in root.iterdir()) == ["best", "step_00000004"]
        verify(root / "step_00000004")
        rows = read_metrics(root.parent / "metrics.jsonl")
        assert [r["step"] for r in rows if "event" not in r] == list(range(5))
        assert "checkpoint of step 2 not written" in next(r for r in rows if r.get("event") == "disk_full")["message"]
        equal(*(found(tmp_path, f"goes-on{left}", rank)["state"] for rank in (0, 1)))
    assert [p.name for p in (small_disk / "last" / "checkpoints").iterdir()] == ["step_00000002"]
    assert "NotWritten: checkpoint of step 4 not written" in (tmp_path / "last.0.error").read_text()


def agreeing(folder: Path, base: TrainConfig) -> list[dict]:
    """Directories that only one process sees; and a run killed before its first checkpoint."""
    base = dataclasses.replace(base, steps=4, checkpoint_every=2, out=str(folder / "killed"))
    apart = [str(folder / "node0"), str(folder / "node1")]
    (folder / "killed").mkdir()
    (folder / "killed" / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    local = [f"{out}/checkpoints/step_00000002" for out in apart]
    return [
        job("back", base, "train", at={3: "roll back"}, out_by_process=apart, fails=True),
        job("latest", base, "load", resume="auto", out_by_process=apart, fails=True),
        job("path", base, "load", resume_by_process=local, out_by_process=apart, fails=True),
        job("fresh", base, "train", resume="auto"),
        job("again", base, "load", resume="auto"),
    ]


@pytest.mark.parametrize("name", ["back", "latest", "path"])
def test_processes_that_see_different_checkpoints_stop(ran, name):
    for rank in (0, 1):
        error = (ran[0] / f"{name}.{rank}.error").read_text()
        assert error.startswith("RunFailed: the processes see different checkpoints in ")
        assert error.endswith("process 0 sees step_00000002; process 1 sees none")


def test_auto_starts_all_processes_afresh_where_a_run_was_killed_before_its_first_checkpoint(ran):
    folder = ran[0] / "killed"
    assert [r["step"] for r in found(ran[0], "fresh", 1)["rows"]] == [1, 2, 3, 4]
    assert read_metrics(folder / "abandoned" / "from_step_00000000_1" / "metrics.jsonl")[-1]["step"] == 1
    equal(found(ran[0], "fresh", 0)["state"], found(ran[0], "again", 1)["state"])


def test_an_error_of_one_process_ends_the_others(ran, tmp_path):
    c = dataclasses.replace(ran[1], out=str(tmp_path / "run"))
    codes = run(tmp_path, [job("wrong", c, "train", at={2: "raise"})])
    assert codes[0] != 0
    assert codes[1] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [({"async_checkpoints": True}, "async_checkpoints must be off")],
)
def test_fsdp_refuses_what_it_cannot_do(config, change, message):
    from hnet.device import World
    from hnet.train.distributed import shard

    with pytest.raises(ValueError, match=message):
        shard(torch.nn.Linear(2, 2), dataclasses.replace(config, parallel="fsdp", **change), World(0, 2, 0))


@pytest.mark.slow
def test_torchrun(config):
    config = dataclasses.replace(config, parallel="fsdp", steps=2)
    path = Path(config.out).parent / "config.toml"
    path.write_text(config.to_toml())
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hnet", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command, str(path)], env=environment, cwd=ROOT, timeout=600)
    assert result.returncode == 0
    HNetForCausalLM.from_pretrained(latest_checkpoint(Path(config.out) / "checkpoints"))
