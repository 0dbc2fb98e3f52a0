"""The terms that make routers decide, against numpy and autograd; and what they do to a run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import hnet_kernels as hk
from hnet.errors import UserError
from hnet.model.causal_lm import HNetForCausalLM
from hnet.model.hnet import candidates
from hnet.model.pack import Pack
from hnet.train.checkpoint import load_trainer
from hnet.train.compression import Compression
from hnet.train.decisive import EDGE, Decisive, Teacher, mean_entropy
from hnet.train.loop import Trainer
from hnet.train.losses import losses

from .test_resume import run_with_a_crash, same_runs

STEPS = 100
TEXT = "the న్య tale of\nthe శాల, a wind — and nothing else whatever".encode()
CU = torch.tensor([0, 1, 30, 30, 55, len(TEXT), len(TEXT)], dtype=torch.int32)  # of one position, and empty ones


def routing(positions, cu_seqlens, seed, **kw):
    torch.manual_seed(seed)
    q, k = torch.randn(2, positions, 8).unbind()
    return hk.route(q, k, cu_seqlens, backend="reference", **kw)


def expected_targets(nats, cu_seqlens, places, could, positions_per_chunk):
    """By the words of the docstring. nats (bytes,): of the target after each byte; places: the byte of each position,
    and the end."""
    chosen, surprise = np.zeros(len(could), bool), {}
    sequences = [(a, b) for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False) if b > a]
    for a, b in sequences:
        free = [m for m in range(a + 1, b) if could[m]]
        for m, after in zip(free, [*free[1:], b], strict=False):
            surprise[m] = sum(nats[i] for i in range(places[m], places[after]))
    wanted = max(round(cu_seqlens[-1] / positions_per_chunk) - len(sequences), 0)
    chosen[sorted(surprise, key=lambda m: -surprise[m])[:wanted]] = True
    return chosen, [m for a, b in sequences for m in range(a + 1, b)]


@pytest.mark.parametrize("boundaries", ["any", "char-start", "char-end"])
@pytest.mark.parametrize("budget", [None, 60])
@pytest.mark.parametrize("ratio", [2.5, 4.0, 30.0])
def test_targets_against_numpy(boundaries, budget, ratio):
    """Three stages of a ragged pack, with padding rows inside where there is a budget."""
    T, ids = len(TEXT), torch.tensor(list(TEXT))
    nats = torch.rand(T, generator=torch.Generator().manual_seed(3)) * 5
    could = None if boundaries == "any" else candidates(boundaries, ids, Pack(CU, T))
    outer = routing(T, CU, 0, candidates=could, max_chunks=budget)
    inner = routing(len(outer.chunk_start), outer.cu_chunks, 1, max_chunks=budget, padded=budget is not None)
    teacher = Teacher(nats, could)
    places = [*range(T), T]
    for r, allowed in ((outer, could), (inner, None)):
        used, cu = int(r.cu_seqlens[-1]), r.cu_seqlens.tolist()
        could_here = np.ones(used, bool) if allowed is None else allowed.numpy()
        expected, taught = expected_targets(nats.double().numpy(), cu, places, could_here, ratio)
        t, may = teacher.targets(r, 1 / ratio)
        assert t[:used].tolist() == expected.tolist()
        assert may.nonzero().flatten().tolist() == taught
        assert not t[used:].any()
        p = r.boundary_prob.double().numpy()
        inside = EDGE + (1 - 2 * EDGE) * p
        bce = [-np.log(inside[m] if expected[m] else 1 - inside[m]) for m in taught]
        torch.testing.assert_close(teacher.loss(r, 1 / ratio).item(), float(np.mean(bce)) if taught else 0.0)
        entropy = [-x * np.log(x) - (1 - x) * np.log(1 - x) if 0 < x < 1 else 0 for x in p[:used]]
        torch.testing.assert_close(mean_entropy(r).item(), float(np.mean(entropy)))
        places = [*(places[i] for i in r.chunk_start[: int(r.num_chunks)].tolist()), T]


def test_gradients_against_the_formulas():
    """dBCE/dp = (p - t) / (p (1 - p)), in fp64; finite at 0 and 1; none to the nats. And dH/dp = ln((1 - p) / p)."""
    T, ratio = len(TEXT), 4.0
    nats = torch.rand(T, dtype=torch.float64, requires_grad=True)
    r = routing(T, CU, 0)
    p = r.boundary_prob.double()
    p[5], p[6] = 0.0, 1.0
    r = r._replace(boundary_prob=p.requires_grad_())
    t, taught = Teacher(nats).targets(r, 1 / ratio)
    x = EDGE + (1 - 2 * EDGE) * p.detach()
    loss = Teacher(nats).loss(r, 1 / ratio)
    found, none = torch.autograd.grad(loss, (p, nats), allow_unused=True)
    assert none is None
    slope = torch.where(taught, (x - t.double()) / (x * (1 - x)), 0)
    torch.testing.assert_close(found, slope * (1 - 2 * EDGE) / taught.sum())
    torch.autograd.gradcheck(
        lambda p: Teacher(nats).loss(r._replace(boundary_prob=p), 1 / ratio), x.clone().requires_grad_()
    )
    q, k = torch.randn(2, T, 8, dtype=torch.float64).requires_grad_()
    r = hk.route(q, k, CU, backend="reference")
    (found,) = torch.autograd.grad(mean_entropy(r), q, retain_graph=True)
    p = r.boundary_prob.detach()
    slope = torch.where((p > 0) & (p < 1), ((1 - p) / p).log(), 0) / T
    torch.testing.assert_close(found, torch.autograd.grad(r.boundary_prob, q, slope)[0])


def test_weights_of_zero_are_the_loss_without(config):
    """To the bit, gradients too."""
    T = len(TEXT)
    config = dataclasses.replace(config, entropy_weight=[0.0], surprisal_weight=[0.0])
    zero = Decisive(config, 1, torch.device("cpu"))
    assert (zero.entropy, zero.surprisal) == (None, None)
    targets, weights = torch.arange(T), torch.tensor([0.7])
    got = []
    for decisive in (zero, None, "by hand"):
        q, k = torch.randn(2, T, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        q.retain_grad()
        logits = torch.randn(T, 256, generator=torch.Generator().manual_seed(1)).requires_grad_()
        r = hk.route(q, k, CU)
        if decisive == "by hand":
            loss = hk.cross_entropy(logits, targets).loss.mean() + torch.dot(weights, hk.ratio_loss(r, 3.0)[None])
        else:
            loss = losses(logits, targets, [r], [3.0], weights, decisive=decisive).loss
        loss.backward()
        got.append(torch.cat([loss.detach()[None], q.grad.flatten(), logits.grad.flatten()]))
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


def test_weights_over_the_run(config):
    config = dataclasses.replace(
        config, arch="c1 m1T1 T1", d_model=[32, 64, 64], compression=[3.0, 2.0], steps=10, entropy_weight=[0.1, 0.2],
        entropy_start=0.4, entropy_warmup=0.2, surprisal_weight=[0.5], surprisal_warmup=0.4,
    ).validate()  # fmt: skip
    d = Decisive(config, 2, torch.device("cpu"))
    seen = []
    for step in (0, 2, 4, 5, 6, 9):
        d.prepare(step)
        seen.append([round(x, 6) for x in (*d.entropy.tolist(), *d.surprisal.tolist())])
    assert seen == [
        [0, 0, 0, 0], [0, 0, 0.25, 0.25], [0, 0, 0.5, 0.5], [0.05, 0.1, 0.5, 0.5], [0.1, 0.2, 0.5, 0.5],
        [0.1, 0.2, 0.5, 0.5],
    ]  # fmt: skip
    with pytest.raises(UserError, match="entropy_weight must be one weight, or one for each of 2 stages"):
        dataclasses.replace(config, entropy_weight=[0.1, 0.2, 0.3]).validate()


def test_resume_is_exact_while_the_weights_move(config):
    config = dataclasses.replace(
        config, accumulation=2, arch="c1 m1T1 T1", d_model=[32, 64, 64], windows=[15, 15, -1], compression=[3.0, 2.0],
        entropy_weight=[0.1], entropy_start=0.3, entropy_warmup=0.6, surprisal_weight=[0.5, 0.2], surprisal_warmup=0.25,
        rate_control="bias", surprisal_gain=0.5, steps=4, checkpoint_every=2, eval_every=4,
    )  # fmt: skip
    run_with_a_crash(config, at=3)
    Trainer(dataclasses.replace(config, out=config.out + "2")).train()
    same_runs(Path(config.out), Path(config.out + "2"))
    taught = load_trainer(Path(config.out) / "checkpoints" / "step_00000002")["task"]["taught"]
    assert (taught.abs() > 0.01).all()


@pytest.mark.parametrize("terms", [{}, {"entropy_weight": [0.3], "surprisal_weight": [0.2]}], ids=["without", "with"])
def test_a_router_learns_to_decide(config, terms):
    """Letters follow from the one before, and only what comes after a space is hard to predict. Without the terms p
    stays undecided."""
    torch.manual_seed(0)
    words = ["abcde ", "fghij ", "klmno ", "pqrst ", "uvwxy "]
    text = "".join(words[i] for i in torch.randint(5, (172,)).tolist()).encode()
    ids, T = torch.tensor(list(text)), len(text)
    config = dataclasses.replace(
        config, arch="c1 T1", d_model=[32, 32], heads=[2, 2], d_intermediate=[32, 32], steps=STEPS, entropy_start=0.5,
        **terms,
    )  # fmt: skip
    model, decisive = HNetForCausalLM(config.model()), Decisive(config, 1, torch.device("cpu"))
    adam, cu_seqlens = torch.optim.Adam(model.parameters(), 1e-2), torch.tensor([0, T - 1], dtype=torch.int32)
    for step in range(STEPS):
        decisive.prepare(step)
        out = model(ids[:-1], cu_seqlens=cu_seqlens)
        losses(out.logits, ids[1:], out.routing, [6.0], torch.ones(1), decisive=decisive).loss.backward()
        adam.step()
        adam.zero_grad()
    r, space = out.routing[0], ids[:-1] == ord(" ")
    p, b = r.boundary_prob[1:].detach(), r.boundary_mask[1:]
    if terms:
        assert p[b].mean() > 0.95
        assert p[~b].mean() < 0.05
        assert (b == space[1:]).float().mean() > 0.95
    else:
        assert p[b].mean() < 0.8
        assert p[~b].mean() > 0.2


def run_loop(config, kinds, noise, pack=1024, router_lr=20.0):
    """Closed loop with a router that has a logit for each of `kinds` kinds of positions, which are harder and harder to
    predict, give or take `noise`, and follows the gradient of both terms. The mean F of the last tenth."""
    config = config.validate()
    c, d = Compression(config, HNetForCausalLM(config.model())), Decisive(config, 1, torch.device("cpu"))
    g, logits = torch.Generator().manual_seed(0), torch.zeros(kinds)
    r = routing(pack, torch.tensor([0, pack], dtype=torch.int32), 0)
    rates = []
    for step in range(config.steps):
        c.prepare(step)
        d.prepare(step)
        kind = torch.randint(kinds, (pack,), generator=g)
        p = (logits[kind] + c.stages[0].logit_bias).sigmoid()
        nats = kind / kinds + noise * torch.randn(pack, generator=g)
        t, taught = Teacher(nats).targets(r, c.shares(step)[0])
        p, t = p[taught], t[taught].float()
        slope = d.surprisal * (p - t) - d.entropy * p.logit(1e-6) * p * (1 - p)
        logits -= router_lr * torch.zeros(kinds).index_add_(0, kind[taught], slope / pack)
        rates.append((p > 0.5).float().mean())
        c.after_step(step, rates[-1][None])
    return float(torch.stack(rates[-config.steps // 10 :]).mean())


@pytest.mark.parametrize("target", [3.0, 4.0, 8.0])
def test_what_is_taught_holds_the_rate(config, target):
    """A teacher that asks for 1/N gets fewer, or more: what is unsure is decided by the entropy, not by halves."""
    config = dataclasses.replace(
        config, compression=[target], steps=400, rate_control="bias", surprisal_weight=[0.1], entropy_weight=[0.2],
    )  # fmt: skip
    off = [abs(run_loop(dataclasses.replace(config, surprisal_gain=gain), 64, 0.6) * target - 1) for gain in (0, 0.02)]
    assert off[0] > 0.08
    assert off[1] < 0.03
