"""Which part of a training step takes how much of it: a stopwatch that one part at a time has.

Forward, a part has it from its call to its return, but for what it calls that is a part too. Backward, autograd's
nodes are numbered in the order in which the forward made them, so each knows the part that made it, and has the
stopwatch until the next begins; sums of gradients and writing them to parameters go with the node before. Every moment
of the step belongs to one part, so the shares add up to 1. Looking costs about a microsecond a node, which what is made
of many small nodes pays most; `watched` is the step with the stopwatch in it.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import hnet_kernels as hk
from hnet.model.attention import CausalAttention
from hnet.model.conv import GatedConv
from hnet.model.hnet import HNet
from hnet.model.isotropic import Isotropic
from hnet.model.mlp import SwiGLU
from hnet.model.norm import RMSNorm
from hnet.train.loop import Trainer

ROUTING, HEAD, REST = "routing, pool, dechunk", "head, cross entropy", "rest"
# the laptop's layers; any other is part of the rest
LAYERS = {CausalAttention: "attention", GatedConv: "convolutions", SwiGLU: "MLPs", RMSNorm: "norms", Isotropic: REST}
PARTS = (
    "embeddings, n-grams", "attention", "convolutions", "MLPs", "norms", ROUTING, HEAD, "optimiser, clipping", "data",
    REST,
)  # fmt: skip
EMBEDDINGS, OPTIMISER, DATA = PARTS[0], PARTS[7], PARTS[8]


class Stopwatch:
    """seconds: of every part, all that passed since the start but for `follow`'s own."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.seconds = clock, dict.fromkeys(PARTS, 0.0)
        self.inside = [REST]  # parts that were called and have not returned
        self.part, self.since = REST, clock()
        self.first: list[int] = []  # numbers of autograd's nodes at which a part begins to make them
        self.maker: list[str] = []

    def give(self, part: str) -> None:
        now = self.clock()
        self.seconds[self.part] += now - self.since
        self.part, self.since = part, now

    def _forward(self, part: str) -> None:
        self.give(part)
        self.first.append(torch.autograd._get_sequence_nr())
        self.maker.append(part)

    def enter(self, part: str) -> None:
        self.inside.append(part)
        self._forward(part)

    def leave(self) -> None:
        self.inside.pop()
        self._forward(self.inside[-1])

    def made_by(self, number: int) -> str:
        at = bisect.bisect_right(self.first, number) - 1
        return self.maker[at] if at >= 0 else REST

    def follow(self, loss: Tensor) -> None:
        """Every node of the graph of `loss` takes the stopwatch for its maker when its backward begins."""
        self.give(REST)
        assert loss.grad_fn is not None
        seen, pending = set(), [loss.grad_fn]
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            pending += [before for before, _ in node.next_functions]
            if not hasattr(node, "variable"):  # a parameter's gradient: no number
                part = self.made_by(node._sequence_nr())
                node.register_prehook(lambda grads, part=part: self.give(part))
        back = torch.autograd.Variable._execution_engine.queue_callback
        loss.grad_fn.register_prehook(lambda grads: back(lambda: self.give(self.inside[-1])))
        self.first, self.maker = [], []
        self.since = self.clock()

    def shares(self) -> dict[str, float]:
        self.give(self.part)
        total = sum(self.seconds.values())
        return {part: seconds / total for part, seconds in self.seconds.items()}


def part_of(name: str, module: nn.Module) -> str | None:
    if name == "lm_head":
        return HEAD
    if isinstance(module, HNet):  # what it does itself; its networks are parts of their own
        return REST if module.innermost else ROUTING
    return LAYERS.get(type(module))


@contextmanager
def watched(trainer: Trainer, watch: Stopwatch) -> Iterator[None]:
    """The stopwatch goes round in `trainer`'s steps; afterwards everything is as before."""

    def within(part: str, call: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            watch.enter(part)
            try:
                return call(*args, **kwargs)
            finally:
                watch.leave()

        return timed

    def loss(*args: Any) -> Any:
        result = compute(*args)
        watch.follow(result[0])
        return result

    compute, stream = trainer.task.loss, type(trainer.task.stream)
    places = [
        *((trainer.optimizers, name, OPTIMISER) for name in ("step", "zero_grad", "set_lr")),
        (trainer.clipper, "clip", OPTIMISER),
        (trainer.model, "_embed", EMBEDDINGS),
        (hk, "cross_entropy", HEAD),
        (stream, "__next__", DATA),
    ]
    if getattr(trainer.model.ngrams, "before_reading", None) is not None:  # rows are updated where they are read next
        places.append((trainer.model.ngrams, "before_reading", OPTIMISER))
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(mock.patch.object(owner, name, within(part, getattr(owner, name))))
        stack.enter_context(mock.patch.object(trainer.task, "loss", loss))
        for name, module in trainer.model.named_modules():
            if (part := part_of(name, module)) is not None:
                before = module.register_forward_pre_hook(lambda *_, part=part: watch.enter(part))
                after = module.register_forward_hook(lambda *_: watch.leave(), always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
        yield


class Watched(NamedTuple):
    shares: dict[str, float]  # of PARTS, adding up to 1
    seconds: float  # a step, mean, the stopwatch's own time included but for `follow`'s


def watch_steps(trainer: Trainer, steps: int) -> Watched:
    """Of so many steps, which are trained."""
    watch = Stopwatch()
    with watched(trainer, watch):
        watch.since = watch.clock()
        for _ in range(steps):
            trainer.train_step()
        shares = watch.shares()
    return Watched(shares, sum(watch.seconds.values()) / steps)
