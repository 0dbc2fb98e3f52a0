import dataclasses
import math
import re
import sysconfig
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from hnet.chunk_lm import ChunkLM
from hnet.chunk_lm.curriculum import Curriculum, check_cutoffs
from hnet.chunk_lm.task import ChunkLMTask
from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.cli.main import main
from hnet.metrics_log import read_metrics
from hnet.train.loop import Trainer
from tests.train.test_resume import run_with_a_crash, same_runs

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def curriculum(kind="plateau", **kw):
    wanted = {"steps_per_epoch": 10, "min_epoch": 2, "window": 4, "threshold": 0.005, "check": "step", **kw}
    return Curriculum(kind, [16, 32, 0], 65, **wanted)


def raises(c, losses, lr=1.0):
    """(steps done, cutoff) at every raise"""
    out = []
    for step, loss in enumerate(losses, 1):
        if any(e.name == "cutoff_raised" for e in c.observe(step, loss, lr)):
            out.append((step, c.cutoff))
    return out


# --- the rule -----------------------------------------------------------------------------------------------------


def test_raises_exactly_when_the_inequality_says_so():
    """Against the definition, written out again, on random traces."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(50):
        noise = torch.rand(120, generator=generator) * (0.02 if trial % 2 else 0.1)
        losses = (3 * torch.exp(-torch.arange(120) / 40) + 1 + noise).tolist()
        wanted, history, index = [], [], 0
        for step, loss in enumerate(losses, 1):
            history.append(loss)
            if index == 2 or len(history) < 4 or step // 10 < 2:
                continue
            first, second = sum(history[-4:-2]) / 2, sum(history[-2:]) / 2
            if (first - second) / first < 0.005:
                index += 1
                wanted.append((step, [16, 32, 65][index]))
                history = []
        assert raises(curriculum(), losses) == wanted
        assert wanted


def test_never_early_never_down():
    flat = [2.0] * 100
    assert raises(curriculum(), flat) == [(20, 32), (24, 65)]  # the epoch is 2 after 20 steps; then a window of 4
    assert raises(curriculum(min_epoch=5), flat) == [(50, 32), (54, 65)]
    falling = [5 * 0.99**s for s in range(100)]
    assert raises(curriculum(), falling) == []
    assert raises(curriculum(window=50), flat) == [(50, 32), (100, 65)]
    c = curriculum()
    assert raises(c, [2.0] * 40 + [9.0] * 40) == [(20, 32), (24, 65)]  # a rising loss lowers nothing
    assert c.cutoff == 65


def test_schedule_by_epoch_and_none():
    assert raises(curriculum("epochs", raise_epochs=[1, 3]), [2.0] * 50) == [(10, 32), (30, 65)]
    c = curriculum("none")
    assert c.cutoff == 65
    assert raises(c, [2.0] * 50) == []


def test_warnings_after_a_raise():
    c = curriculum()
    for step in range(1, 21):
        c.observe(step, 2.0, 1.0)
    assert c.cutoff == 32
    (event,) = c.observe(21, 3.5 * 0.99**21, 0.4)
    assert event.name == "lr_not_at_peak"
    assert "0.40 of its peak" in event.message
    found = [e for s in range(22, 40) for e in c.observe(s, 3.5 * 0.99**s, 0.9)]  # falling too fast for a raise
    assert [e.name for e in found] == ["not_recovered"]
    assert "an epoch after the raise to 32" in found[0].message
    quiet = curriculum()
    for step in range(1, 60):
        for e in quiet.observe(step, 3 * math.exp(-step / 300), 1.0):
            assert e.name == "cutoff_raised"


def test_cutoffs():
    assert check_cutoffs([128, 256, 512, 0], 1025) == [128, 256, 512, 1025]
    assert check_cutoffs([128, 256, 512, 0], 257) == [128, 256, 257]
    assert check_cutoffs([64], 257) == [64]
    for bad in ([], [256, 128], [0, 128], [-1, 0]):
        with pytest.raises(ValueError, match="cutoffs must rise"):
            check_cutoffs(bad, 1025)
    with pytest.raises(ValueError, match="raise_epochs must have one epoch for each of the 2 raises"):
        curriculum("epochs", raise_epochs=[1])


def test_state_survives():
    a, b = curriculum(), curriculum()
    losses = [2 + 0.1 * math.sin(s) for s in range(30)]
    raises(a, losses[:22])
    b.load_state_dict(a.state_dict())
    for s in range(22, 30):
        assert a.observe(s + 1, losses[s], 0.5) == b.observe(s + 1, losses[s], 0.5)
    assert (a.cutoff, a.state_dict()) == (b.cutoff, b.state_dict())


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    return ChunkLMTrainConfig(
        data=[str(STDLIB / "json")], pattern="*.py", seq_len=64, kernel_len=16, chunk=4, width=32, n_layers=2,
        batch_size=2, accumulation=2, epochs=6, steps_per_epoch=4, learning_rate=1e-3, cutoffs=[8, 16, 0],
        plateau_window=4, plateau_threshold=0.9, checkpoint_every=6, eval_every=12, eval_bytes=256, sample_bytes=0,
        plots=False, weight_ema=0.9, out=str(tmp_path / "run"),
    )  # fmt: skip


@pytest.mark.parametrize("crash", [11, 14], ids=["before", "after"])
def test_resume_across_a_raise_is_exact(config, crash):
    """The checkpoint of step 6 is before the first raise (step 8), that of step 12 between raises."""
    Trainer(config, make_task=ChunkLMTask).train()
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    steps = [r["step"] for r in rows if r.get("event") == "cutoff_raised"]
    assert steps == [8, 12]  # the starts of epochs 2 and 3
    again = dataclasses.replace(config, out=config.out + "2", restart_at=[0.0], restart_min=[0.1])
    assert run_with_a_crash(again, crash, make_task=ChunkLMTask) == crash // 6 * 6
    same_runs(Path(config.out), Path(again.out))


def test_learning_rate_restarts_and_decays_from_there(config):
    Trainer(config, make_task=ChunkLMTask).train()
    rows = {r["step"]: r for r in read_metrics(Path(config.out) / "metrics.jsonl") if "lr" in r}
    assert list(rows) == list(range(1, 25))  # every step is logged, whatever is printed
    raised = [s for s in range(2, 25) if rows[s]["cutoff"] > rows[s - 1]["cutoff"]]
    assert raised == [9, 13]  # first steps at the new cutoff
    for s in raised:
        assert rows[s]["lr"] == pytest.approx(1e-3)
        after = [rows[t]["lr"] for t in range(s, 21)][:4]
        assert all(a > b for a, b in zip(after[:-1], after[1:], strict=True))  # not for one step only
    assert rows[21]["lr"] == pytest.approx(1e-3)  # the stage of epoch 5
    assert rows[24]["lr"] < 0.5e-3


def test_command_prints_and_writes_what_people_know(tmp_path):
    flags = [
        "--seq-len", "64", "--kernel-len", "16", "--chunk", "4", "--batch-size", "2", "--accum-steps", "2",
        "--steps-per-epoch", "4", "--epochs", "4", "--lr", "0.0002", "--log-every", "2", "--width", "32",
        "--n-layers", "2", "--cutoffs", "8", "16", "0", "--plateau-window", "4", "--plateau-threshold", "0.9",
        "--ckpt", str(tmp_path / "lm.pt"), "--eval-bytes", "256",
    ]  # fmt: skip
    data = [str(STDLIB / "json" / f"{n}.py") for n in ("decoder", "encoder", "scanner", "tool")]
    done = CliRunner().invoke(main, ["train-chunk-lm", "--data", *data, *flags])
    assert done.exit_code == 0, done.output
    assert "  step 2/4 loss=5.5" in done.output
    assert re.search(r"lr=1\.\de-4 cutoff=16", done.output)
    assert "Epoch 2 🚀 CUTOFF RAISED: 8 -> 16 (loss plateaued, opening frequency gates)" in done.output
    assert "Epoch 1 avg_loss=5.5" in done.output
    assert "cutoff=8/65" in done.output
    assert (tmp_path / "lm" / "plots").is_dir()
    saved = ChunkLM.from_pretrained(tmp_path / "lm.pt")
    latest = ChunkLM.from_pretrained(tmp_path / "lm" / "checkpoints" / "step_00000016")
    assert saved.config == latest.config
    for (n, a), b in zip(saved.state_dict().items(), latest.state_dict().values(), strict=True):
        assert torch.equal(a, b), n
    again = CliRunner().invoke(main, ["train-chunk-lm", "--data", *data, *flags])
    assert again.exit_code == 1
    assert "already holds a run" in again.output
    more = CliRunner().invoke(main, ["train-chunk-lm", "--data", *data, *flags, "--epochs", "5", "--resume"])
    assert more.exit_code == 0, more.output
    assert "Epoch 4 avg_loss" in more.output
    text = CliRunner().invoke(
        main, ["generate-chunk-lm", str(tmp_path / "lm"), "--prompt", "def", "--max-new-bytes", "8", "--seed", "1"]
    )
    assert text.exit_code == 0, text.output
    assert text.output.startswith("def")


def test_mistakes(tmp_path, config):
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad.pt is not a whole ChunkLM file"):
        ChunkLM.from_pretrained(tmp_path / "bad.pt")
    for change, message in [
        ({"cutoffs": [64, 32]}, "cutoffs must rise"),
        ({"cutoffs": [8, 16, 12]}, "cutoffs must rise"),
        ({"kernel_len": 128}, "kernel_len must be at most seq_len"),
        ({"ckpt": config.out}, "ckpt must be a file beside the run directory"),
        ({"curriculum": "sometimes"}, "curriculum must be one of plateau, epochs, none"),
    ]:
        with pytest.raises(ValueError, match=message):
            Trainer(dataclasses.replace(config, **change), make_task=ChunkLMTask)
        assert not Path(config.out).exists()
