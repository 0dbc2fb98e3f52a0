"""Each mixer against its definition, one position at a time in fp64, and its step against its full form."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from hnet import HNetConfig
from hnet.model import pack as packs
from hnet.model.attention import CausalAttention, _unpadded, attention
from hnet.model.cache import Rows, StageCache
from hnet.model.conv import DepthwiseConv1d, last_rows
from hnet.model.isotropic import Block
from hnet.model.mamba2 import Mamba2, _mamba_ssm, final_states
from hnet.model.pack import Pack
from hnet_kernels.reference import pass_states, ssd

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


def rows_of(slots: list[int], lengths: list[int]) -> Rows:
    """For a new position of each of these slots, of sequences of which so many positions were seen."""
    length = torch.tensor(lengths)
    return StageCache([], [], length, lengths, torch.arange(len(lengths))).rows(slots)


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
        out = b.mixer.step(torch.stack([x[s][at[s]] for s in active]), cache, rows_of(active, [at[0], 0, at[2]]))
        for row, s in enumerate(active):
            close(out[row], full[s][at[s]])
            at[s] += 1


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 0], [2]], ids=str)
@pytest.mark.parametrize("letter", list("mtc"))
def test_block_step_takes_slots_in_any_order(letter, order):
    torch.manual_seed(0)
    b = block(letter)
    lengths = [3, 11, 7]
    x = [torch.randn(n + 4, 64) for n in lengths]
    full = [b.mixer(rows, pack_of([len(rows)])) for rows in x]
    cache = b.mixer.allocate_cache(3, 40)
    prompts = torch.cat([rows[:n] for rows, n in zip(x, lengths, strict=True)])
    b.mixer(prompts, pack_of(lengths), cache, torch.arange(3))
    for i in range(4):
        rows = rows_of(order, [n + i for n in lengths])
        out = b.mixer.step(torch.stack([x[s][lengths[s] + i] for s in order]), cache, rows)
        for row, s in zip(out, order, strict=True):
            close(row, full[s][lengths[s] + i])


def test_a_step_of_every_slot_copies_no_keys():
    """Whatever the order: one row of them, copied, would be as large as this whole step."""
    layer = CausalAttention(16, 2, 8, window_size=-1)
    cache = layer.allocate_cache(8, 4096)
    cache.reserve(4096)
    for slots in (range(8), range(7, -1, -1)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
            layer.step(torch.randn(8, 16), cache, rows_of(list(slots), [4000] * 8))
        copies = [e for e in p.events() if e.name in ("aten::index", "aten::copy_", "aten::clone")]
        assert max(e.cpu_memory_usage for e in copies) < cache.k.nbytes / 8


def test_window_cache_is_a_ring():
    layer = CausalAttention(16, 2, 8, window_size=5)
    cache = layer.allocate_cache(1, 1000)
    assert cache.capacity == 6
    x = torch.randn(20, 16)
    for i in range(20):
        cache.reserve(i + 1)
        out = layer.step(x[i : i + 1], cache, rows_of([0], [i]))
    assert cache.capacity == 6
    close(out, layer(x, pack_of([20]))[-1:])


def test_unwindowed_cache_grows_only_as_needed():
    layer = CausalAttention(16, 2, 8, window_size=-1)
    cache = layer.allocate_cache(1, 1000)
    assert cache.capacity == 256
    layer(torch.randn(400, 16), pack_of([400]), cache, torch.tensor([0]))
    assert 400 <= cache.capacity <= 1000


def checked_conv(x, weight, bias, seq_idx, activation):
    """What the causal-conv1d package asks of x (batch, channels, length) with channels last, and what it computes"""
    assert x.stride(1) == 1
    assert x.stride(2) > 1
    assert x.shape[1] % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert 2 <= weight.shape[1] <= 4
    assert seq_idx.dtype == torch.int32
    assert seq_idx.is_contiguous()
    assert activation == "silu"
    out = DepthwiseConv1d(*weight.shape)
    out.weight, out.bias = torch.nn.Parameter(weight[:, None]), torch.nn.Parameter(bias)
    pack = Pack(torch.searchsorted(seq_idx[0], torch.arange(int(seq_idx.max()) + 2), out_int32=True), x.shape[2])
    return F.silu(out(x[0].T, pack)).T[None]


def naive_scan(x, dt, A, B, C, *, chunk_size, D, dt_bias, dt_softplus, seq_idx):
    assert dt_softplus
    dt = F.softplus(dt[0] + dt_bias)
    return (ssd(x[0], dt, A, B[0, :, 0], C[0, :, 0], seq_idx[0], chunk_size) + D[:, None] * x[0])[None]


@pytest.mark.parametrize("lengths", [[1], [1, 37, 20], [40, 40]], ids=str)
@pytest.mark.parametrize(
    ("d_state", "d_conv", "suits"), [(16, 4, True), (8, 2, True), (12, 3, True), (5, 4, False), (8, 5, False)], ids=str
)
def test_the_fused_mamba_path_gives_causal_conv1d_what_it_takes(monkeypatch, lengths, d_state, d_conv, suits):
    """Rows 290 wide, channels that do not come by eights, other numbers of taps, one position"""
    combined = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    combined.mamba_chunk_scan_combined = naive_scan
    conv = types.ModuleType("causal_conv1d")
    calls = []
    conv.causal_conv1d_fn = lambda *args, **kwargs: calls.append(1) or checked_conv(*args, **kwargs)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, combined.__name__, combined)
    monkeypatch.setitem(sys.modules, "causal_conv1d", conv)
    torch.manual_seed(0)
    m = Mamba2(64, d_state, d_conv, expand=2, chunk_size=16)
    pack = pack_of(lengths)
    u = torch.randn(pack.T, 64, requires_grad=True)
    z, xBC, dt = m._project(u)
    assert xBC.stride(0) % 8
    y = m.out_proj(m.norm(_mamba_ssm.__wrapped__()(m, xBC, dt, pack), z))
    want = m(u, pack)
    close(y, want)
    leaves = (u, m.in_proj.weight)
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        close(a, b, 1e-4)
    assert len(calls) == (suits and pack.T > 1)


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


def test_rotary_tables_are_made_once_a_pack(monkeypatch):
    """By four layers of one stage, and to the bit what each layer would make of the positions."""
    config = HNetConfig.from_dict(
        {"arch_layout": ["t4"], "d_model": [32], "d_intermediate": [0],
         "attn_cfg": {"num_heads": [4], "rotary_emb_dim": [8], "window_size": [5]}}
    )  # fmt: skip
    layers = [Block("t", config, 0) for _ in range(4)]
    made = []
    right = packs.rotary
    monkeypatch.setattr(packs, "rotary", lambda *a: made.append(a) or right(*a))
    x, pack = torch.randn(100, 32), pack_of([60, 40])
    outs = [layer(x, None, pack)[0] for layer in layers]
    assert len(made) == 1
    monkeypatch.setattr(Pack, "rotary", lambda self, dim: right(self.position, dim))
    assert all(torch.equal(out, layer(x, None, pack)[0]) for out, layer in zip(outs, layers, strict=True))
    inv_freq = 1e4 ** (-torch.arange(0, 8, 2, dtype=torch.float32) / 8)
    assert torch.equal(pack_of([60, 40]).rotary(8)[0][61, 0, 0], inv_freq.cos())
