"""Captured decoding steps against the steps themselves, with a tape in the place of a CUDA graph."""

import pytest
import torch

from hnet import HNetConfig, HNetForCausalLM
from hnet.model import cache
from hnet.model.decode_graphs import Graphs, bucket

from .tape import taped
from .test_causal_lm import TWO_STAGES, cu


def decided(config: HNetConfig) -> HNetForCausalLM:
    """A fresh router fires at half the positions; spread its decisions."""
    torch.manual_seed(0)
    m = HNetForCausalLM(config)
    with torch.no_grad():
        for stage in m.stages():
            if not stage.innermost:
                w = stage.routing_module.q_proj_layer.weight
                w.add_(torch.randn(w.shape) * 0.3)
    return m.eval()


@pytest.fixture(scope="module", params=["tiny", "two"])
def model(request):
    return decided(HNetConfig.preset("tiny") if request.param == "tiny" else HNetConfig.from_dict(TWO_STAGES))


def caches(model, batch, length, prompts):
    """The same prompts in a cache as it is and in one with graphs."""
    plain, captured = model.allocate_cache(batch, length), model.allocate_cache(batch, length, graphs=Graphs())
    captured.run = taped(captured)
    plain.fused = False  # the same pieces, not the extension's one call
    torch.manual_seed(1)
    ids = torch.randint(0, 256, (sum(prompts),))
    for both in (plain, captured):
        model.prefill(ids, cu(*prompts), both)
    return plain, captured


def replays(graphs: Graphs, piece: str) -> int:
    return sum(key[1] == piece and found.replay is not None for key, found in graphs.recorded.items())


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 0], [2]], ids=str)
def test_captured_steps_are_the_steps_to_the_bit(model, order):
    plain, captured = caches(model, 3, 60, [3, 11, 7])
    inner = 0
    for _ in range(16):
        ids = torch.randint(0, 256, (len(order),))
        (want, masks), (got, same) = (model.step(ids, c, order) for c in (plain, captured))
        assert torch.equal(got, want)
        assert [m.tolist() for m in same] == [m.tolist() for m in masks]
        inner += bool(masks[0].any())
    assert torch.equal(plain.length, captured.length)
    for a, b in zip(plain.root.stages(), captured.root.stages(), strict=True):
        assert a.seen == b.seen == a.length.tolist() == b.length.tolist()
    graphs = captured.run
    assert not graphs.why_not
    assert 0 < inner < 16 or len(order) > 1  # inside of a chunk the inner stage did not run
    for piece in ("_step_to_boundary", "_step_from_chunk", "_step_innermost"):
        assert replays(graphs, piece) > 0


def test_numbers_of_rows_share_graphs_and_leave_other_slots_alone(model):
    """12, 9 and 11 of 12 slots, in buckets of 16 with rows for the spare slot."""
    assert [bucket(n) for n in (1, 8, 9, 16, 17)] == [1, 8, 16, 16, 24]
    plain, captured = caches(model, 12, 40, list(range(1, 13)))
    for i in range(24):
        order = torch.randperm(12)[: (12, 9, 11)[i % 3]].tolist()
        ids = torch.randint(0, 256, (len(order),))
        (want, masks), (got, same) = (model.step(ids, c, order) for c in (plain, captured))
        assert torch.allclose(got, want, atol=1e-5)
        assert [m.tolist() for m in same] == [m.tolist() for m in masks]
    assert plain.root.seen == captured.root.seen[:12] == captured.root.length[:12].tolist()
    rows = {key[2] for key in captured.run.recorded}
    assert 16 in rows
    assert all(n <= 8 or n == 16 for n in rows)


def test_a_cache_that_grows_is_captured_anew(model, monkeypatch):
    monkeypatch.setattr(cache, "FIRST_ROWS", 4)
    plain, captured = caches(model, 1, 60, [3])
    capacities, replayed = set(), 0
    for _ in range(50):
        ids = torch.randint(0, 256, (1,))
        assert torch.equal(*(model.step(ids, c)[0] for c in (plain, captured)))
        capacities.add(tuple(layer.capacity for s in captured.root.stages() for layer in s.attention()))
        replayed += replays(captured.run, "_step_to_boundary")
    assert len(capacities) > 2
    assert replayed > 0


def test_what_cannot_be_captured_runs_as_it_is_and_says_why(model):
    plain, captured = caches(model, 2, 40, [3, 5])

    def capture(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    captured.run = Graphs(capture)
    ids = torch.randint(0, 256, (2,))
    assert torch.equal(*(model.step(ids, c)[0] for c in (plain, captured)))
    with pytest.warns(UserWarning, match="launches its kernels one by one: operation not permitted"):
        got = model.step(ids, captured)[0]
    assert torch.equal(got, model.step(ids, plain)[0])
    assert torch.equal(*(model.step(ids, c)[0] for c in (plain, captured)))


def test_graphs_are_for_gpus_unless_asked_for(model):
    assert not isinstance(model.allocate_cache(1, 10).run, Graphs)
    assert isinstance(model.allocate_cache(1, 10, graphs=True).run, Graphs)
    assert len(model.allocate_cache(9, 10, graphs=True).root.seen) == 10  # a spare slot
    assert model.allocate_cache(9, 10, graphs=True).length.shape == (9,)
