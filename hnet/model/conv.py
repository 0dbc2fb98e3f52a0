"""Depthwise causal convolution over packed sequences, and the gated convolution mixer (layout letters c and C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hnet_kernels as hk

from .cache import ConvCache, Rows
from .pack import Pack


class GatedConv(nn.Module):
    """out_proj(conv(u) * silu(g)) with u, g = in_proj(x): a few taps of context, no state to scan."""

    def __init__(self, d_model: int, kernel_size: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.conv1d = DepthwiseConv1d(d_model, kernel_size)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, pack: Pack, cache: ConvCache | None = None, slots: Tensor | None = None) -> Tensor:
        x = self.in_proj(x)
        u, g = x.chunk(2, dim=-1)
        if cache is not None:
            cache.tail[slots] = last_rows(u, pack, cache.tail.shape[1])
        if x.device.type == "cpu":
            return self.out_proj(hk.gated_conv(x, self.conv1d.weight[:, 0], self.conv1d.bias, pack.cu_seqlens))
        return self.out_proj(self.conv1d(u, pack) * F.silu(g))

    def allocate_cache(self, batch: int, max_length: int) -> ConvCache:
        return ConvCache(self.in_proj.weight.new_zeros(batch, self.conv1d.kernel_size - 1, self.d_model))

    def step(self, x: Tensor, cache: ConvCache, rows: Rows) -> Tensor:
        u, g = self.in_proj(x).chunk(2, dim=-1)
        out, tail = self.conv1d.step(u, rows.take(cache.tail))
        rows.put(cache.tail, tail)
        return self.out_proj(out * F.silu(g))


class DepthwiseConv1d(nn.Module):
    """y_t = bias + sum_j weight[:, K-1-j] x_{t-j}, j < K, never past the start of a sequence.

    Parameters have the names and shapes of nn.Conv1d: weight (channels, 1, K), bias (channels,).
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        bound = kernel_size**-0.5  # as nn.Conv1d with one input channel a group
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: Tensor, pack: Pack) -> Tensor:
        return _CausalConv.apply(x, self.weight[:, 0], self.bias, pack.position)

    def step(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, channels), tail (n, K-1, channels) -> output and new tail"""
        rows = torch.cat([tail.to(x.dtype), x[:, None]], 1)
        out = (rows * self.weight[:, 0].T.to(x.dtype)).sum(1) + self.bias.to(x.dtype)
        return out, rows[:, 1:].to(tail.dtype)


def last_rows(x: Tensor, pack: Pack, count: int) -> Tensor:
    """(N, count, C): the last `count` rows of each sequence, zeros before its start."""
    index = pack.cu_seqlens[1:, None].long() - count + torch.arange(count, device=x.device)
    inside = index >= pack.cu_seqlens[:-1, None]
    return torch.where(inside[..., None], x[index.clamp(0, max(x.shape[0] - 1, 0))], 0)


class _CausalConv(torch.autograd.Function):
    """K shifted multiply-adds, forward and backward; autograd's own graph of slices would allocate K zero tensors."""

    @staticmethod
    def forward(ctx, x, weight, bias, position):
        ctx.save_for_backward(x, weight, position)
        taps = weight.to(x.dtype).T.contiguous()  # (K, C), oldest first
        K = taps.shape[0]
        y = torch.addcmul(bias.to(x.dtype), x, taps[K - 1])
        for j in range(1, min(K, x.shape[0])):
            inside = (position[j:] >= j).to(x.dtype)[:, None]
            y[j:].addcmul_(x[:-j] * inside, taps[K - 1 - j])
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, position = ctx.saved_tensors
        taps = weight.to(dy.dtype).T.contiguous()
        K = taps.shape[0]
        dx = dy * taps[K - 1]
        dw = torch.zeros(weight.shape[::-1], dtype=torch.float32, device=x.device)
        dw[K - 1] = (dy * x).sum(0, dtype=torch.float32)
        for j in range(1, min(K, x.shape[0])):
            inside = dy[j:] * (position[j:] >= j).to(dy.dtype)[:, None]
            dx[:-j].addcmul_(inside, taps[K - 1 - j])
            dw[K - 1 - j] = (inside * x[:-j]).sum(0, dtype=torch.float32)
        return dx, dw.T.to(weight.dtype), dy.sum(0, dtype=torch.float32).to(weight.dtype), None
