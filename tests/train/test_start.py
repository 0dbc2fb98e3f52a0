"""What data and configuration rule out together ends a run before it writes anything."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hnet.cli.main import main
from hnet.config.keys import override, read_toml
from hnet.data.corpus import Corpus
from hnet.data.pack_stream import PackStream
from hnet.data.packing import Packed
from hnet.errors import UserError
from hnet.metrics_log import read_metrics
from hnet.train.config import TrainConfig
from hnet.train.dry_run import report
from hnet.train.loop import Trainer
from hnet.train.start import candidate_share

TELUGU = "అనగనగా ఒక ఊరిలో ఒక రాజు ఉండేవాడు "


def of_text(config, tmp_path, text, **change):
    path = tmp_path / "text.txt"
    path.write_text(text)
    return dataclasses.replace(config, data=[str(path)], pattern="*", val_data=[str(path)], **change)


def refused(config, message):
    for start in (Trainer, report):
        with pytest.raises(UserError) as e:
            start(dataclasses.replace(config))
        assert message in str(e.value)
        assert "\n" not in str(e.value)
    assert not Path(config.out).exists()


def test_sequences_that_do_not_fit_a_micro_batch(config):
    refused(
        dataclasses.replace(config, seq_len=512, batch_bytes=1024, accumulation=8),
        "seq_len must be at most a micro-batch, batch_bytes / (accumulation x processes) = 1024 / 8 = 128, got 512",
    )


def test_a_budget_below_the_sequences(config, tmp_path):
    c = of_text(config, tmp_path, "twelve bytes\n" * 900, documents="line", compression=[3.0])
    refused(
        dataclasses.replace(c, max_chunks=[0.05]),
        "max_chunks must leave room for the first chunk of every sequence: 0.05 of a micro-batch's 512 bytes is 26",
    )


def test_a_rare_pack_of_more_sequences_than_the_budget_trains(config, tmp_path):
    """Lines of two bytes among lines of a hundred."""
    rng = np.random.default_rng(0)
    lines = ["a\n" * 30 if i % 9 == 0 else "word " * 20 + "\n" for i in range(400)]
    text = "".join(lines[i] for i in rng.permutation(400))
    c = of_text(config, tmp_path, text, documents="line", compression=[2.0], max_chunks=[0.05], steps=8)
    c = dataclasses.replace(c, batch_bytes=256, eval_every=8)
    packs = PackStream(Corpus.of(text.encode().splitlines(keepends=True)), 128, 256, c.seed)
    assert max(len(next(packs).cu_seqlens) - 1 for _ in range(8)) > 13  # the budget
    Trainer(c).train()


def test_a_target_shorter_than_the_boundaries_allow(config, tmp_path):
    c = of_text(config, tmp_path, TELUGU * 300, compression=[2.0], rate_control="bias")
    characters = len(TELUGU) / len(TELUGU.encode())
    assert characters < 0.45
    for boundaries in ("char-start", "char-end"):
        refused(
            dataclasses.replace(c, boundaries=boundaries),
            f"compression of stage 0 must be at least {1 / characters:.2g}",
        )
    Trainer(dataclasses.replace(c, boundaries="char-start", compression=[4.0]))
    Trainer(c)


def test_a_target_longer_than_the_documents(config, tmp_path):
    c = of_text(config, tmp_path, "twelve bytes\n" * 900, documents="line", compression=[15.0])
    refused(c, "compression asks for 15 bytes a chunk at stage 0, but the sequences of these documents have 14")
    two = dataclasses.replace(c, preset="", arch="c1 c1 T1", d_model=[32, 32, 64], compression=[4.0, 4.0])
    refused(two, "compression asks for 16 bytes a chunk at stage 1")
    refused(dataclasses.replace(c, compression=[3.0], compression_start=[40.0]), "compression_start asks for 40 bytes")
    Trainer(dataclasses.replace(two, compression=[3.0, 3.0]))


def test_candidate_share_by_hand():
    text = "aé€😀".encode()  # 1 + 2 + 3 + 4 bytes
    inputs = np.frombuffer(b"\xfe" + text, dtype=np.uint8)
    sample = Packed(inputs, inputs, np.array([0, 11], dtype=np.int32), 11)
    assert candidate_share(sample, "any") == 1
    assert candidate_share(sample, "char-start") == pytest.approx(5 / 11)
    assert candidate_share(sample, "char-end") == pytest.approx(5 / 11)


# --- epochs -------------------------------------------------------------------------------------------------------


def test_epochs_are_passes_over_the_data(config):
    c = dataclasses.replace(config, steps=TrainConfig.steps, epochs=0.05, batch_bytes=2048, eval_every=100)
    trainer = Trainer(c)
    corpus = trainer.task.stream.corpus
    assert trainer.config.steps == round(0.05 * (corpus.num_bytes + len(corpus)) / 2048)
    trainer.train()
    rows = [r for r in read_metrics(Path(c.out) / "metrics.jsonl") if "loss" in r]
    assert len(rows) == trainer.config.steps
    assert rows[-1]["epoch"] == pytest.approx(0.05, rel=0.5 / len(rows))
    assert [r["epoch"] for r in rows] == pytest.approx(np.arange(1, len(rows) + 1) * rows[0]["epoch"], rel=1e-5)
    again = TrainConfig(**read_toml(Path(c.out) / "config.toml", TrainConfig)).validate()
    assert (again.steps, again.epochs) == (len(rows), 0.0)


def test_epochs_exclude_steps(config):
    with pytest.raises(ValueError, match="epochs must be left out where steps is given, got 2.0"):
        dataclasses.replace(config, steps=5, epochs=2.0).validate()


def test_epochs_of_a_stream_are_unknown(config, monkeypatch):
    from hnet.train import start

    c = dataclasses.replace(config, steps=TrainConfig.steps, epochs=2.0, data=["hf:some/text"])
    with pytest.raises(ValueError, match="epochs must be left out where nobody knows how long the data are"):
        start.settle_steps(c, object())


def test_a_flag_for_steps_or_epochs_replaces_both_of_the_file():
    written = {"steps": 30, "epochs": 3.0, "seed": 1}
    assert override(written, {"epochs": 6.0}) == {"epochs": 6.0, "seed": 1}
    assert override(written, {"steps": 9, "seed": 2}) == {"steps": 9, "seed": 2}
    assert override(written, {"seed": 2}) == {**written, "seed": 2}


def test_the_command_takes_epochs_instead_of_the_steps_of_a_file(tmp_path, config):
    config.steps = 40
    (tmp_path / "c.toml").write_text(config.to_toml())

    def dry_run(*more):
        return CliRunner().invoke(main, ["train", str(tmp_path / "c.toml"), "--dry-run", *more])

    assert "run        40 steps" in dry_run().output
    assert ", 2.00 passes over the data" in dry_run("--epochs", "2").output
    both = dry_run("--epochs", "2", "--steps", "7")
    assert both.exit_code == 1
    assert both.output.endswith("Error: steps and epochs exclude each other, got 7 and 2\n")
