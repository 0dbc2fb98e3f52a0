"""How decided routers are, against numpy on the routings that the model returned: in rows of steps, in evaluations,
with a budget; flips, over packs, processes and a crash."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import hnet_kernels as hk
from hnet.data.packing import eval_batches
from hnet.device import World
from hnet.metrics_log import read_metrics
from hnet.model.router_metrics import decisiveness, router_sums
from hnet.train import flips as flips_module
from hnet.train.checkpoint import load_trainer
from hnet.train.flips import Flips
from hnet.train.loop import Trainer

from .test_resume import run_with_a_crash

TWO = {"arch": "c1 c1 T1", "d_model": [32, 32, 64], "compression": [3.0, 2.0], "documents": "paragraph"}
KEYS = ("p_on", "p_off", "undecided", "G_minus_F")


@pytest.fixture
def two(config):
    return dataclasses.replace(config, **TWO, dtype="fp32", learning_rate=2e-2)


def expected(packs):
    """packs: of one stage, (p, b) without padding. What the rows must say."""
    p, b = (np.concatenate(x) for x in zip(*packs, strict=True))
    return {
        "p_on": p[b].mean(dtype=np.float64), "p_off": p[~b].mean(dtype=np.float64),
        "undecided": np.mean(np.abs(p - np.float32(0.5)) < np.float32(0.1)), "G_minus_F": p.mean() - b.mean(),
    }  # fmt: skip


def spy(model):
    """Fills with the routings of every forward: lists of (p, b) by stage, real positions only."""
    seen = []

    def hook(module, args, out):
        ends = [int(r.cu_seqlens[-1]) for r in out.routing]
        seen.append(
            [
                (r.boundary_prob[:n].detach().numpy().copy(), r.boundary_mask[:n].numpy().copy())
                for r, n in zip(out.routing, ends, strict=True)
            ]
        )

    model.register_forward_hook(hook)
    return seen


@pytest.mark.parametrize(
    "change",
    [{}, {"max_chunks": [0.4, 0.2]}, {"boundaries": "char-end", "ratio_reduction": "sequence", "rate_control": "bias"}],
    ids=["plain", "budget", "candidates"],
)
def test_rows_are_of_the_whole_step(two, change):
    """Two micro-batches, whose inner stages have different lengths."""
    trainer = Trainer(dataclasses.replace(two, accumulation=2, **change))
    seen = spy(trainer.model)
    for _ in range(2):
        seen.clear()
        row = trainer.train_step()
        assert len(seen) == 2
        for i in range(2):
            wanted = expected([pack[i] for pack in seen])
            if i == 0:
                assert row["stage0/G_minus_F"] == pytest.approx(wanted["G_minus_F"], abs=1e-6)
            assert row[f"stage{i}/G_minus_F"] == row[f"stage{i}/G"] - row[f"stage{i}/F"]
            for k in KEYS[:3]:
                assert row[f"stage{i}/{k}"] == pytest.approx(wanted[k], rel=1e-5), (i, k)
            assert wanted["p_on"] > 0.5 > wanted["p_off"] or change
            assert 0 < wanted["undecided"] < 1
    if "max_chunks" in change:
        assert row["stage0/dropped"] > 0  # so some of what is elsewhere has p > 1/2


def test_every_position_a_boundary_has_no_elsewhere():
    found = decisiveness(10, 10, 9.0, 0.0, 2.0)
    assert (found["p_on"], found["undecided"]) == (0.9, 0.2)
    assert np.isnan(found["p_off"])
    one = decisiveness(10, 9, 9.0, 0.25, 0.0)
    assert (one["p_on"], one["p_off"], one["undecided"]) == (1.0, 0.25, 0.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_padding_adds_nothing(backend):
    torch.manual_seed(0)
    q, k = torch.randn(2, 50, 16)
    cu = torch.tensor([0, 20, 33], dtype=torch.int32)
    with hk.backend(backend):
        padded = router_sums(hk.route(q, k, cu, max_chunks=20, padded=True))
        alone = router_sums(hk.route(q[:33], k[:33], cu, max_chunks=20))
    assert [x.item() for x in padded] == pytest.approx([x.item() for x in alone], rel=1e-6)
    assert alone.near > 0


def by_hand(trainer):
    """Per stage: (p, b) of every held-out pack, and the byte positions at which chunks begin."""
    c, seen = trainer.config, spy(trainer.model)
    starts, at = [set(), set()], 0
    for batch in eval_batches(trainer.task.val, c.seq_len, trainer.task.pack_bytes, c.eval_bytes):
        with torch.no_grad():
            trainer.model.eval()(batch.input_ids, cu_seqlens=batch.cu_seqlens)
        outer = np.flatnonzero(seen[-1][0][1])
        starts[0] |= {at + int(j) for j in outer}
        starts[1] |= {at + int(j) for j in outer[seen[-1][1][1]]}
        at += len(batch.input_ids)
    trainer.model.train()
    return [[pack[i] for pack in seen] for i in range(2)], starts


def test_evaluations_and_flips(two):
    trainer = Trainer(two)
    first = trainer.evaluate()
    assert not any("flips" in k for k in first)
    before = by_hand(trainer)[1]
    for _ in range(4):
        trainer.train_step()
    row = trainer.evaluate()
    packs, after = by_hand(trainer)
    assert len(packs[0]) > 1
    for i in range(2):
        for k, v in expected(packs[i]).items():
            assert row[f"stage{i}/val_{k}"] == pytest.approx(v, rel=1e-5, abs=1e-7), (i, k)
        changed = len(before[i] ^ after[i]) / len(before[i] | after[i])
        assert 0 < changed < 1
        assert row[f"stage{i}/flips"] == changed
    assert not any("flips" in k for k in trainer.evaluate())  # no step since


def test_a_resumed_run_has_the_same_flips(two):
    """Evaluated at 4 and 8, saved at 6, killed at 7: what 8 is compared with comes from the checkpoint. The average of
    the weights, which is evaluated too, has no part in it."""
    two = dataclasses.replace(two, checkpoint_every=3, weight_ema=0.9)
    runs = [two, dataclasses.replace(two, out=two.out + "2")]
    Trainer(two).train()
    assert run_with_a_crash(runs[1], at=7) == 6
    flips = [
        {r["step"]: [r["stage0/flips"], r["stage1/flips"]] for r in read_metrics(Path(c.out) / "metrics.jsonl")
         if "stage0/flips" in r}
        for c in runs
    ]  # fmt: skip
    assert flips[0] == flips[1]
    assert list(flips[0]) == [4, 8]
    assert all(0 < x <= 1 for v in flips[0].values() for x in v)
    saved = load_trainer(Path(two.out) / "checkpoints" / "step_00000006")["task"]["flips"]
    assert saved["bits"].shape == (2, -(-saved["positions"] // 8))  # a bit a position


def routing(T, outer, inner):
    """Of one sequence, with boundaries at positions `outer` and inner ones at those numbers of chunks."""
    mask, inner_mask = torch.zeros(T, dtype=torch.bool), torch.zeros(len(outer), dtype=torch.bool)
    mask[outer], inner_mask[inner] = True, True
    empty = torch.zeros(0)

    def of(mask):
        start = mask.nonzero().flatten().int()
        return hk.Routing(mask.float(), mask, empty, empty, start, empty, empty, empty, empty, empty)

    return [of(mask), of(inner_mask)]


def test_flips_by_definition():
    flips = Flips()
    for outer, inner in (([0, 3, 5], [0, 2]), ([0, 4], [0])):
        flips.see(routing(8, outer, inner))
    assert flips.compare() is None
    for outer, inner in (([0, 3, 6], [0, 2]), ([0], [0])):
        flips.see(routing(8, outer, inner))
    # bytes 0 3 5 | 0 4 and 0 3 6 | 0; of the inner stage 0 5 | 0 and 0 6 | 0
    assert flips.compare() == [3 / 6, 2 / 4]
    again = Flips()
    again.load_state_dict(flips.state_dict())
    for f in (flips, again):
        f.see(routing(8, [0, 3, 6], [0, 2]))
        f.see(routing(8, [0], [0]))
        assert f.compare() == [0, 0]
    flips.see(routing(8, [0, 3, 6], [0, 2]))  # a shorter text: nothing to compare with
    assert flips.compare() is None
    fresh = Flips()
    fresh.load_state_dict(Flips().state_dict())
    assert fresh.compare() is None


def test_flips_of_processes_are_those_of_one(monkeypatch):
    """Three packs of the text on two processes: of every number of processes the same, so a resume may change it."""
    packs = [routing(8, [0, 3], [0]), routing(5, [0, 2], [0, 1]), routing(3, [0], [0])]
    moved = [routing(8, [0, 4], [0]), routing(5, [0, 2], [0]), routing(3, [0, 1], [0])]
    one = Flips()
    for p in packs:
        one.see(p)
    one.compare()
    two = [Flips(World(r, 2, r)) for r in range(2)]
    for f in two:
        f.load_state_dict(one.state_dict())
    for j, p in enumerate(moved):
        one.see(p)
        two[j % 2].see(p)
    parts = [[x.numpy() for x in f.seen] for f in two]
    monkeypatch.setattr(flips_module, "gather", lambda value, world: parts if world.size == 2 else [value])
    found = one.compare()
    assert found == [3 / 7, 1 / 4]
    for f in two:
        assert f.compare() == found
        assert np.array_equal(f.last, one.last)


def test_flips_of_a_long_text_are_of_its_beginning(monkeypatch):
    monkeypatch.setattr(flips_module, "LONGEST", 12)
    flips = Flips()
    for second in ([0, 1, 5], [0, 2, 7]):
        for outer in ([0, 3], second, [0], [0, 1]):
            flips.see(routing(8, outer, [0]))
        assert len(flips.seen) == 2
        found = flips.compare()
    assert found[0] == 2 / 5  # 0 3 | 0 1 and 0 3 | 0 2
