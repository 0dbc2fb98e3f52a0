"""Every op in plain PyTorch: the definition the kernels are tested against.

Differentiable by autograd, runs on any device, computes in fp64 for fp64 inputs and in fp32 otherwise. Backend
`reference` runs these; the formulas are those of the H-Net paper (arXiv 2507.07955, section 2.2), of `mamba2` those of
Mamba-2 (arXiv 2405.21060).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import Routing

P_MIN, P_MAX = 1e-4, 1 - 1e-4


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def sequence_of(cu_seqlens: Tensor, T: int) -> Tensor:
    """(T,) int64: the sequence each position belongs to (N for padding after the last one)."""
    positions = torch.arange(T, device=cu_seqlens.device, dtype=torch.int32)
    return torch.bucketize(positions, cu_seqlens[1:].contiguous(), right=True)


def starts(cu_seqlens: Tensor, T: int) -> Tensor:
    """(T,) bool: the first position of every sequence."""
    seq = sequence_of(cu_seqlens, T)
    first = torch.ones_like(seq, dtype=torch.bool)
    first[1:] = seq[1:] != seq[:-1]
    return first & (torch.arange(T, device=seq.device) < cu_seqlens[-1])


# --- route --------------------------------------------------------------------------------------------------------


def boundary_probability(q: Tensor, k: Tensor, logit_bias: float | Tensor) -> Tensor:
    """p = (1 - cos(q, k)) / 2 for each row of q (the position before) and k (this one), moved by the logit bias."""
    cos = (F.normalize(upcast(q), dim=-1, eps=1e-12) * F.normalize(upcast(k), dim=-1, eps=1e-12)).sum(-1)
    p = ((1 - cos) / 2).clamp(0, 1)
    scale = torch.as_tensor(logit_bias, dtype=p.dtype, device=p.device).exp()
    return p * scale / (1 - p + p * scale)


def entropy(p: Tensor) -> Tensor:
    """Binary entropy in nats, -p ln p - (1 - p) ln(1 - p). Derivative ln((1 - p) / p), but 0 at p = 0 and p = 1."""
    sure = (p <= 0) | (p >= 1)
    inside = torch.where(sure, 0.5, p)
    return torch.where(sure, 0, -(inside * inside.log() + (1 - inside) * (-inside).log1p()))


def drop_past_budget(mask: Tensor, p: Tensor, first: Tensor, budget: int) -> Tensor:
    """Keep the `budget` most probable boundaries (ties: the earlier one), first positions before all others."""
    key = torch.where(first, 2.0, torch.where(mask, p, -1.0))
    keep = torch.zeros_like(mask).scatter(0, key.sort(descending=True, stable=True).indices[:budget], True)
    return mask & keep


def route(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    logit_bias: float | Tensor | None = None,
    candidates: Tensor | None = None,
    max_chunks: int | None = None,
    padded: bool = False,
) -> Routing:
    T, N = q.shape[0], cu_seqlens.shape[0] - 1
    if padded:  # whatever the padding rows hold, not even its product with a zero gradient may come through
        real = (torch.arange(T, device=q.device) < cu_seqlens[-1])[:, None]
        q, k = torch.where(real, q, 0), torch.where(real, k, 0)
    with torch.autocast(q.device.type, enabled=False):
        p = boundary_probability(q[:-1], k[1:], 0.0 if logit_bias is None else logit_bias)
    first, seq = starts(cu_seqlens, T), sequence_of(cu_seqlens, T)
    p = torch.where(first, 1.0, F.pad(p, (1, 0))[:T])
    p = torch.where(seq < N, p, 0.0)

    mask = p > 0.5
    if candidates is not None:
        mask = mask & (candidates | first)
    total = mask.sum(dtype=torch.int32)
    if max_chunks is not None:
        mask = drop_past_budget(mask, p.detach(), first, max_chunks)
    selected = torch.where(mask, p, 1 - p)

    count = mask.cumsum(0, dtype=torch.int32)
    cu_chunks = F.pad(count, (1, 0))[cu_seqlens.long()]
    if max_chunks is None:
        chunk_start = mask.nonzero().flatten().to(torch.int32)
    else:
        slot = torch.where(mask, count - 1, max_chunks).long()  # one slot too many, to throw the others away
        chunk_start = cu_seqlens[-1].expand(max_chunks + 1).clone()
        chunk_start = chunk_start.scatter(0, slot, torch.arange(T, device=q.device, dtype=torch.int32))[:max_chunks]
    prob_sum, entropy_sum = (p.new_zeros(N + 1).index_add(0, seq, x)[:N] for x in (p, entropy(p)))
    layout = count - 1, chunk_start, cu_chunks, cu_seqlens
    return Routing(p, mask, selected, *layout, prob_sum, entropy_sum, total - cu_chunks[-1])


def route_step(
    q_prev: Tensor,
    k: Tensor,
    is_first: Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q_prev.device.type, enabled=False):
        p = boundary_probability(q_prev, k, 0.0 if logit_bias is None else logit_bias)
    mask = p > 0.5 if candidates is None else (p > 0.5) & candidates
    if is_first is not None:
        p, mask = torch.where(is_first, 1.0, p), mask | is_first
    return p, mask, torch.where(mask, p, 1 - p)


# --- pool ---------------------------------------------------------------------------------------------------------


def pool(x: Tensor, r: Routing, mode: str) -> Tensor:
    T, D = x.shape
    M = r.chunk_start.shape[0]
    real = (torch.arange(M, device=x.device) < r.num_chunks)[:, None]
    begin = r.chunk_start.long()
    end = torch.cat([begin[1:], r.cu_seqlens[-1:].long()])  # padding chunks begin, and so end, at the last position
    if T == 0:
        return x.new_zeros(M, D)
    if mode in ("boundary", "last"):
        row = begin if mode == "boundary" else end - 1
        return torch.where(real, x[row.clamp(0, T - 1)], 0)
    chunk = torch.where(sequence_of(r.cu_seqlens, T) < r.cu_seqlens.shape[0] - 1, r.chunk_index, M).long()
    if mode == "mean":
        total = upcast(x).new_zeros(M + 1, D).index_add(0, chunk, upcast(x))[:M]
        return (total / (end - begin).clamp(min=1)[:, None]).to(x.dtype)
    # max: the first row of the chunk that attains it, so that the gradient has one address
    column = chunk[:, None].expand(T, D)
    top = x.detach().new_zeros(M + 1, D).scatter_reduce(0, column, x.detach(), "amax", include_self=False)
    hit = (x.detach() == top[chunk]) | x.detach().isnan()
    rows = torch.where(hit, torch.arange(T, device=x.device)[:, None], T)
    arg = rows.new_full((M + 1, D), T).scatter_reduce(0, column, rows, "amin")[:M]
    return torch.where(real, x.gather(0, arg.clamp(max=T - 1)), 0)


# --- ema and dechunk ----------------------------------------------------------------------------------------------


def linear_recurrence(x: Tensor, a: Tensor, reach: int) -> Tensor:
    """y_t = a_t y_{t-1} + x_t by doubling: after step s, y_t holds the terms from the last 2^s positions."""
    T = x.shape[0]
    shift = 1
    while shift < reach:
        x_before = F.pad(x, (0, 0, shift, 0)).narrow(0, 0, T)
        a_before = F.pad(a, (shift, 0)).narrow(0, 0, T)
        x, a = x + a[:, None] * x_before, a * a_before
        shift *= 2
    return x


def ema(z: Tensor, p: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    T, D = z.shape
    N = cu_seqlens.shape[0] - 1
    first = starts(cu_seqlens, T)
    p = upcast(p)
    x = p[:, None] * upcast(z)
    state = upcast(z).new_zeros(N, D) if initial_state is None else upcast(initial_state)
    if initial_state is not None and N and T:
        seq = sequence_of(cu_seqlens, T).clamp(max=N - 1)
        x = x + torch.where(first, 1 - p, 0)[:, None] * state[seq]
    y = linear_recurrence(x, torch.where(first, 0, 1 - p), T)
    if N == 0 or T == 0:
        return y.to(z.dtype), state.clone()
    empty = (cu_seqlens[1:] == cu_seqlens[:-1])[:, None]
    final = torch.where(empty, state, y[(cu_seqlens[1:].long() - 1).clamp(min=0)])
    return y.to(z.dtype), final


# A chunk's P is above 1/2, so y_{m-128} weighs less than 2^-128 in y_m: the scan need not reach further.
DECHUNK_REACH = 128


def dechunk(z: Tensor, r: Routing, residual: Tensor | None = None) -> Tensor:
    T = r.chunk_index.shape[0]
    M, D = z.shape
    if T == 0:
        return z.new_zeros(0, D)
    valid = (torch.arange(T, device=z.device) < r.cu_seqlens[-1])[:, None]
    real = (torch.arange(M, device=z.device) < r.num_chunks)[:, None]
    p = r.boundary_prob[r.chunk_start.long().clamp(max=T - 1)].clamp(P_MIN, P_MAX)
    a = torch.where(starts(r.cu_chunks, M), 0, 1 - p)
    y = linear_recurrence(p[:, None] * torch.where(real, upcast(z), 0), a, DECHUNK_REACH)
    confidence = 1 + (r.selected_prob - r.selected_prob.detach())  # straight-through: forward 1, backward identity
    out = confidence[:, None] * y[r.chunk_index.long().clamp(min=0)]
    if residual is not None:
        out = out + upcast(residual)
    return torch.where(valid, out, 0).to(z.dtype)


def dechunk_step(
    z: Tensor, boundary_prob: Tensor, boundary_mask: Tensor, state: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    p = boundary_prob.clamp(P_MIN, P_MAX)[:, None]
    state = torch.where(boundary_mask[:, None], (1 - p) * state + p * upcast(z), state)
    out = state if residual is None else state + upcast(residual)
    return out.to(z.dtype), state


# --- what stands between the matrix products of a layer ---------------------------------------------------------------


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = upcast(x) if residual is None else residual + x
    return F.rms_norm(total, (x.shape[1],), weight.to(total.dtype), eps).to(x.dtype), total


def gated_conv(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    u, gate = upcast(x).chunk(2, dim=1)
    seq, T, K = sequence_of(cu_seqlens, x.shape[0]), x.shape[0], weight.shape[1]
    y = u * weight[:, K - 1].to(u.dtype) + bias.to(u.dtype)
    for j in range(1, min(K, T)):
        inside = (seq[j:] == seq[:-j])[:, None]
        y = y + F.pad(torch.where(inside, u[:-j], 0) * weight[:, K - 1 - j].to(u.dtype), (0, 0, j, 0))
    return (y * F.silu(gate)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2 * half channels of x (L, heads, width), in halves, by tables (L, half)."""
    half, cos, sin = cos.shape[1], cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


