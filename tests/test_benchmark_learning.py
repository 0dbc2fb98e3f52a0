"""`benchmarks/learning`: the score, what the models may see, that all of it runs, and what the tables say."""

import json
import math

import pytest
import torch

from benchmarks.learning import isotropic, nanogpt, ours, plan, run
from benchmarks.learning.__main__ import main
from benchmarks.learning.report import draw, learning_section
from benchmarks.learning.validation import nats_per_byte

WORDS = (b"the king", b" is dead", b", long live", b" the queen", b".\n")


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    data = b"".join(WORDS[i] for i in torch.randint(len(WORDS), (2500,), generator=g))
    return torch.tensor(list(data))


def test_score_is_the_sum_over_bytes(text):
    """Against a loop over bytes, with a model that looks at the last byte and at how many it has seen."""
    table = torch.randn(7, 256, 256, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    text = text[:100]

    def log_probs(ids):
        return table[torch.arange(ids.shape[1])[None], ids]

    for context in (7, 3, 1):  # 99 = 14 x 7 + 1 = 33 x 3
        total = 0.0
        for i in range(1, 100):
            seen = (i - 1) % context + 1
            total -= table[seen - 1, text[i - 1], text[i]].item()
        assert nats_per_byte(log_probs, text, context, batch=4) == pytest.approx(total / 99, rel=1e-6)


def test_what_is_no_distribution_has_no_score(text):
    def logits(ids):
        return torch.zeros(*ids.shape, 256)

    assert nats_per_byte(lambda ids: logits(ids).log_softmax(-1), text[:50], 8) == pytest.approx(math.log(256))
    for bad in (logits, lambda ids: logits(ids)[..., :255].log_softmax(-1), lambda ids: logits(ids) + math.nan):
        with pytest.raises(ValueError, match="log_probs"):
            nats_per_byte(bad, text[:50], 8)
    with pytest.raises(ValueError, match="context"):
        nats_per_byte(logits, text, 0)


@pytest.fixture(scope="module", params=list(run.LEARNERS))
def learner(request, text):
    """With every weight moved: what is zero at the start hides nothing."""
    made = run.learner(request.param, text, seed=0)
    model = made.trainer.model if request.param == "hnet" else made.model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "routing_module" not in name:
                p.add_(0.2 * torch.randn_like(p))
    return made


def test_models_see_no_byte_that_comes_later(learner, text):
    ids = text[: 2 * learner.context].view(2, -1).clone()
    with torch.no_grad():
        before = learner.log_probs(ids)
        at = learner.context // 2
        ids[0, at] = (ids[0, at] + 1) % 128
        after = learner.log_probs(ids)
    assert torch.equal(before[0, :at], after[0, :at])
    assert not torch.equal(before[0, at], after[0, at])
    assert torch.equal(before[1], after[1])  # nor of another window


def test_the_isotropic_model_is_its_definition():
    """Against the same model written with plain PyTorch, in fp64."""
    torch.manual_seed(0)
    model = isotropic.Isotropic("ct", 64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ids = torch.randint(256, (2, 20))
    w = {name: p.detach().double() for name, p in model.named_parameters()}

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turn(x):  # (n, heads, L, 32)
        angle = torch.arange(20.0)[:, None] * 1e4 ** (-torch.arange(16.0) / 16)
        a, b, cos, sin = x[..., :16], x[..., 16:], angle.cos().double(), angle.sin().double()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    x = norm(w["embeddings.weight"][ids])
    u, g = (norm(x) @ w["branches.0.fc1.weight"].T).chunk(2, -1)
    taps = w["branches.0.taps"]
    v = sum(torch.cat([torch.zeros_like(u[:, :j]), u[:, : 20 - j]], 1) * taps[:, -1 - j] for j in range(6))
    x = x + (v * g.sigmoid() * g) @ w["branches.0.out.weight"].T
    q, k, v = (norm(x) @ w["branches.1.qkv.weight"].T).view(2, 20, 3, 2, 32).permute(2, 0, 3, 1, 4)
    scores = turn(norm(q)) @ turn(norm(k)).mT / 32**0.5
    scores = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -math.inf).softmax(-1)
    x = x + (scores @ v).transpose(1, 2).reshape(2, 20, 64) @ w["branches.1.out.weight"].T
    x = x + (norm(x) @ w["branches.2.fc1.weight"].T).relu().square() @ w["branches.2.out.weight"].T
    want = norm(x) @ w["head.weight"].T
    with torch.no_grad():
        assert torch.allclose(model(ids).double(), want, atol=1e-5)


@pytest.mark.parametrize("name", ["hnet batch_bytes=512 seq_len=128 warmup_steps=5", "isotropic", "nanogpt"])
def test_models_learn(text, name):
    made = run.learner(name, text, seed=0)
    if name in ("isotropic", "nanogpt"):
        made.batch, made.warmup = 4, 5
    for i in range(20):
        made.step(i / 20)
    assert made.steps == 20
    assert nats_per_byte(made.log_probs, text[-600:], made.context) < 0.8 * math.log(256)


def test_rates_follow_the_share_of_the_run(text):
    gpt, isotropic_one, hnet = nanogpt.Learner(text, 0), isotropic.Learner(text, 0), ours.Learner(text, 0, seq_len=64)
    gpt.steps = isotropic_one.steps = hnet.trainer.state.step = 1000  # past the warm-up
    decay = hnet.trainer.config.decay_fraction
    for done in (0.2, 0.5, 0.9):
        for one in (gpt, isotropic_one, hnet):
            one.step(done)
        rate = gpt.optimizer.param_groups[0]["lr"] / 1e-3
        assert rate == pytest.approx(0.55 + 0.45 * math.cos(math.pi * done))
        rates = [o.param_groups[0]["lr"] for o in isotropic_one.optimizers]
        assert rates == pytest.approx([x * min(1, (1 - done) / 0.7) for x in (0.02, 0.006)])
        assert hnet.trainer.optimizers.factor == pytest.approx(min(1, (1 - done) / decay), abs=2e-3)


@pytest.mark.parametrize("unit", run.UNITS)
def test_a_run_ends_when_its_budget_is_spent(text, tmp_path, unit):
    path = tmp_path / "words.txt"
    path.write_bytes(bytes(text.tolist()))
    amount = 0.2 if unit == "seconds" else 0.02
    row = run.measure(run.Run("nanogpt", str(path), amount, unit, 0, 500), evaluations=2)
    assert (row["corpus"], row["held_out_bytes"], row["train_bytes"]) == ("words", 500, len(text) * 9 // 10)
    assert row[unit] >= amount
    assert row["teraflops"] == pytest.approx(row["steps"] * 768 * 5.11e6 / 1e12, rel=0.01)
    assert row["val"] == row["curve"][-1][2] < 1.1 * math.log(256)
    assert len(row["curve"]) == 2 or unit == "seconds"  # a slow step may go past both at once


def test_models_may_be_given_other_keys(text):
    made = run.learner("hnet compression=[6.0] rate_control='none' seq_len=128", text, seed=3)
    config = made.trainer.config
    assert (config.compression, config.rate_control, config.seed, made.context) == ([6.0], "none", 3, 127)


def row(model: str, amount: float, seed: int, val: float, **changes) -> dict:
    return {
        "model": model, "corpus": "words", "amount": amount, "unit": "seconds", "seed": seed, "val": val,
        "seconds": amount + 0.01, "steps": 100, "bytes": 204800, "teraflops": 0.8, "context": 128, "parameters": 600000,
        "train_bytes": 900, "held_out_bytes": 100, "curve": [[amount, 0.8, val]], **changes,
    }  # fmt: skip


def test_the_plan_takes_under_an_hour(tmp_path, monkeypatch, capsys):
    path = tmp_path / "as_long_as_tinyshakespeare.txt"
    path.write_bytes(b"a" * 1_115_394)
    runs = plan.planned(str(path), 0)
    assert len({repr(r.key) for r in runs}) == len(runs)
    assert {r.model for r in runs if r.amount == 120} == set(run.LEARNERS)
    assert {r.seed for r in runs if r.amount == 120 and r.model != "nanogpt"} == {0, 1, 2}
    assert max(r.amount for r in runs) == runs[-1].amount == 300
    steps = sum(r.amount for r in runs)
    assert plan.minutes(runs) == pytest.approx((steps + len(runs) * (6 + 4 * 111_540 / 60_000)) / 60)
    assert plan.minutes(runs) < 57
    monkeypatch.setattr("sys.argv", ["learning", "--data", str(path), "--dry-run"])
    main()
    assert capsys.readouterr().out.startswith(f"{len(runs)} runs, about {plan.minutes(runs):.0f} minutes")


def test_what_is_left_follows_the_runs_that_are_done():
    runs = [run.Run("hnet", "x", amount, "seconds", 0, 100) for amount in (30, 60, 120)]
    rows = [{"seconds": 30.1}, {"seconds": 60.1}]
    assert run.left(runs, rows, 90.2 + 2 * 60) == "2 of 3, about 3 minutes left"
    assert run.left(runs, [*rows, {"seconds": 120}], 400) == "3 of 3, about 0 minutes left"
    flops = [runs[0], run.Run("hnet", "x", 1, "teraflops", 0, 100)]
    assert run.left(flops, rows[:1], 40) == "1 of 2"
    assert "without 1 that end by their FLOPs" in plan.estimate(flops)


def test_the_picture_has_the_length_of_most_models(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, *a, label=None, **k: drawn.append(label))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda self: None)
    short = [row(model, 120, 0, 1.5) for model in ("hnet", "isotropic", "nanogpt")]
    draw([row("hnet", 300, 0, 1.4), *short, row("isotropic", 300, 0, 1.4)], tmp_path / "x.png")
    assert [label for label in drawn if label] == ["hnet", "isotropic", "nanogpt"]


def test_table_and_picture(tmp_path, monkeypatch):
    path = tmp_path / "learning.json"
    monkeypatch.setattr(run, "machine", lambda: {"cpu": "x", "threads": 2, "torch": "2", "date": "now"})
    for seed, (a, b) in enumerate(((1.5, 1.54), (1.52, 1.53))):
        run.add(path, row("hnet", 30, seed, 9.0))  # replaced by one that comes later
        run.add(path, row("isotropic", 30, seed, b))
        run.add(path, row("hnet", 30, seed, a))
    data = json.loads(path.read_text())
    assert len(data["rows"]) == 4
    section = learning_section(data)
    assert "| 30 | `hnet` | 1.510 (1.500 to 1.520) | 2 | 100 | 6.8 | 3.91 |  |" in section
    assert "| 30 | `isotropic` | 1.535 (1.530 to 1.540) | 2 | 100 | 6.8 | 3.91 | +0.010 to +0.040 |" in section
    draw(data["rows"], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(run, "machine", lambda: {"cpu": "x", "threads": 4, "torch": "2", "date": "now"})
    run.add(path, row("hnet", 30, 0, 1.4))  # another machine: what was measured elsewhere is no comparison
    assert len(json.loads(path.read_text())["rows"]) == 1
