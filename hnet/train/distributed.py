"""One process or many: what the loop asks of torch.distributed. Many: `torchrun --nproc-per-node N -m hnet train`.

ddp   every process holds everything; gradients are averaged while the backward runs.
fsdp  (FSDP2) every Block, and all that is outside of blocks together, is spread over the processes by rows: weights,
      gradients, optimiser state, weight average. They meet for a block's forward and backward only. Gradients are
      summed in fp32, once a step: between the micro-batches of an `accumulation` every process holds all of its own.
      With dtype bf16 the linear maps of blocks travel in bf16, which is what autocast makes of them anyway; norms,
      residual stream, convolutions, Mamba's A and dt and all that is outside of blocks stay fp32. With `compile` blocks
      travel in fp32, whole: their graphs would break at every part that is gathered.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hnet.config.run import RunConfig
from hnet.device import World, pick_autocast
from hnet.disk import full_disk
from hnet.errors import UserError
from hnet.model.checkpoint_format import save_pretrained
from hnet.model.isotropic import Block

from . import lora
from .checkpoint import EMA, SHARDED, TRAINER
from .optim import Optimizers
from .shards import all_rows, sharded
from .weight_ema import WeightEMA

PARTIAL = ".partial_sharded"


def start(device: str) -> World:
    """The processes torchrun started, or this one alone. NCCL for "cuda", gloo for "cpu"."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(0, 1, 0)
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(world.local_rank)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=meeting_place(world), rank=world.rank, world_size=world.size)
    return world


def meeting_place(world: World) -> dist.Store:
    """Where the processes tell each other their addresses. torchrun keeps one over its restarts, in which those of
    dead processes would be found (pytorch issue 135712). Its agents count restarts each for itself, so with several
    nodes TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has to help (docs/training.md)."""
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store


def finish() -> None:
    """Take leave of the other processes; without a word if an error is on its way and NCCL would wait for them."""
    if dist.is_initialized() and not (sys.exc_info()[0] and dist.get_backend() == "nccl"):
        dist.destroy_process_group()
        gc.collect()  # gloo's threads must end before Python does, and fsdp's modules hold on to the group in cycles


def add_up(x: Tensor, world: World) -> Tensor:
    """Sum over the processes, in place."""
    if world.size > 1:
        dist.all_reduce(x)
    return x


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def gather(value: Any, world: World) -> list[Any]:
    """`value` of every process, by rank, on all of them."""
    if world.size == 1:
        return [value]
    out: list[Any] = [None] * world.size
    dist.all_gather_object(out, value)
    return out


def shard(model: nn.Module, config: RunConfig, world: World) -> None:
    """With fsdp: spread the parameters over the processes, in place. Before anyone takes hold of them.

    Raises:
        ValueError: fsdp with an option that needs whole tensors.
    """
    if config.parallel != "fsdp" or world.size == 1:
        return
    if config.async_checkpoints:
        raise UserError("async_checkpoints must be off with parallel 'fsdp': every process takes part in a save")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # An in-place change of what a block returns would lose its hook; nothing here makes one.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (world.size,))
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    half = pick_autocast(config.dtype, device)
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    compiled = any("forward" in vars(b) for b in blocks)
    maps = [] if half is None or compiled else [m for b in blocks for m in linear_maps(b)]
    for m in [*maps, *blocks, model]:
        # The root too: evaluation would leave it gathered, blind to the averaged weights that come next.
        precision = policy if any(m is x for x in maps) else MixedPrecisionPolicy()
        spread = fully_shard(m, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        spread.set_force_sum_reduction_for_comms(device.type == "cpu")  # gloo does not average


def linear_maps(module: nn.Module) -> list[nn.Module]:
    """Its largest parts that hold nothing but nn.Linear."""
    holders = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
    if holders and all(isinstance(m, nn.Linear) for m in holders):
        return [module]
    return [part for child in module.children() for part in linear_maps(child)]


def replicate(model: nn.Module, config: RunConfig, world: World) -> nn.Module:
    """What the loop calls: the model itself, or DDP around it."""
    if world.size == 1 or sharded(model):
        return model
    if config.parallel == "fsdp":
        raise UserError("parallel 'fsdp' cannot shard this model: use 'ddp'")
    # DDP packs gradients anew after the first step, which from three processes on changes the order of sums: a resumed
    # run would differ in the last bit. Looking for unused parameters keeps it from that. Buffers are equal anyway.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its replacement is newer than 2.11
        return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=config.deterministic)


