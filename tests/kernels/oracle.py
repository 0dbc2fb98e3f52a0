"""The ops once more, straight from their definitions: fp64, one position at a time, gradients by autograd.

Shares no code with `hnet_kernels.reference`.
"""

import math

import torch
from torch import Tensor

from hnet_kernels import Routing


def spans(cu: Tensor) -> list[tuple[int, int]]:
    c = cu.tolist()
    return list(zip(c[:-1], c[1:], strict=True))


def entropy_sum(prob, cu) -> Tensor:
    """By sequence, in nats"""
    each = [p * 0 if p in (0, 1) else -p * p.log() - (1 - p) * (1 - p).log() for p in prob.double()]
    sums = [sum(each[s:e], torch.zeros((), dtype=torch.float64)) for s, e in spans(cu)]
    return torch.stack(sums) if sums else prob[:0].double()


def route(q, k, cu, logit_bias=None, candidates=None, max_chunks=None) -> Routing:
    T = q.shape[0]
    q, k = q.double(), k.double()
    p = [torch.zeros((), dtype=torch.float64)] * T
    mask = [False] * T
    first = [s for s, e in spans(cu) if e > s]
    for s, e in spans(cu):
        for t in range(s, e):
            if t == s:
                p[t], mask[t] = torch.ones((), dtype=torch.float64), True
                continue
            a, b = q[t - 1], k[t]
            cos = (a @ b) / (a.norm().clamp(min=1e-12) * b.norm().clamp(min=1e-12))
            p[t] = ((1 - cos) / 2).clamp(0, 1)
            if logit_bias is not None:
                scale = logit_bias.exp() if isinstance(logit_bias, Tensor) else math.exp(logit_bias)
                p[t] = p[t] * scale / (1 - p[t] + p[t] * scale)
            mask[t] = bool(p[t] > 0.5) and (candidates is None or bool(candidates[t]))
    dropped = 0
    if max_chunks is not None:
        optional = sorted((t for t in range(T) if mask[t] and t not in first), key=lambda t: (-float(p[t].detach()), t))
        for t in optional[max(0, max_chunks - len(first)) :]:
            mask[t] = False
            dropped += 1
    start = [t for t in range(T) if mask[t]]
    end = spans(cu)[-1][1] if len(cu) > 1 else 0
    chunk_start = start if max_chunks is None else start + [end] * (max_chunks - len(start))
    index, cu_chunks = [], [0]
    for t in range(T):
        index.append((index[-1] if index else -1) + mask[t])
    for _, e in spans(cu):
        cu_chunks.append(sum(mask[:e]))
    prob = torch.stack(p) if T else torch.zeros(0, dtype=torch.float64)
    selected = torch.stack([p[t] if mask[t] else 1 - p[t] for t in range(T)]) if T else prob
    prob_sum = torch.stack([prob[s:e].sum() for s, e in spans(cu)]) if len(cu) > 1 else prob[:0]

    def i32(x):
        return torch.tensor(x, dtype=torch.int32)

    mask = torch.tensor(mask, dtype=torch.bool)
    sums = prob_sum, entropy_sum(prob, cu)
    return Routing(
        prob, mask, selected, i32(index), i32(chunk_start), i32(cu_chunks), cu, *sums, i32(dropped)
    )  # fmt: skip


def chunk_spans(r: Routing) -> list[tuple[int, int]]:
    n, end = int(r.num_chunks), int(r.cu_seqlens[-1])
    start = [*r.chunk_start.tolist()[:n], end]
    return list(zip(start[:-1], start[1:], strict=True))


def pool(x, r: Routing, mode) -> Tensor:
    rows = []
    for s, e in chunk_spans(r):
        block = x[s:e].double()
        if mode == "max":
            rows.append(block.gather(0, block.max(0, keepdim=True).indices)[0])
        else:
            rows.append({"boundary": block[0], "last": block[-1], "mean": block.mean(0)}[mode])
    rows += [torch.zeros(x.shape[1], dtype=torch.float64)] * (r.chunk_start.shape[0] - len(rows))
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], dtype=torch.float64)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, c):
        return torch.ones_like(c)

    @staticmethod
    def backward(ctx, grad):
        return grad


def dechunk(z, r: Routing, residual=None) -> Tensor:
    T, D = r.chunk_index.shape[0], z.shape[1]
    firsts = {s for s, e in spans(r.cu_seqlens) if e > s}
    zero = torch.zeros(D, dtype=torch.float64)
    out, y = [], zero
    for m, (s, e) in enumerate(chunk_spans(r)):
        p = r.boundary_prob[s].double().clamp(1e-4, 1 - 1e-4)
        y = p * z[m].double() + (1 - p) * (zero if s in firsts else y)
        for t in range(s, e):
            row = StraightThrough.apply(r.selected_prob[t].double()) * y
            out.append(row if residual is None else row + residual[t].double())
    out += [zero] * (T - len(out))
    return torch.stack(out) if out else z.new_zeros(0, D, dtype=torch.float64)


