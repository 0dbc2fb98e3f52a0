"""Each mixer against its definition, one position at a time in fp64, and its step against its full form."""

import pytest
import torch
import torch.nn.functional as F

from hnet import HNetConfig
from hnet.model.attention import CausalAttention, _unpadded, attention
from hnet.model.conv import DepthwiseConv1d, last_rows
from hnet.model.isotropic import Block
from hnet.model.mamba2 import final_states, pass_states, ssd
from hnet.model.pack import Pack

PACKS = {
    "one": [1],
    "equal": [40, 40, 40],
    "ragged": [1, 37, 0, 150, 2, 64, 0],
    "long": [300, 5, 200],
}


def pack_of(lengths, rows=None):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return Pack(cu, sum(lengths) if rows is None else rows)


def close(a, b, tol=1e-5):
    scale = b.abs().max().clamp(min=1e-2)
    assert ((a - b).abs().max() / scale).item() < tol


def spans(pack):
    c = pack.cu_seqlens.tolist()
    return list(zip(c[:-1], c[1:], strict=True))


def test_pack():
    pack = pack_of([2, 0, 3], rows=7)
    assert pack.seq_idx.tolist() == [0, 0, 2, 2, 2, 3, 3]
    assert pack.position.tolist() == [0, 1, 0, 1, 2, 0, 1]
    assert pack.lengths == [2, 0, 3]


@pytest.mark.parametrize("window", [-1, 1, 3, 31, 70, 200])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_attention(lengths, window):
    torch.manual_seed(0)
    pack = pack_of(lengths)
    qk = torch.randn(pack.T, 2, 3, 8, requires_grad=True)
    v = torch.randn(pack.T, 3, 8, requires_grad=True)
    out = attention(qk, v, pack, window)
    want = []
    for s, e in spans(pack):
        q, k, x = (t[s:e].double().transpose(0, 1) for t in (qk[:, 0], qk[:, 1], v))
        distance = torch.arange(e - s)[:, None] - torch.arange(e - s)
        hidden = (distance < 0) | ((distance > window) if window >= 0 else torch.zeros_like(distance, dtype=torch.bool))
        scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(hidden, -torch.inf)
        want.append((scores.softmax(-1) @ x).transpose(0, 1))
    want = torch.cat(want)
    close(out, want)
    dout = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (qk, v), dout), torch.autograd.grad(want, (qk, v), dout.double()), strict=True
    ):
        close(a, b)


def test_a_window_of_zero_sees_only_itself():
    qk, v = torch.randn(300, 2, 2, 4), torch.randn(300, 2, 4)
    close(attention(qk, v, pack_of([100, 200]), 0), v)


def test_attention_ignores_padding_rows():
    pack = pack_of([5, 9], rows=20)
    qk, v = torch.randn(20, 2, 2, 4), torch.randn(20, 2, 4)
    out = attention(qk, v, pack, -1)
    assert (out[14:] == 0).all()
    assert torch.equal(out[:14], attention(qk[:14], v[:14], pack_of([5, 9]), -1))


def naive_ssd(x, dt, A, B, C, pack):
    out, finals = [], []
    for s, e in spans(pack):
        h = x.new_zeros(x.shape[1], x.shape[2], B.shape[1])
        for t in range(s, e):
            h = torch.exp(dt[t] * A)[:, None, None] * h + dt[t][:, None, None] * x[t][:, :, None] * B[t]
            out.append((h * C[t]).sum(-1))
        finals.append(h)
    return torch.stack(out), torch.stack(finals)


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("lengths", [*PACKS.values(), [2200]], ids=[*PACKS, "many chunks"])
def test_ssd(lengths, chunk):
    torch.manual_seed(0)
    pack = pack_of(lengths)
    T, H, P, S = pack.T, 2, 4, 3
    leaves = [torch.randn(T, H, P), torch.rand(T, H) * 0.5, -torch.rand(H) * 8, torch.randn(T, S), torch.randn(T, S)]
    leaves = [x.requires_grad_() for x in leaves]
    y = ssd(*leaves, pack.seq_idx, chunk)
    want, finals = naive_ssd(*(x.double() for x in leaves), pack)
    close(y, want)
    close(final_states(*leaves[:4], pack), finals)
    if T < 500:
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, leaves, dy)
        for g, w in zip(got, torch.autograd.grad(want, leaves, dy.double()), strict=True):
            close(g, w, 1e-5 * T**0.5)  # fp32, sums over T


def test_pass_states_over_many_blocks():
    states, carry = torch.randn(100, 2, 3, 4, dtype=torch.float64), torch.rand(99, 2, dtype=torch.float64)
    carry[[10, 40, 63]] = 0
    h, want = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for i in range(100):
        h = states[i] + (carry[i - 1][:, None, None] * h if i else 0)
        want.append(h)
    close(pass_states(states, carry), torch.stack(want), 1e-12)


