import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hnet import HNetConfig, HNetForCausalLM
from hnet.data.corpus import Corpus
from hnet.data.pack_stream import PackStream
from hnet.model import attention, mamba2
from hnet.model.cost import keys_seen, peak_flops, plan, positions_per_byte, stage_costs
from hnet.model.parameters import count_parameters

PRESETS = ["laptop", "small", "small_2stage"]


@pytest.fixture(autouse=True)
def no_rows_of_padding(monkeypatch):
    """The innermost network gets up to 31 rows more on a CPU, which are no work that is asked for."""
    monkeypatch.setattr("hnet.model.hnet.ROUND", 1)


@pytest.fixture(scope="module")
def batch():
    """Real text, ragged: short and long files, some cut at seq_len, one cut by the end of the pack."""
    files = sorted((Path(sysconfig.get_paths()["stdlib"]) / "email").rglob("*.py"))
    documents = [f.read_bytes()[: 45 * (i % 5 + 1)] for i, f in enumerate(files)]
    found = next(PackStream(Corpus.of(documents), 170, 320, 1))
    assert len(set(found.cu_seqlens.diff().tolist())) >= 3
    assert found.max_seqlen > 128  # the laptop's window
    return found


def attention_pair_by_pair(qk, v, pack, window):
    """Every position against the keys it sees, by matrix products of their size, so that a counter counts these."""
    out = []
    for begin, length in zip(pack.starts, pack.lengths, strict=True):
        q, k = (x[begin : begin + length].transpose(0, 1) for x in qk.unbind(1))
        values = v[begin : begin + length].transpose(0, 1)
        for i in range(length):
            seen = slice(max(0, i - window) if window >= 0 else 0, i + 1)
            score = torch.bmm(q[:, i : i + 1], k[:, seen].transpose(1, 2))
            out.append(torch.bmm(score.softmax(-1), values[:, seen])[:, 0])
    return torch.stack(out)


def state_write_and_read(x, dt, A, B, C, seq, chunk=0):
    """The products of the recurrence, outer product in and matrix-vector product out, without its decay."""
    T, H, P = x.shape
    B, C = (m[:, None].expand(T, H, -1).reshape(T * H, -1) for m in (B, C))
    h = torch.bmm((x * dt[..., None]).reshape(T * H, P, 1), B[:, None])
    return torch.bmm(h, C[:, :, None]).view(T, H, P)


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_are_those_pytorch_counts(preset, batch, monkeypatch):
    """The counter counts what runs, so attention and scan are replaced by forms that run useful products alone."""
    monkeypatch.setattr(
        attention, "fused", lambda qkv, pack, window, dim: attention_pair_by_pair(qkv[:, :2], qkv[:, 2], pack, window)
    )
    monkeypatch.setattr(mamba2, "ssd", state_write_and_read)
    torch.manual_seed(0)
    model = HNetForCausalLM(HNetConfig.preset(preset))
    with FlopCounterMode(display=False) as counter:
        out = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        out.logits.sum().backward()
    lengths = [batch.cu_seqlens.diff(), *(r.cu_chunks.diff() for r in out.routing)]
    found = sum(c.of(n).item() for c, n in zip(stage_costs(model), lengths, strict=True))
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_really_runs_is_a_little_more(preset, batch):
    """Without attention, which a CPU's counter does not know: the products inside the scan's chunks come on top."""
    torch.manual_seed(0)
    model = HNetForCausalLM(HNetConfig.preset(preset))
    with FlopCounterMode(display=False) as counter:
        out = model(batch.input_ids, cu_seqlens=batch.cu_seqlens)
        out.logits.sum().backward()
    costs = [c._replace(attention={}) for c in stage_costs(model)]
    lengths = [batch.cu_seqlens.diff(), *(r.cu_chunks.diff() for r in out.routing)]
    useful = sum(c.of(n).item() for c, n in zip(costs, lengths, strict=True))
    assert 1 <= counter.get_total_flops() / useful < 1.05


@pytest.mark.parametrize("window", [-1, 0, 1, 5, 6, 7, 100])
def test_keys_seen(window):
    lengths = [1, 6, 7, 20]
    wanted = sum(min(i + 1, window + 1) if window >= 0 else i + 1 for n in lengths for i in range(n))
    assert keys_seen(torch.tensor(lengths).double(), window) == wanted


def test_lengths_count_not_their_mean():
    (cost, *_) = reversed(stage_costs(HNetForCausalLM(HNetConfig.preset("tiny"))))  # attention over all
    even, ragged = torch.tensor([50, 50]), torch.tensor([1, 99])
    more = 12 * HNetConfig.preset("tiny").d_model[-1] * (99 * 100 / 2 + 1 - 50 * 51)
    layers = sum(layer.mixer.__class__.__name__ == "CausalAttention" for layer in innermost_layers())
    assert (cost.of(ragged) - cost.of(even)).item() == pytest.approx(layers * more)


def innermost_layers():
    *_, stage = HNetForCausalLM(HNetConfig.preset("tiny")).stages()
    return stage.main_network.layers


def test_plan_of_a_published_model():
    p = plan(HNetConfig.preset("hnet_2stage_XL"), [3, 3], torch.tensor([8192]), 65536, muon=False, bf16=True)
    assert 1.5e9 < sum(s.parameters for s in p.stages) < 1.7e9
    assert p.state_bytes == sum(s.parameters for s in p.stages) * 16
    assert positions_per_byte([3, 3]) == pytest.approx([1, 1 / 3, 1 / 9])


def test_plan_prices_every_stage_at_its_own_lengths():
    config = HNetConfig.preset("tiny")
    p = plan(config, [4], torch.tensor([400, 80]), 512, muon=False, bf16=False)
    outer, inner = stage_costs(HNetForCausalLM(config))
    assert p.flops[0] == pytest.approx(outer.of(torch.tensor([400, 80])).item() / 480)
    assert p.flops[1] == pytest.approx(inner.of(torch.tensor([100, 20])).item() / 480)


@pytest.mark.parametrize("preset", ["laptop", "tiny", "small_2stage"])
def test_parameters_without_the_model(preset):
    config = HNetConfig.preset(preset)
    model = HNetForCausalLM(config)
    wanted = sum(p.numel() for p in model.parameters())
    assert count_parameters(config) == sum(c.parameters for c in stage_costs(model)) == wanted


def test_mfu_is_never_a_guess():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("Some other card") is None