def ema(z, p, cu, initial_state=None) -> tuple[Tensor, Tensor]:
    D = z.shape[1]
    out, final = [], []
    for n, (s, e) in enumerate(spans(cu)):
        y = torch.zeros(D, dtype=torch.float64) if initial_state is None else initial_state[n].double()
        for t in range(s, e):
            y = p[t].double() * z[t].double() + (1 - p[t].double()) * y
            out.append(y)
        final.append(y)
    empty = z.new_zeros(0, D, dtype=torch.float64)
    return torch.stack(out) if out else empty, torch.stack(final) if final else empty


def ratio_loss(p, mask, n) -> Tensor:
    F, G = mask.double().mean(), p.double().mean()
    return n / (n - 1) * ((n - 1) * F * G + (1 - F) * (1 - G))


def add_rms_norm(x, residual, weight, eps) -> tuple[Tensor, Tensor]:
    rows, sums = [], []
    for t in range(x.shape[0]):
        s = x[t].double() + (0 if residual is None else residual[t].double())
        rows.append(weight.double() * s / (s.pow(2).sum() / len(s) + eps).sqrt())
        sums.append(s)
    empty = x.new_zeros(0, x.shape[1], dtype=torch.float64)
    return torch.stack(rows) if rows else empty, torch.stack(sums) if sums else empty


def silu(x):
    return x / (1 + (-x).exp())


def gated_conv(x, weight, bias, cu) -> Tensor:
    (T, D2), K = x.shape, weight.shape[1]
    u, g = x[:, : D2 // 2].double(), x[:, D2 // 2 :].double()
    out = []
    for s, e in [*spans(cu), (int(cu[-1]), T)]:  # padding is one more sequence
        for t in range(s, e):
            y = bias.double()
            for j in range(min(K, t - s + 1)):
                y = y + weight[:, K - 1 - j].double() * u[t - j]
            out.append(y * silu(g[t]))
    return torch.stack(out) if out else x.new_zeros(0, D2 // 2, dtype=torch.float64)


def swiglu(x) -> Tensor:
    D = x.shape[1] // 2
    return silu(x[:, D:].double()) * x[:, :D].double()


def cross_entropy(logits, targets) -> Tensor:
    """Loss and entropy, (T,) each."""
    x = logits.double()
    log_p = x - x.logsumexp(1, keepdim=True)
    return -log_p[torch.arange(len(x)), targets], -(log_p.exp() * log_p).sum(1)


def attention(qkv, cu, window, rotary) -> Tensor:
    T, _, heads, width = qkv.shape
    out = [torch.zeros(heads, width, dtype=torch.float64)] * T
    qkv = qkv.double()

    def turned(x, position):
        if rotary is None:
            return x
        (c, s), half = (t[position].double() for t in rotary), rotary[0].shape[1]
        a, b = x[:, :half], x[:, half : 2 * half]
        return torch.cat([a * c - b * s, b * c + a * s, x[:, 2 * half :]], 1)

    for s, e in spans(cu):
        rows = [[turned(qkv[t, part], t) for t in range(s, e)] for part in (0, 1)]
        q, k = (torch.stack(r) if r else qkv[s:e, 0] for r in rows)
        for t in range(s, e):
            seen = slice(0 if window < 0 else max(0, t - s - window), t - s + 1)
            weight = ((k[seen] * q[t - s]).sum(-1) / width**0.5).exp()  # (keys, heads)
            out[t] = (weight[..., None] * qkv[s:e, 2][seen]).sum(0) / weight.sum(0)[:, None]
    return torch.stack(out) if out else qkv.new_zeros(0, heads, width)


def mamba2(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, skip, norm_weight, cu, eps=1e-5) -> Tensor:
    zxbcdt, conv_weight, conv_bias, dt_bias, A_log, skip, norm_weight = (
        x.double() for x in (zxbcdt, conv_weight, conv_bias, dt_bias, A_log, skip, norm_weight)
    )
    H, d_inner, (channels, K) = A_log.shape[0], norm_weight.shape[0], conv_weight.shape
    S = (channels - d_inner) // 2
    out = []
    for s, e in spans(cu):
        h = zxbcdt.new_zeros(H, d_inner // H, S)
        for t in range(s, e):
            z, dt = zxbcdt[t, :d_inner], (1 + (zxbcdt[t, d_inner + channels :] + dt_bias).exp()).log()
            conv = conv_bias
            for j in range(min(K, t - s + 1)):
                conv = conv + conv_weight[:, K - 1 - j] * zxbcdt[t - j, d_inner : d_inner + channels]
            act = conv / (1 + (-conv).exp())
            x, B, C = act[:d_inner].view(H, -1), act[d_inner : d_inner + S], act[d_inner + S :]
            h = (-dt * A_log.exp()).exp()[:, None, None] * h + dt[:, None, None] * x[:, :, None] * B
            v = ((h @ C + skip[:, None] * x).flatten()) * z / (1 + (-z).exp())
            out.append(v / ((v * v).mean() + eps).sqrt() * norm_weight)
    out += [zxbcdt.new_zeros(d_inner)] * (zxbcdt.shape[0] - len(out))
    return torch.stack(out) if out else zxbcdt.new_zeros(0, d_inner)
