"""Embeddings of the last few bytes together, an extension the published models do not use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hnet.config import NgramConfig
from hnet_kernels import rows as table_rows

PRIME, FACTOR, SHIFT = 2**31 - 1, 1_640_531_527, 16  # of the hash; a trained table is worth nothing under another


class NgramEmbeddings(nn.Module):
    """sum_n weight[hash(the last n bytes)], n in config.sizes, each n with `config.rows` rows of its own.

    Frequent n-grams have a row almost to themselves, rare ones share theirs. The table starts at zero: a model begins
    as it would without. `dropout`: this share of the n-grams is dropped in training; else a corpus of few bytes, read
    again and again, is soon known by heart.

    `before_reading`: if set, called with the rows (U,) int64, rising, that are about to be read, or with None: all; and
    the gradient of the table is sparse, of the rows that were read (hnet/train/table_adamw.py).
    """

    powers: Tensor
    first: Tensor
    before_reading: Callable[[Tensor | None], None] | None

    def __init__(self, config: NgramConfig, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.rows, self.longest, self.dropout = config.rows, max(config.sizes), 0.0
        self.weight = nn.Parameter(torch.zeros(len(config.sizes) * config.rows, d_model))
        back = range(self.longest - 1, -1, -1)
        powers = [[pow(vocab_size + 1, k, PRIME) if k < n else 0 for k in back] for n in config.sizes]
        first = [i * config.rows for i in range(len(config.sizes))]
        self.register_buffer("powers", torch.tensor(powers), persistent=False)  # (sizes, longest)
        self.register_buffer("first", torch.tensor(first), persistent=False)  # (sizes,)
        self.before_reading = None
        self.register_state_dict_pre_hook(_bring_up_to_date)

    def forward(self, recent: Tensor) -> Tensor:
        """recent (T, longest) int64: every byte after those before it, 0 where there are none -> (T, d_model)"""
        index = self.index(recent)
        scale = None
        if self.dropout and self.training:
            scale = F.dropout(self.weight.new_ones(*index.shape, 1), self.dropout)
        if self.before_reading is not None:
            scale = None if scale is None else scale[..., 0]
            groups = table_rows.group_rows(index, len(self.weight), scale)
            self.before_reading(groups.rows)
            return _SumRows.apply(self.weight, index, scale, groups)
        rows = F.embedding(index, self.weight)
        return (rows if scale is None else rows * scale).sum(1)

    def index(self, recent: Tensor) -> Tensor:
        """(T, sizes) int64, rows of the table"""
        code = (recent[:, None] * self.powers).sum(-1) % PRIME
        return ((code * FACTOR) >> SHIFT) % self.rows + self.first


def _bring_up_to_date(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    assert isinstance(module, NgramEmbeddings)
    if module.before_reading is not None:
        module.before_reading(None)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, index, scale, groups):
        ctx.groups, ctx.count, ctx.shape = groups, index.shape[1], weight.shape
        ctx.save_for_backward(scale)
        return table_rows.sum_rows(weight, index, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (scale,) = ctx.saved_tensors
        values = table_rows.row_gradient(dout, ctx.groups, ctx.count, scale)
        gradient = torch.sparse_coo_tensor(
            ctx.groups.rows[None], values, ctx.shape, is_coalesced=True, check_invariants=False
        )
        return gradient, None, None, None
