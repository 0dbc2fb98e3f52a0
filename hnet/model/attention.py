"""Causal multi-head attention with rotary positions over packed sequences, optionally in a sliding window."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hnet_kernels as hk

from .cache import AttentionCache, Rows, allocate_kv, write_kv
from .pack import Pack, rotary


class CausalAttention(nn.Module):
    """window_size w: each position sees itself and the w before it; -1: all before it."""

    def __init__(self, d_model: int, num_heads: int, rotary_emb_dim: int, window_size: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self.rotary_dim, self.window = rotary_emb_dim, window_size
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def qkv(self, x: Tensor, position: Tensor, tables: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """q and k, rotated, (T, 2, heads, head_dim); v (T, heads, head_dim). tables: cos and sin, where they are."""
        qk, v = self.Wqkv(x).view(x.shape[0], 3, self.num_heads, self.head_dim).split([2, 1], dim=1)
        if self.rotary_dim:
            qk = rotate(qk, *(tables or rotary(position, self.rotary_dim)))
        return qk, v[:, 0]

    def forward(
        self, x: Tensor, pack: Pack, cache: AttentionCache | None = None, slots: Tensor | None = None
    ) -> Tensor:
        if cache is None and x.device.type == "cpu":
            qkv = self.Wqkv(x).view(x.shape[0], 3, self.num_heads, self.head_dim)
            return self.out_proj(fused(qkv, pack, self.window, self.rotary_dim).reshape(x.shape))
        qk, v = self.qkv(x, pack.position, pack.rotary(self.rotary_dim) if self.rotary_dim else None)
        if cache is not None and slots is not None:
            self._fill(cache, qk[:, 1], v, pack, slots)
        return self.out_proj(attention(qk, v, pack, self.window).reshape(x.shape))

    def allocate_cache(self, batch: int, max_length: int) -> AttentionCache:
        return allocate_kv(batch, self.num_heads, self.head_dim, max_length, self.window, self.Wqkv.weight)

    def _fill(self, cache: AttentionCache, k: Tensor, v: Tensor, pack: Pack, slots: Tensor) -> None:
        longest = max(pack.lengths, default=0)
        cache.reserve(longest)
        length = pack.cu_seqlens.diff().long()
        # a ring keeps the last rows only; writing the older ones first would leave their order to chance
        keep = (
            (pack.position >= (length - cache.capacity)[pack.seq_idx.long().clamp(max=pack.N - 1)]).nonzero().flatten()
        )
        at = pack.position[keep].long() % cache.capacity
        write_kv(cache, k[keep], v[keep], slots[pack.seq_idx[keep].long()], at)

    def step(self, x: Tensor, cache: AttentionCache, rows: Rows) -> Tensor:
        """One new position for each slot: x (n, d_model). Every row of the cache is attended to, the unwritten ones
        under a mask, so that shapes change only when the cache grows."""
        dim = self.rotary_dim
        tables = rows.shared(("rotary", dim), lambda: rotary(rows.position, dim)) if dim else None
        qk, v = self.qkv(x, rows.position, tables)
        q, k = qk.unbind(1)
        size = cache.capacity
        write_kv(cache, k, v, rows.slots, rows.shared(("ring", size), lambda: rows.position % size))
        seen = rows.shared(("seen", size), lambda: _seen(rows, size))
        if rows.order == "all":  # the queries go to their keys, which are not copied
            q = torch.empty_like(q).index_copy_(0, rows.slots, q)
            out = self._attend(q, cache.k, cache.v, seen)[rows.slots]
        else:
            out = self._attend(q, rows.take(cache.k), rows.take(cache.v), seen)
        return self.out_proj(out.reshape(x.shape).to(x.dtype))

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """One query a sequence, q (n, heads, width), against its keys k, v (n, capacity, heads, width)."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q[:, :, None].to(k.dtype), k, v, attn_mask=seen)


def _seen(rows: Rows, capacity: int) -> Tensor:
    """(n, 1, 1, capacity) bool: the rows of a cache that were written, the new position's too; of a full ring all."""
    before = rows.length if rows.order == "all" else rows.position
    return (torch.arange(capacity, device=before.device) <= before[:, None])[:, None, None]


# --- rotary -------------------------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2 * cos.shape[-1] channels of x (T, 2, heads, head_dim), in halves (not interleaved)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype), rest], -1)


def fused(qkv: Tensor, pack: Pack, window: int, rotary_dim: int) -> Tensor:
    """Rotation and attention in one op. qkv (T, 3, heads, head_dim) -> (T, heads, head_dim)"""
    if not rotary_dim:
        return hk.attention(qkv, pack.cu_seqlens, window)
    cos, sin = pack.rotary(rotary_dim)
    return hk.attention(qkv, pack.cu_seqlens, window, (cos.flatten(1), sin.flatten(1)))


# --- packed attention ---------------------------------------------------------------------------------------------


