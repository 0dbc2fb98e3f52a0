"""Tables of rows of which a step reads few, such as embeddings of n-grams: sums of rows, their gradient row by row,
and AdamW that visits no other rows. fp32, on a CPU, by the native extension (`usable`), with nothing for autograd or a
compiler to see; elsewhere the table is an embedding like any other.

    sum_rows       out_t = sum_j scale_tj table[index_tj]
    row_gradient   of that, for every row that was read
    adamw_         m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  p <- p - c_s m / (sqrt v + eps sqrt(1 - b2^s))
                   c_s = rate_s sqrt(1 - b2^s) / (1 - b1^s), step s from 1

**Rows that are not read** have no gradient, but AdamW moves them by their old momentum. `adamw_` makes up for these
steps when the row is next asked for, one after the other, until (b1 / sqrt b2)^k, the size of an update k steps after
the last gradient, is lost in rounding (`tail` steps). It may be asked for at any time, of any rows, as often as one
likes, without changing a bit of what comes out in the end.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, native
from .validation import check_matrix, check_tensor

LOST = 1e-9  # of an update: nothing, in fp32
MOST = 1000  # steps of a tail; slower than that no momentum fades


class Groups(NamedTuple):
    """The entries of an index (T, count) by the row they name, without those whose scale is 0."""

    rows: Tensor  # (U,) int64, rising
    order: Tensor  # (T count,) int64, entries of the flat index, those of a row together, in their order; then anything
    begin: Tensor  # (U + 1,) int64, where in `order` each row's begin


def usable(table: Tensor) -> bool:
    """Whether the functions below take it here."""
    return table.device.type == "cpu" and table.dtype == torch.float32 and dispatch.native_error() is None


def tail(beta1: float, beta2: float) -> int | None:
    """Steps after which old momentum moves a row no more; None: it may not fade, and rows must be updated densely."""
    ratio = beta1 / math.sqrt(beta2) if beta2 else math.inf
    if ratio == 0:
        return 1
    steps = math.ceil(math.log(LOST) / math.log(ratio)) if ratio < 1 else MOST + 1
    return steps if steps <= MOST else None


def group_rows(index: Tensor, num_rows: int, scale: Tensor | None = None) -> Groups:
    """index: (T, count) int64, rows of a table of `num_rows`; scale: as in `sum_rows`. Raises ValueError where an index
    is not in the table."""
    check_index(index, scale)
    return Groups(*native.group_rows(index, scale, num_rows))


def check_index(index: Tensor, scale: Tensor | None) -> None:
    check_tensor("index", index)
    if index.dim() != 2 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 of shape (T, count), got {index.dtype} {tuple(index.shape)}")
    if scale is not None and (scale.shape != index.shape or scale.dtype != torch.float32):
        raise ValueError(f"scale must be fp32 of shape {tuple(index.shape)}, got {scale.dtype} {tuple(scale.shape)}")


def sum_rows(table: Tensor, index: Tensor, scale: Tensor | None = None) -> Tensor:
    """(T, D) fp32: the sum of the rows named in index (T, count), each times scale (T, count) fp32 if there is one.

    Raises:
        TypeError, ValueError: table is not (R, D) fp32, scale not like index, or a row is not in the table.
    """
    check_matrix("table", table)
    if table.dtype != torch.float32:
        raise TypeError(f"table must be fp32, got {table.dtype}")
    check_index(index, scale)
    return native.sum_rows(table, index, scale)


def row_gradient(dout: Tensor, groups: Groups, count: int, scale: Tensor | None = None) -> Tensor:
    """(U, D) fp32: the gradient of `sum_rows` for the rows of `groups`, in the order of positions; of dout (T, D)"""
    return native.row_gradient(dout.float(), groups, count, scale)


def adamw_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    rows: Tensor,
    gradient: Tensor | None,
    done: int,
    recent: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Brings rows up to step `done` and, with a gradient, takes step done + 1 with them. In place.

    Args:
        weight, exp_avg, exp_avg_sq: (R, D) fp32, contiguous.
        steps: (R, 2) int32, contiguous: of which step a row's moments are (0: none yet), and of which its weight.
        rows: (U,) int64, rising.
        gradient: (U, D) fp32, or None: only catch up.
        done: steps taken before.
        recent: (ring,) fp32, c_s at s % ring; with those of the steps that rows have missed, ring > `tail` of them.
        betas, eps: of AdamW. There is no weight decay.

    Raises:
        ValueError: a row is not in the table, or they do not rise; a shape or dtype is another; betas without a tail.
    """
    for name, x in (("weight", weight), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if x.dtype != torch.float32 or x.shape != weight.shape or x.dim() != 2 or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous fp32 (R, D), got {x.dtype} {tuple(x.shape)}")
    if steps.dtype != torch.int32 or steps.shape != (weight.shape[0], 2) or not steps.is_contiguous():
        raise ValueError(f"steps must be int32 ({weight.shape[0]}, 2), got {steps.dtype} {tuple(steps.shape)}")
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(f"rows must be int64 (U,), got {rows.dtype} {tuple(rows.shape)}")
    if gradient is not None and (gradient.dtype != torch.float32 or gradient.shape != (len(rows), weight.shape[1])):
        given = f"{gradient.dtype} {tuple(gradient.shape)}"
        raise ValueError(f"gradient must be fp32 ({len(rows)}, {weight.shape[1]}), got {given}")
    felt = tail(*betas)
    if felt is None or len(recent) <= felt:
        raise ValueError(f"recent must hold more than the {felt} steps of betas {betas}, got {len(recent)}")
    native.rows_adamw(weight, exp_avg, exp_avg_sq, steps, rows, gradient, done, recent, *betas, eps, felt)