def accumulating(replica: Any, more: bool) -> AbstractContextManager:
    """Inside, gradients stay local if `more`: another micro-batch follows in this step."""
    if more and isinstance(replica, DistributedDataParallel):
        return replica.no_sync()
    if hasattr(replica, "set_requires_gradient_sync"):  # fsdp
        replica.set_requires_gradient_sync(not more)
        replica.set_is_last_backward(not more)
    return nullcontext()


def snapshot(
    root: Path, model: Any, state: dict[str, Any], optimizers: Optimizers, ema: WeightEMA | None, world: World, *,
    copy: bool,
) -> Callable[[Path], None]:  # fmt: skip
    """A function that writes the model and the trainer state of now into a folder below `root`; with `copy` training
    may go on before it is called. All processes call this, and one of them what it returns.

    With fsdp, the optimiser state is written here, by all processes, and only moved into the folder.

    Raises:
        OSError: fsdp, and one process could not write; on all processes, and with nothing left behind.
    """
    spread, weights, average = sharded(model), None, None if ema is None else ema.named()
    if spread:
        write_shards(root / PARTIAL, named_state(model, optimizers), world)
        state = {**state, "optimizers": None}
        weights = {k: all_rows(v) for k, v in model.state_dict().items()}
        average = average and {k: all_rows(v) for k, v in average.items()}
    elif copy:
        state, model, average = copy_tree(state), deepcopy(model), copy_tree(average)

    def write(folder: Path) -> None:
        if spread:
            os.rename(root / PARTIAL, folder / SHARDED)
            save_pretrained(model, folder, weights)
        elif lora.adapted(model):
            lora.save(model, folder)
        else:
            model.save_pretrained(folder)
        with (folder / TRAINER).open("wb") as f:  # given a path, torch.save loses the reason why a write failed
            torch.save(state, f)
        if average is not None:
            from safetensors.torch import save_file

            save_file({k: v.contiguous() for k, v in average.items()}, str(folder / EMA))

    return write


def named_state(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Optimiser state by kind and parameter: "exp_avg/lm_head.weight"."""
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
    moments = (item for part in optimizers.parts for item in part.state.items())
    return {f"{kind}/{names[p]}": v for p, values in moments for kind, v in values.items()}


def write_shards(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    import torch.distributed.checkpoint as dcp

    if world.main:
        shutil.rmtree(folder, ignore_errors=True)
    barrier(world)
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except dcp.api.CheckpointException as e:  # on all processes, but what caused an error only where it happened
        code = max(gather(full_disk(e), world))
        if world.main:
            shutil.rmtree(folder, ignore_errors=True)
        if code:
            raise OSError(code, os.strerror(code), str(folder)) from e
        for error, _ in e.failures.values():
            if isinstance(error, OSError):
                raise error from None
        raise


def load_shards(folder: Path, model: nn.Module, optimizers: Optimizers) -> None:
    """Optimiser state as `write_shards` left it, for any number of processes, sharded or not."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    named = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for key, meta in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if key.startswith("ema/"):  # written here too by earlier versions
            continue
        p = named[key.partition("/")[2]]
        assert isinstance(meta, TensorStorageMetadata)
        size = meta.size
        tensors[key] = torch.zeros_like(p.detach()) if size == p.shape else torch.zeros(size, device=p.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)  # every process reads its own rows
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        states.setdefault(named[name], {})[kind] = value
    for part in optimizers.parts:
        part.state.clear()
        part.state.update({p: states[p] for g in part.param_groups for p in g["params"] if p in states})


def copy_tree(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: copy_tree(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_tree(v) for v in value)
    return value
