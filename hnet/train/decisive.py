"""Terms of the loss that make a router decide, and know where.

The ratio loss leaves p undecided for ever: at F = 1/N it has no gradient for G. Two terms, either or both, a weight for
every stage, written to the device before each step (`prepare`), so that a captured step follows them:

surprisal   + weight x mean BCE(p, t), t = 1 at the 1/N positions of the pack (or at the share that holds the rate,
            hnet.train.compression) after which the model is least sure of what comes, first positions of sequences
            (which are boundaries anyway) counted among them: the inner network makes its vector where it is needed,
            as at the space before a word. Least sure: the entropy of what is predicted, which is the expected
            surprisal (the surprisal of the byte that came is the same with noise, by which no p gets certain), summed
            until the next position: in the outermost stage the next byte; where boundaries keep to characters, the
            next character; further in the bytes of the chunk. A constant: no gradient flows into predictions.
entropy     + weight x mean H(p), H the binary entropy in nats: pushes every p to 0 or 1, whichever it is nearer to.
            It freezes what is ahead when it acts, so it starts late and grows slowly.

Neither touches the ratio loss. Each process ranks its own micro-batches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import hnet_kernels as hk

from .config import TrainConfig

EDGE = 1e-4  # p is moved this far from 0 and 1, where logarithms end; gradients are at most 1/EDGE


class Decisive:
    """The weights of both terms, (stages,) on the device; None where a term is off. A function of the step alone."""

    def __init__(self, config: TrainConfig, stages: int, device: torch.device) -> None:
        self.config = config
        self.entropy, self.surprisal = (
            torch.zeros(stages, device=device) if any(given) and stages else None
            for given in (config.entropy_weight, config.surprisal_weight)
        )
        self.prepare(0)

    def prepare(self, step: int) -> None:
        """Before `step`, 0-based: what a captured one reads from the device."""
        c = self.config
        if self.entropy is not None:
            fill(self.entropy, c.entropy_weight, ramp(step / c.steps - c.entropy_start, c.entropy_warmup))
        if self.surprisal is not None:
            fill(self.surprisal, c.surprisal_weight, ramp(step / c.steps, c.surprisal_warmup))


def ramp(progress: float, length: float) -> float:
    """0 up to `progress` 0, 1 from `length` on"""
    return min(1.0, max(0.0, progress / length)) if length else float(progress >= 0)


def fill(weight: Tensor, given: list[float], factor: float) -> None:
    for i in range(len(weight)):
        weight[i].fill_(given[i if len(given) > 1 else 0] * factor)


def mean_entropy(r: hk.Routing) -> Tensor:
    """() mean over the positions of H(p) = -p ln p - (1 - p) ln(1 - p), in nats, ln 2 at most; `route` has summed it"""
    return r.entropy_sum.double().sum().to(r.entropy_sum.dtype) / r.cu_seqlens[-1].clamp(min=1)


def inside(p: Tensor) -> Tensor:
    return EDGE + (1 - 2 * EDGE) * p


class Teacher:
    """What is hard to predict, stage after stage, outermost first: `loss` is called for each in turn.

    nats: (T,) entropy of what is predicted after every position.
    candidates: (T,) bool, where chunks may begin in the outermost stage; default: anywhere.
    """

    def __init__(self, nats: Tensor, candidates: Tensor | None = None) -> None:
        self.before = F.pad(nats.detach().double().cumsum(0), (1, 0))  # (T + 1,) nats of the positions before each
        self.place = torch.arange(len(nats) + 1, device=nats.device)  # where each row of the stage begins; the end
        self.candidates = candidates

    def loss(self, r: hk.Routing, share: Tensor | float) -> Tensor:
        """() mean BCE(p, t) of a stage over all positions but first ones; t = 1 at `share` of all, first ones among
        them."""
        t, taught = self.targets(r, share)
        p = inside(r.boundary_prob)
        bce = -torch.where(t, p, 1 - p).log()
        self.place = self.place[F.pad(r.chunk_start.long(), (0, 1), value=len(p))]
        self.candidates = None
        return torch.where(taught, bce, 0).sum() / taught.sum().clamp(min=1)

    @torch.no_grad()
    def targets(self, r: hk.Routing, share: Tensor | float) -> tuple[Tensor, Tensor]:
        """(T,) bool, t of every position; and which are taught: neither first nor padding. Those that are no candidates
        are taught 0: nothing else would keep entropy from making them 1."""
        T, used = len(r.boundary_prob), r.cu_seqlens[-1]
        row, begins = torch.arange(T, device=used.device), first(r)
        could = row < used
        taught = could & ~begins
        if self.candidates is not None:
            could &= self.candidates
        # the next one that could begin a chunk, or the end
        stop = F.pad(torch.where(could | begins, row, T), (0, 1), value=T)[1:].flip(0).cummin(0).values.flip(0)
        free = could & ~begins
        nats = torch.where(free, self.before[self.place[stop]] - self.before[self.place[:-1]], -torch.inf)
        sequences = (r.cu_seqlens.diff() > 0).sum()  # each begins a chunk
        wanted = torch.minimum((used * share).round().long() - sequences, free.sum())
        least = nats.sort(descending=True).values.gather(0, (wanted - 1).clamp(min=0)[None])
        return free & (nats >= least) & (wanted > 0), taught


def first(r: hk.Routing) -> Tensor:
    """(T,) bool: first positions of sequences"""
    T = len(r.boundary_prob)
    marks = torch.zeros(T + 1, dtype=torch.bool, device=r.cu_seqlens.device)  # empty sequences may begin at T
    return marks.index_fill_(0, r.cu_seqlens[:-1].long(), True)[:T]
