"""The result of routing, which every other op reads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Where the chunks of a packed batch begin. T positions, N sequences, M chunks.

    With `max_chunks=K`, M is K: rows from `num_chunks` on are padding (`chunk_start` = end of the last sequence).
    """

    boundary_prob: Tensor  # (T,) fp32, p_t in [0, 1]; 1 at the first position of every sequence
    boundary_mask: Tensor  # (T,) bool, b_t
    selected_prob: Tensor  # (T,) fp32, c_t = p_t if b_t else 1 - p_t
    chunk_index: Tensor  # (T,) int32, the chunk a position belongs to
    chunk_start: Tensor  # (M,) int32, first position of each chunk
    cu_chunks: Tensor  # (N+1,) int32, chunks before each sequence: the cu_seqlens of the inner stage
    cu_seqlens: Tensor  # (N+1,) int32, as given to `route`
    prob_sum: Tensor  # (N,) fp32, sum of boundary_prob over each sequence (differentiable; what the ratio loss reads)
    entropy_sum: Tensor  # (N,) fp32, sum over each sequence of the entropy of boundary_prob in nats (differentiable)
    num_dropped: Tensor  # () int32, boundaries dropped by the budget

    @property
    def num_chunks(self) -> Tensor:
        """() int32 on the device: chunks in the pack, without padding."""
        return self.cu_chunks[-1]
