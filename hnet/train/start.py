"""What only the data can tell about a configuration, settled before anything is written: steps of an epoch, sizes of
packs, targets and budgets that cannot be met."""

from __future__ import annotations

import math

import torch

from hnet.data.corpus import Corpus, Source
from hnet.data.mixture import Mixture
from hnet.data.pack_stream import PackStream
from hnet.data.packing import Packed
from hnet.errors import UserError
from hnet.model.hnet import candidates
from hnet.model.pack import Pack

from .config import TrainConfig

SAMPLE = 1 << 20  # positions looked at
CLOSE = 0.98  # what a sample says is believed this far


def pack_size(config: TrainConfig, processes: int) -> int:
    """Positions of a micro-batch of one process.

    Raises:
        ValueError: batch_bytes does not divide, or a sequence does not fit.
    """
    packs = config.accumulation * processes
    if config.batch_bytes % packs:
        raise UserError(
            f"batch_bytes must be a multiple of accumulation x processes = {packs}, got {config.batch_bytes}"
        )
    size = config.batch_bytes // packs
    if config.seq_len > size:
        raise UserError(
            f"seq_len must be at most a micro-batch, batch_bytes / (accumulation x processes) = {config.batch_bytes} / "
            f"{packs} = {size}, got {config.seq_len}: longer sequences would be cut"
        )
    return size


def settle_steps(config: TrainConfig, train: Source | Mixture) -> None:
    """Turn `epochs` into `steps`, which is what config.toml then has.

    Raises:
        ValueError: nobody knows how long an epoch is.
    """
    if not config.epochs:
        return
    if not isinstance(train, Corpus):
        raise UserError(
            "epochs must be left out where nobody knows how long the data are (streams, mixtures), got "
            f"{config.epochs:g}: give steps"
        )
    positions = train.num_bytes + len(train)  # of an epoch: a target for every byte, and one for every end
    config.steps, config.epochs = max(round(config.epochs * positions / config.batch_bytes), 1), 0.0


def check_reach(config: TrainConfig, stream: PackStream, pack: int) -> None:
    """Refuse what these documents rule out, judged by a sample of them. Nothing is known of a stream.

    Raises:
        ValueError: a target shorter than `boundaries` allows or longer than the documents, or max_chunks with less
            room than the sequences of a micro-batch take, each of which begins a chunk.
    """
    if not isinstance(stream.source, Corpus):
        return
    sample = stream.ahead(SAMPLE)
    sequences = (len(sample.cu_seqlens) - 1) / len(sample)  # for each position
    share = candidate_share(sample, config.boundaries)
    for share_of_pack in config.max_chunks:
        room, needed = math.ceil(share_of_pack * pack), sequences * pack
        if room < CLOSE * needed:
            raise UserError(
                f"max_chunks must leave room for the first chunk of every sequence: {share_of_pack:g} of a "
                f"micro-batch's {pack} bytes is {room} chunks, and these documents make about {needed:.0f} sequences "
                f"of it; at least {needed / pack:.2g} here"
            )
    for name in ("compression", "compression_start"):
        positions = 1.0
        for stage, target in enumerate(getattr(config, name)):
            if stage == 0 and target * share < CLOSE:
                raise UserError(
                    f"{name} of stage 0 must be at least {1 / share:.3g} here, got {target:g}: with boundaries = "
                    f"{config.boundaries!r} a chunk may begin at {share:.0%} of the positions of these documents"
                )
            positions *= target
            if positions * sequences * CLOSE > 1:
                raise UserError(
                    f"{name} asks for {positions:g} bytes a chunk at stage {stage}, but the sequences of these "
                    f"documents have {1 / sequences:.3g} on average, and each begins a chunk: lower it, or make longer "
                    "documents or sequences (documents, seq_len)"
                )


def candidate_share(sample: Packed, boundaries: str) -> float:
    """Share of the positions where a chunk may begin."""
    if boundaries == "any":
        return 1.0
    batch = sample.batch()
    allowed = candidates(boundaries, batch.input_ids, Pack(batch.cu_seqlens, len(sample)))
    allowed[batch.cu_seqlens[:-1].long()] = True
    return allowed.to(torch.float64).mean().item()
