"""The whole training step where nobody may wait for the device: on what passes for a GPU, and on a CPU."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch

import hnet_kernels as hk
from hnet import HNetForCausalLM
from hnet.data.packing import Batch
from hnet.device import World
from hnet.model.isotropic import Isotropic
from hnet.model.norm import RMSNorm
from hnet.model.parameters import stage_parameters
from hnet.train.clipping import Clipper
from hnet.train.compression import Compression
from hnet.train.decisive import Decisive
from hnet.train.device_step import DeviceStep
from hnet.train.optim import Optimizers
from hnet.train.task import HNetTask

from .no_host_reads import HostRead, NoHostReads, pretended_gpu

MODELS = {
    "laptop": {"preset": "laptop", "max_chunks": [0.6]},
    "tiny": {"preset": "tiny", "max_chunks": [0.6]},
    "two stages": {"arch": "c1 m1T1 T1", "d_model": [32, 64, 64], "windows": [15, 15, -1], "compression": [3.0, 2.0],
                   "max_chunks": [0.7, 0.5]},
    "small": {"preset": "small", "max_chunks": [0.6]},
}  # fmt: skip
TERMS = {"entropy_weight": [0.1], "surprisal_weight": [0.1, 0.2], "rate_control": "bias"}
OPTIONS = {
    "adaptive+bias": {"clipping": "adaptive", "rate_control": "bias", "ratio_warmup": 5, "dropout": 0.1},
    "characters": {"boundaries": "char-end", "label_smoothing": 0.1, "ratio_reduction": "sequence", **TERMS},
    "recompute": {"recompute": True, "straight_through": True, "rate_control": "alpha", "clipping": "off"},
}


def make_task(config, **change) -> HNetTask:
    config = dataclasses.replace(config, **change).validate()
    return HNetTask(config, torch.device("cpu"), nullcontext, World(0, 1, 0))


def make_step(task: HNetTask, device: str) -> tuple[DeviceStep, list[Batch]]:
    """What the trainer makes of a task, on `device`, with micro-batches of 3 sequences and room for 40."""
    config, here = task.config, torch.device(device)
    task.model = HNetForCausalLM(config.model(), device=here).set_dropout(config.dropout)
    if device == "meta":
        task.model.cast(torch.bfloat16)
    for m in task.model.modules():
        if isinstance(m, Isotropic):
            m.recompute = config.recompute
    task.stages = stage_parameters(task.model)
    task.compression = Compression(config, task.model)
    task.decisive = Decisive(config, len(task.compression.stages), here)
    optimizers = Optimizers(task.model, config, task.multipliers, config.router_lr)
    if optimizers.rates is None:
        optimizers.keep_rates_on(here)
    T = task.pack_bytes
    ids = torch.randint(0, 250, (T,), device=here)
    cu = torch.tensor([0, 100, 230, *[T] * 38], dtype=torch.int32, device=here)
    batches = [Batch(ids, ids.roll(-1), cu, config.seq_len, T) for _ in range(config.accumulation)]
    return DeviceStep(task, task.model, optimizers, Clipper(config, task.stages, here), World(0, 1, 0)), batches


def run_pretended(task: HNetTask, monkeypatch, steps: int = 1) -> list[torch.Tensor]:
    """Steps of a bf16 model on what passes for a GPU."""
    with pretended_gpu(monkeypatch):
        step, batches = make_step(task, "meta")
        with NoHostReads():
            return [step.run(batches, 0) for _ in range(steps)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", MODELS)
def test_a_step_on_a_pretended_gpu(config, model, optimizer, monkeypatch):
    for values in run_pretended(make_task(config, **MODELS[model], optimizer=optimizer), monkeypatch):
        assert values.is_meta
        assert values.dim() == 1


@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_with_options_on_a_pretended_gpu(config, options, monkeypatch):
    """Of two micro-batches, twice: then there are moments."""
    task = make_task(config, accumulation=2, **MODELS["two stages"], **OPTIONS[options])
    run_pretended(task, monkeypatch, steps=2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", ["tiny", "two stages"])
def test_a_step_on_a_cpu(config, model, optimizer, monkeypatch):
    """Real numbers, but only what the dispatcher sees: attention plans by lengths there. Our ops in plain PyTorch."""
    monkeypatch.setattr("hnet_kernels.validation.readable", lambda x: False)  # as for a tensor on a GPU
    step, batches = make_step(make_task(config, **MODELS[model], optimizer=optimizer), "cpu")
    before = [p.detach().clone() for p in step.task.model.parameters()]
    step.optimizers.set_lr(1.0)
    with NoHostReads(), hk.backend("reference"):
        values = step.run(batches, 0)
    assert values.isfinite().all()
    moved = [not torch.equal(a, b) for a, b in zip(before, step.task.model.parameters(), strict=True)]
    assert sum(moved) > len(before) / 2


def test_without_max_chunks_the_host_reads(config, monkeypatch):
    with pytest.raises((HostRead, RuntimeError), match="reads the device|data|dynamic"):
        run_pretended(make_task(config, preset="tiny"), monkeypatch)


@pytest.mark.parametrize("where", ["model", "loss", "clipping", "optimizer"])
def test_an_item_anywhere_is_seen(config, where, monkeypatch):
    """Someone adds .item(): in a layer, in the loss, between gradients, in the update."""
    owner, name = {
        "model": (RMSNorm, "forward"), "loss": (HNetTask, "loss"), "clipping": (Clipper, "clip"),
        "optimizer": (Optimizers, "step_without_waiting"),
    }[where]  # fmt: skip
    right = getattr(owner, name)

    def wrong(self, *args, **kw):
        torch.ones((), device="meta").item()
        return right(self, *args, **kw)

    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(HostRead, match="_local_scalar_dense reads the device"):
        run_pretended(make_task(config, **MODELS["tiny"]), monkeypatch)


READS = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: 1 if x.any() else 0,
    "tolist": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0],
    "masked write": lambda x: x.index_put_((x > 0,), torch.zeros((), device=x.device)),
    "nonzero": lambda x: x.nonzero(),
    "cpu": lambda x: x.cpu(),
    "copy": lambda x: torch.zeros(3).copy_(x),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("read", READS)
def test_every_way_to_read_is_seen(read, monkeypatch):
    with pretended_gpu(monkeypatch):
        x = torch.ones(3, device="meta")
        with NoHostReads(), pytest.raises(HostRead):
            READS[read](x)