@pytest.mark.parametrize("kernel", [1, 4, 6])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_convolution(lengths, kernel):
    torch.manual_seed(0)
    pack = pack_of(lengths)
    conv = DepthwiseConv1d(5, kernel)
    x = torch.randn(pack.T, 5, requires_grad=True)
    y = conv(x, pack)
    want = torch.cat(
        [
            F.conv1d(F.pad(x[s:e].T[None], (kernel - 1, 0)), conv.weight, conv.bias, groups=5)[0].T
            for s, e in spans(pack)
            if e > s
        ]
    )
    close(y, want)
    leaves = (x, conv.weight, conv.bias)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        close(a, b)
    tail = last_rows(x, pack, kernel)
    for n, (s, e) in enumerate(spans(pack)):
        assert torch.equal(tail[n], F.pad(x[s:e], (0, 0, kernel, 0))[-kernel:])


def block(letter):
    config = {
        "arch_layout": [f"{letter}1"],
        "d_model": [64],
        "d_intermediate": [96],
        "ssm_cfg": {"d_state": 8},
        "attn_cfg": {"num_heads": [4], "rotary_emb_dim": [8], "window_size": [5]},
    }
    return Block(letter, HNetConfig.from_dict(config), 0)


@pytest.mark.parametrize("letter", list("mMtTcC"))
def test_block_sequences_are_separate_and_causal(letter):
    torch.manual_seed(0)
    b = block(letter)
    x = torch.randn(60, 64)
    out = b(x, None, pack_of([25, 35]))[0]
    close(out[:25], b(x[:25], None, pack_of([25]))[0], 1e-5)
    close(out[25:], b(x[25:], None, pack_of([35]))[0], 1e-5)
    x2 = x.clone()
    x2[40:] += 1
    close(b(x2, None, pack_of([25, 35]))[0][:40], out[:40], 1e-6)


@pytest.mark.parametrize("letter", list("mtc"))
def test_block_step_equals_full_for_ragged_slots(letter):
    """Prefill two prompts of different length into chosen slots, then advance the slots unevenly."""
    torch.manual_seed(0)
    b = block(letter)
    x = {2: torch.randn(30, 64), 0: torch.randn(22, 64)}
    full = {slot: b.mixer(rows, pack_of([len(rows)])) for slot, rows in x.items()}
    prefilled = {2: 11, 0: 3}
    cache = b.mixer.allocate_cache(3, 40)
    slots = torch.tensor([2, 0])
    b.mixer(torch.cat([x[2][:11], x[0][:3]]), pack_of([11, 3]), cache, slots)
    at = dict(prefilled)
    while any(at[s] < len(x[s]) for s in x):
        active = [s for s in (0, 2) if at[s] < len(x[s]) and (s == 2 or at[2] % 2 == 0 or at[2] == 30)]
        out = b.mixer.step(torch.stack([x[s][at[s]] for s in active]), cache, torch.tensor(active))
        for row, s in enumerate(active):
            close(out[row], full[s][at[s]])
            at[s] += 1


def test_window_cache_is_a_ring():
    layer = CausalAttention(16, 2, 8, window_size=5)
    cache = layer.allocate_cache(1, 1000)
    assert cache.capacity == 6
    for _ in range(20):
        layer.step(torch.randn(1, 16), cache, torch.tensor([0]))
    assert cache.capacity == 6
    assert cache.length.tolist() == [20]


def test_unwindowed_cache_grows_only_as_needed():
    layer = CausalAttention(16, 2, 8, window_size=-1)
    cache = layer.allocate_cache(1, 1000)
    assert cache.capacity == 256
    layer(torch.randn(400, 16), pack_of([400]), cache, torch.tensor([0]))
    assert 400 <= cache.capacity <= 1000


class Unwritten(torch.autograd.Function):
    """As a varlen kernel treats the rows after the last sequence: NaN stands for what memory held."""

    @staticmethod
    def forward(ctx, x, used):
        ctx.used = used
        out = torch.full_like(x, float("nan"))
        out[:used] = x[:used]
        return out

    @staticmethod
    def backward(ctx, grad):
        assert not grad[: ctx.used].isnan().any()
        dx = torch.full_like(grad, float("nan"))
        dx[: ctx.used] = grad[: ctx.used]
        return dx, None


def test_padding_rows_around_a_varlen_kernel():
    """Its unwritten rows reach neither the output nor a gradient, whatever the rows held."""
    pack = Pack(torch.tensor([0, 5, 12], dtype=torch.int32), 20, padded=True)
    qk = torch.randn(20, 2, 2, 8)
    v = torch.randn(20, 2, 8)
    qk[12:], v[12:] = float("nan"), float("nan")
    qk.requires_grad_(), v.requires_grad_()

    def varlen(q, k, v, pack, window):
        return Unwritten.apply(q * 2 + k, 12) + Unwritten.apply(v, 12)

    out = _unpadded(varlen, qk, v, pack, -1)
    assert torch.equal(out[:12], qk[:12, 0] * 2 + qk[:12, 1] + v[:12])
    assert (out[12:] == 0).all()
    dqk, dv = torch.autograd.grad(out.sum(), (qk, v))
    assert (dqk[:12, 0] == 2).all()
    assert (dv[:12] == 1).all()
    assert (dqk[12:] == 0).all()
    assert (dv[12:] == 0).all()
