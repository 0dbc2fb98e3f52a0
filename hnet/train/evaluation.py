"""How well an H-Net predicts documents: the one evaluation of training and of `hnet eval`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from hnet.data.corpus import Corpus
from hnet.data.packing import eval_batches
from hnet.device import World
from hnet.errors import UserError
from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.router_metrics import router_sums
from hnet.model.score import Score
from hnet_kernels import Routing, cross_entropy

from .distributed import add_up


@torch.no_grad()
def evaluate_hnet(
    model: HNetForCausalLM,
    corpus: Corpus,
    autocast: Callable[[], AbstractContextManager],
    *,
    seq_len: int,
    batch_bytes: int,
    max_bytes: int | None = None,
    stride: int | None = None,
    world: World | None = None,
    see: Callable[[list[Routing]], None] | None = None,
) -> Score:
    """Every symbol of the first `max_bytes` bytes of `corpus` (None: all) predicted once.

    Args:
        autocast: makes the context of the forward passes.
        seq_len: longest sequence, positions. Without a stride each piece of a document starts afresh.
        stride: pieces overlap, and every symbol has at least seq_len - stride bytes of its document before it, where
            there are so many. In [1, seq_len].
        batch_bytes: positions that go through the model at once, in each process.
        world: over these processes; all of them call this, and all get the sum.
        see: is given the routing of every pack of this process, in order.

    Raises:
        ValueError: a size or the stride out of range.
    """
    if seq_len < 2 or batch_bytes < 1:
        raise UserError(f"seq_len must be at least 2 and batch_bytes at least 1, got {seq_len} and {batch_bytes}")
    if stride is not None and not 1 <= stride <= seq_len:
        raise UserError(f"stride must be 1 to seq_len ({seq_len}), got {stride}")
    world, device, before = world or World(0, 1, 0), model.embeddings.weight.device, model.training
    routed = model.config.num_stages - 1
    sums = torch.zeros(4 + 4 * routed, dtype=torch.float64, device=device)
    model.eval()
    for batch in eval_batches(corpus, seq_len, batch_bytes, max_bytes, world.rank, world.size, stride):
        here = batch.to(device)
        with autocast():
            out = model(here.input_ids, cu_seqlens=here.cu_seqlens, max_seqlen=here.max_seqlen)
        if batch.filler:
            continue
        nats = cross_entropy(out.logits, here.targets).loss.double().sum()
        chunks = [r.num_chunks.double() for r in out.routing]
        sizes = (batch.num_targets, batch.num_bytes, batch.input_ids.shape[0])
        routers = [x.double() for r in out.routing for x in router_sums(r)]
        sums += torch.stack([nats, *(torch.full_like(nats, n) for n in sizes), *chunks, *routers])
        if see is not None:
            see(out.routing)
    model.train(before)
    nats, *found = add_up(sums, world).tolist()
    targets, num_bytes, *positions = map(round, found[: 3 + routed])
    on, off, near = (tuple(found[3 + routed + i :: 3]) for i in range(3))
    return Score(nats, targets, num_bytes, tuple(positions), tuple(zip(on, off, near, strict=True)))
