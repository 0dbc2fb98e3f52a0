"""Embeddings of the last few bytes together, an extension the published models do not use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hnet.config import NgramConfig

PRIME, FACTOR, SHIFT = 2**31 - 1, 1_640_531_527, 16  # of the hash; a trained table is worth nothing under another


class NgramEmbeddings(nn.Module):
    """sum_n weight[hash(the last n bytes)], n in config.sizes, each n with `config.rows` rows of its own.

    Frequent n-grams have a row almost to themselves, rare ones share theirs. The table starts at zero: a model begins
    as it would without. `dropout`: this share of the n-grams is dropped in training; else a corpus of few bytes, read
    again and again, is soon known by heart.
    """

    powers: Tensor
    first: Tensor

    def __init__(self, config: NgramConfig, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.rows, self.longest, self.dropout = config.rows, max(config.sizes), 0.0
        self.weight = nn.Parameter(torch.zeros(len(config.sizes) * config.rows, d_model))
        back = range(self.longest - 1, -1, -1)
        powers = [[pow(vocab_size + 1, k, PRIME) if k < n else 0 for k in back] for n in config.sizes]
        first = [i * config.rows for i in range(len(config.sizes))]
        self.register_buffer("powers", torch.tensor(powers), persistent=False)  # (sizes, longest)
        self.register_buffer("first", torch.tensor(first), persistent=False)  # (sizes,)

    def forward(self, recent: Tensor) -> Tensor:
        """recent (T, longest) int64: every byte after those before it, 0 where there are none -> (T, d_model)"""
        rows = F.embedding(self.index(recent), self.weight)
        if self.dropout and self.training:
            rows = rows * F.dropout(rows.new_ones(*rows.shape[:2], 1), self.dropout)
        return rows.sum(1)

    def index(self, recent: Tensor) -> Tensor:
        """(T, sizes) int64, rows of the table"""
        code = (recent[:, None] * self.powers).sum(-1) % PRIME
        return ((code * FACTOR) >> SHIFT) % self.rows + self.first
