"""One process or many: what the loop asks of torch.distributed. Many: `torchrun --nproc-per-node N -m hnet train`."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import EMA, TRAINER
from .config import TrainConfig
from .weight_ema import WeightEMA


class World(NamedTuple):
    rank: int
    size: int
    local_rank: int

    @property
    def main(self) -> bool:
        """This process writes files and talks."""
        return self.rank == 0


def join(device: str) -> World:
    """The processes torchrun started, or this one alone. NCCL for "cuda", gloo for "cpu"."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(0, 1, 0)
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(world.local_rank)
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return world


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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


def anyone(flag: bool, world: World) -> bool:
    """True where it is so on any process, so that all take the same branch."""
    return any(gather(flag, world))


def replicate(model: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    """What the loop calls: the model itself, or DDP around it."""
    if world.size == 1:
        return model
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> bool:
    """True if the parameters are spread over the processes (fsdp)."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def accumulating(replica: nn.Module, more: bool) -> AbstractContextManager:
    """Inside, gradients stay local; `more`: another micro-batch follows in this step."""
    if more and isinstance(replica, DistributedDataParallel):
        return replica.no_sync()
    return nullcontext()


def snapshot(model: Any, state: dict[str, Any], ema: WeightEMA | None, *, copy: bool) -> Callable[[Path], None]:
    """A function that writes the model and the trainer state of now into a folder; with `copy` training may go on
    before it is called."""
    if copy:
        state = copy_tree(state)
        model = copy_model(model)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        torch.save(state, folder / TRAINER)
        if ema is not None:
            from safetensors.torch import save_file

            names = [n for n, p in model.named_parameters() if p.requires_grad]
            average = state["ema"]["average"]
            save_file({n: a.contiguous() for n, a in zip(names, average, strict=True)}, str(folder / EMA))

    return write


def copy_tree(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: copy_tree(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_tree(v) for v in value)
    return value


def copy_model(model: Any) -> Any:
    import copy as copying

    return copying.deepcopy(model)