def attention(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, cu_seqlens: Tensor, window: int) -> Tensor:
    blocks, cu = [], cu_seqlens.tolist()
    for begin, end in zip(cu[:-1], cu[1:], strict=True):
        q, k, v = upcast(qkv[begin:end]).unbind(1)
        if cos is not None and sin is not None:
            q, k = (rotate(x, cos[begin:end], sin[begin:end]) for x in (q, k))
        i = torch.arange(end - begin, device=qkv.device)
        distance = i[:, None] - i
        seen = (distance >= 0) & (distance <= window) if window >= 0 else distance >= 0
        score = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
        p = score.masked_fill(~seen, -torch.inf).softmax(-1)
        blocks.append(torch.einsum("hij,jhd->ihd", p, v))
    blocks.append(upcast(qkv[cu[-1] :, 2]) * 0)  # padding
    return torch.cat(blocks).to(qkv.dtype)


def swiglu(x: Tensor) -> Tensor:
    y, gate = x.chunk(2, dim=1)
    return F.silu(gate) * y


def cross_entropy(logits: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    x, entropy = upcast(logits), None
    if with_entropy:
        log_p = x.detach().log_softmax(-1)
        entropy = torch.special.entr(log_p.exp()).sum(-1)
    return F.cross_entropy(x, targets, reduction="none"), entropy


def mamba2(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    T, H, d_inner, (channels, K) = zxbcdt.shape[0], A_log.shape[0], norm_weight.shape[0], conv_weight.shape
    seq = sequence_of(cu_seqlens, T)
    valid = (torch.arange(T, device=zxbcdt.device) < cu_seqlens[-1])[:, None]
    z, xbc, dt = torch.where(valid, upcast(zxbcdt), 0).split([d_inner, channels, H], 1)
    before, seq_before = F.pad(xbc, (0, 0, K - 1, 0)), F.pad(seq, (K - 1, 0), value=-1)
    conv = conv_bias
    for j in range(K):  # the oldest of a position's K rows first
        conv = conv + conv_weight[:, j] * torch.where((seq_before[j : j + T] == seq)[:, None], before[j : j + T], 0)
    S = (channels - d_inner) // 2
    x, B, C = F.silu(conv).split([d_inner, S, S], 1)
    x = x.reshape(T, H, d_inner // H)
    y = ssd(x, F.softplus(dt + dt_bias), -A_log.exp(), B, C, seq) + D[:, None] * x
    out = F.rms_norm(y.flatten(1) * F.silu(z), (d_inner,), norm_weight, eps)
    return torch.where(valid, out, 0).to(zxbcdt.dtype)


SSD_CHUNK = 64  # positions a matrix product; measured best on a CPU (16: 14x slower, 256: 3.5x)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, seq: Tensor, chunk: int = SSD_CHUNK) -> Tensor:
    """The scan as matrix products over chunks of positions.

    x (T, H, P), dt (T, H), A (H,) negative, B and C (T, S), all fp32; seq (T,) the sequence of each position, not
    decreasing. Returns y (T, H, P). Within a chunk, y = (C B^T * decay) (dt x); the state at each chunk's end is handed
    on by `pass_states`. Decay is zero wherever a sequence boundary lies between.
    """
    T, H, P = x.shape
    n = max(-(-T // chunk), 1)
    pad = n * chunk - T
    xdt = F.pad(x * dt[..., None], (0, 0, 0, 0, 0, pad)).view(n, chunk, H, P).transpose(1, 2)  # (n, H, Q, P)
    B, C = (F.pad(t, (0, 0, 0, pad)).view(n, chunk, -1) for t in (B, C))
    seq = F.pad(seq, (0, pad), value=-1).view(n, chunk)
    a = F.pad(dt * A, (0, 0, 0, pad)).view(n, chunk, H).transpose(1, 2).cumsum(-1)  # (n, H, Q), log decay so far

    visible = (seq[:, :, None] == seq[:, None, :]).tril()[:, None]
    decay = (a[..., :, None] - a[..., None, :]).masked_fill(~visible, -torch.inf).exp()
    y = (decay * (C @ B.transpose(1, 2))[:, None]) @ xdt

    if n > 1:
        to_end = (a[..., -1:] - a).exp() * (seq == seq[:, -1:])[:, None]
        states = torch.einsum("nhqp,nqs->nhps", xdt * to_end[..., None], B)
        unbroken = (seq[1:, -1] == seq[:-1, -1])[:, None]
        carry = torch.where(unbroken, a[1:, :, -1].exp(), 0)
        before = pass_states(states[:-1], carry[:-1])
        from_start = a[1:].exp() * (seq[1:] == seq[:-1, -1:])[:, None]
        y[1:] += from_start[..., None] * torch.einsum("nqs,nhps->nhqp", C[1:], before)
    return y.transpose(1, 2).reshape(n * chunk, H, P)[:T]


def pass_states(states: Tensor, carry: Tensor, block: int = 32) -> Tensor:
    """h_c = carry_{c-1} h_{c-1} + states_c for c = 0..n-1; states (n, H, P, S), carry (n-1, H) in [0, 1].

    Blocks of chunks at a time, each one matrix product that takes the block's incoming state as one more chunk.
    """
    n = states.shape[0]
    out: list[Tensor] = []
    for begin in range(0, n, block):
        s = states[begin : begin + block]
        c = carry[begin : begin + len(s) - 1]
        if out:
            s, c = torch.cat([out[-1][-1:], s]), carry[begin - 1 : begin + len(s) - 1]
        m, (H, P, S) = len(s), s.shape[1:]
        # weight[i, j] = carry_j ... carry_{i-1}: the product of the steps from j to i
        steps = torch.cat([c.new_ones(1, H), c]).T[:, :, None].expand(H, m, m)
        below = torch.ones(m, m, dtype=torch.bool, device=s.device).tril(-1)
        weight = torch.where(below, steps, 1).cumprod(1) * torch.ones_like(below).tril()
        h = torch.bmm(weight, s.transpose(0, 1).flatten(2)).view(H, m, P, S).transpose(0, 1)
        out.append(h[1:] if out else h)
    return torch.cat(out)