def attention(qk: Tensor, v: Tensor, pack: Pack, window: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence and window.

    qk (T, 2, heads, head_dim), v (T, heads, head_dim) -> (T, heads, head_dim); padding rows of a budget give 0.
    """
    if v.is_cuda and v.dtype in (torch.bfloat16, torch.float16) and (varlen := _cuda_varlen()) is not None:
        return _unpadded(varlen, qk, v, pack, window)
    if not pack.groups.shapes:
        return torch.zeros_like(v)
    if v.device.type == "cpu":  # bf16 attention is several times slower there
        with torch.autocast("cpu", enabled=False):
            return _by_length(qk.float(), v.float(), pack, window).to(v.dtype)
    return _by_length(qk, v, pack, window)


def _unpadded(varlen, qk: Tensor, v: Tensor, pack: Pack, window: int) -> Tensor:
    """Such kernels neither read nor write padding rows, forward or backward: those would hold what memory held."""
    if not pack.padded:
        return varlen(*qk.unbind(1), v, pack, window)
    real = (pack.seq_idx < pack.N)[:, None, None]
    qk, v = torch.where(real[:, None], qk, 0), torch.where(real, v, 0)
    return torch.where(real, varlen(*qk.unbind(1), v, pack, window), 0)


def _by_length(qk: Tensor, v: Tensor, pack: Pack, window: int) -> Tensor:
    """Dense attention on the pack's groups of about equal length. What pads a sequence comes after it, so causality
    hides it; scores exist neither across sequences nor beyond the window."""
    shapes, rows, size = pack.groups
    T, heads, width = v.shape
    if rows is not None:
        qk, v = _PutRows.apply(qk[: len(rows)], rows, size), _PutRows.apply(v[: len(rows)], rows, size)
    blocks, base = [], 0
    for n, longest in shapes:
        part = slice(base, base + n * longest)
        q, k = qk[part].view(n, longest, 2, heads, width).permute(2, 0, 3, 1, 4)
        out = _dense(q, k, v[part].view(n, longest, heads, width).transpose(1, 2), window)
        blocks.append(out.transpose(1, 2).reshape(n * longest, heads, width))
        base += n * longest
    out = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
    if rows is None:
        return out
    out = _TakeRows.apply(out, rows)
    return F.pad(out, (0, 0, 0, 0, 0, T - len(rows)))


class _PutRows(torch.autograd.Function):
    """out[rows] = x, zero elsewhere; rows are distinct, so the gradient is a plain gather."""

    @staticmethod
    def forward(ctx, x, rows, size):
        ctx.save_for_backward(rows)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _TakeRows(torch.autograd.Function):
    """x[rows]; rows are distinct, so the gradient is a plain copy, not a sum."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.size = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, *ctx.saved_tensors, grad), None


def _dense(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """(n, heads, L, head_dim), every sequence as long as the longest"""
    L = q.shape[2]
    if window < 0 or window + 1 >= L:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    block = max(64, -(-window // 64) * 64)
    if 2 * block >= L:  # blocks would save nothing
        distance = torch.arange(L, device=q.device)[:, None] - torch.arange(L, device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance <= window))
    return _windowed(q, k, v, window, block)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, block: int) -> Tensor:
    """Blocks of at least `window` queries, each against its own and the previous block of keys."""
    n, heads, L, width = q.shape
    count = -(-L // block)
    q, k, v = (F.pad(x, (0, 0, 0, count * block - L)).view(n, heads, count, block, width) for x in (q, k, v))
    k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], 3) for x in (k, v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_window_mask(n, count, block, window, q.device))
    return out.view(n, count, heads, block, width).transpose(1, 2).reshape(n, heads, count * block, width)[:, :, :L]


def _window_mask(n: int, count: int, block: int, window: int, device: torch.device) -> Tensor:
    """(n * count, 1, block, 2 * block) bool: key j of a block lies block - j before its first query"""
    i = torch.arange(block, device=device)[:, None]
    distance = i + block - torch.arange(2 * block, device=device)
    band = (distance >= 0) & (distance <= window)
    real = (torch.arange(count, device=device) > 0)[:, None, None] | (torch.arange(2 * block, device=device) >= block)
    return (band & real).repeat(n, 1, 1)[:, None]


@functools.cache
def _cuda_varlen():
    """flash attention over packed sequences on a GPU: PyTorch's own, else the flash-attn package, else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        def torch_varlen(q, k, v, pack, window):
            cu, m = pack.cu_seqlens, pack.max_seqlen
            return varlen_attn(q, k, v, cu, cu, m, m, window_size=(window, 0))

        return torch_varlen
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_varlen_func

        def flash_varlen(q, k, v, pack, window):
            cu, m = pack.cu_seqlens, pack.max_seqlen
            return flash_attn_varlen_func(
                q, k, v, cu, cu, m, m, causal=True, window_size=(window, 0 if window >= 0 else -1)
            )

        return flash_varlen
    except ImportError:
        return None
