"""Steps of two processes against those of one: losses, weights and moments, and what fsdp sends."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from hnet.data.pack_stream import PackStream
from hnet.data.packing import Batch
from hnet.train.loop import Trainer

from .conftest import tiny
from .processes import STEP, found, job, run, state_of
from .test_resume import equal

STEPS = {  # of one optimiser step
    "batch": {},
    "accumulated": {"accumulation": 2, "recompute": True},
    "global": {"ratio_reduction": "global"},
    "bf16": {"dtype": "bf16"},
}
TERMS = {  # that make routers decide, and teach them a share that follows the rate
    "surprisal_weight": [0.5], "surprisal_warmup": 0.0, "surprisal_gain": 0.5, "rate_control": "bias",
    "entropy_weight": [0.3], "entropy_start": 0.0, "entropy_warmup": 0.0,
}  # fmt: skip
STEPS["terms"] = TERMS
MUON = {"optimizer": "muon", "weight_decay": 0.1, "clipping": "off", **TERMS}


@pytest.fixture(scope="module")
def ran(tmp_path_factory, one_thread):
    """(folder, base config): every step, in one pair of processes."""
    folder = tmp_path_factory.mktemp("steps")
    base = tiny(folder / "run")
    jobs = []
    for p in ("ddp", "fsdp"):
        for name, change in STEPS.items():
            c = dataclasses.replace(base, **{**STEP, **change}, parallel=p, out=str(folder / f"{name}-{p}"))
            jobs.append(job(f"{name}-{p}", c, "step"))
        c = dataclasses.replace(base, **STEP, **MUON, parallel=p, out=str(folder / f"muon-{p}"))
        jobs.append(job(f"muon-{p}", c, "steps"))
    assert run(folder, jobs) == [0, 0]
    return folder, base


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
@pytest.mark.parametrize("name", ["batch", "accumulated", "terms"])
def test_a_step_is_that_of_one_process(ran, parallel, name):
    folder, base = ran
    twice = 2 * STEPS[name].get("accumulation", 1)
    terms = TERMS if name == "terms" else {}
    alone = Trainer(dataclasses.replace(base, **STEP, **terms, accumulation=twice, out=str(folder / "x")))
    row = alone.train_step()
    close({"rows": [row], "state": state_of(alone)}, found(folder, f"{name}-{parallel}"), NAMES)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_muon_is_that_of_one_process(ran, parallel):
    """To the bit, over four steps, with a router that is taught; clipping off: the iterations multiply
    the last bit of the norm."""
    folder, base = ran
    alone = Trainer(dataclasses.replace(base, **STEP, **MUON, accumulation=2, out=str(folder / "x")))
    before = {n: p.detach().clone() for n, p in alone.model.named_parameters()}
    rows = [alone.train_step() for _ in range(4)]
    two = found(folder, f"muon-{parallel}")
    shares = [row["stage0/taught"] for row in rows]
    assert len(set(shares)) == 4
    assert shares == [row["stage0/taught"] for row in two["rows"]]
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


@pytest.mark.parametrize(
    ("change", "message"),
    [({"async_checkpoints": True}, "async_checkpoints must be off")],
)
def test_fsdp_refuses_what_it_cannot_do(config, change, message):
    from hnet.device import World
    from hnet.train.distributed import shard

    with pytest.raises(ValueError, match=message):
        shard(torch.nn.Linear(2, 2), dataclasses.replace(config, parallel="fsdp", **change), World(0, 2, 0))
