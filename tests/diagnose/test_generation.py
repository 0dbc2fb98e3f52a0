"""What is measured of samples, against slow ways of saying the same; a whole run from its checkpoint."""

import json
import math
from itertools import groupby

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from hnet import HNetConfig, HNetForCausalLM
from hnet.cli.diagnose import diagnose
from hnet.cli.generate import generate as generate_command
from hnet.diagnose import generation as g
from hnet.train.loop import Trainer
from tests.train.conftest import tiny

TEXTS = [
    b"", b"a", b"aaaa", b"abcabcabc", "größer als 語".encode(), "語".encode()[:2],
    b"\xff\xfe ok \xc3", bytes(range(256)),
    *(np.random.default_rng(s).choice(list(b"ab \xc3\xa9"), 40).astype(np.uint8).tobytes() for s in range(12)),
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_measures_against_slow_ones(text):
    for n in (1, 2, 4):
        grams = [text[i : i + n] for i in range(len(text) - n + 1)]
        repeated = sum(grams[i] in grams[:i] for i in range(len(grams)))
        assert g.distinct(text, n) == pytest.approx(1 - repeated / len(grams) if grams else 1)
        assert g.repetition(text, n) == pytest.approx(repeated / len(grams) if grams else 0)
    assert g.longest_run(text) == max((len(list(v)) for _, v in groupby(text)), default=0)
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256) if text else np.zeros(256)
    p = counts[counts > 0] / max(len(text), 1)
    assert g.entropy(text) == pytest.approx(float(-(p * np.log2(p)).sum()), abs=1e-12)
    lost = text.decode("utf-8", "surrogateescape")
    cut = next((k for k in range(1, 4) if ends_in_part(text, k)), 0)  # bytes of a character that the end cut
    invalid = sum(0xDC80 <= ord(c) <= 0xDCFF for c in lost) - cut
    assert g.utf8_validity(text) == pytest.approx(1 - invalid / len(text) if text else 1)


def ends_in_part(text, k):
    """Its last k bytes are the beginning of a character."""
    need = {0xC2 <= b <= 0xDF: 2 for b in text[-k:][:1]} | {0xE0 <= b <= 0xEF: 3 for b in text[-k:][:1]}
    need |= {0xF0 <= b <= 0xF4: 4 for b in text[-k:][:1]}
    if len(text) < k or not need.get(True, 0) > k:
        return False
    tails = [bytes(t) for t in ([0x80] * 3, [0x90] * 3, [0xBF] * 3)]
    for t in tails:
        try:
            (text[-k:] + t[: need[True] - k]).decode()
        except UnicodeDecodeError:
            continue
        return True
    return False


@pytest.mark.parametrize("seed", range(6))
def test_the_longest_copy(seed):
    rng = np.random.default_rng(seed)
    text, source = (bytes(rng.choice(list(b"abc"), n).astype(np.uint8)) for n in (30, 60))
    pieces = {source[i:j] for i in range(len(source)) for j in range(i + 1, len(source) + 1)}
    every = [text[i:j] for i in range(len(text)) for j in range(i, len(text) + 1)]
    assert g.longest_copy(text, source) == max(len(p) for p in every if p in pieces or not p)


@torch.no_grad()
def test_bits_of_a_completion_against_a_byte_at_a_time():
    torch.manual_seed(0)
    model = HNetForCausalLM(HNetConfig.preset("tiny")).eval()
    prompt, text, nats = b"def ", b"f(x):", 0.0
    for i, byte in enumerate(text):
        ids = torch.tensor([[254, *prompt, *text[:i]]])
        nats -= float(torch.log_softmax(model(ids).logits[0, -1].double(), -1)[byte])
    assert g.completion_bpb(model, prompt, text) == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    assert math.isnan(g.completion_bpb(model, prompt, b""))


def row(t, **changes):
    usual = {"repetition_8": 0.1, "distinct_4": 0.8, "longest_run": 3, "entropy": 4.3, "utf8_validity": 1.0, "bpb": 1.6}
    return {"temperature": t, **usual, **changes}


def found(*changes):
    """changes: of the rows of 0.5, 0.8 and 1.0"""
    rows = [row(t, **c) for t, c in zip(g.TEMPERATURES, changes, strict=True)]
    return {f.name: f for f in g.generation([*rows, row(None)])}


def test_advice():
    assert found({}, {}, {}).keys() == {"samples"}
    loops = found({"repetition_8": 0.9}, {"repetition_8": 0.8}, {"repetition_8": 0.6})["repetition"]
    assert loops.severity == "warning"
    assert loops.sampling == {"temperature": 1.0, "top_p": 0.9, "dry_multiplier": 0.8}
    known = {o.name for o in generate_command.params}
    assert loops.sampling.keys() <= known
    assert found({"repetition_8": 0.9}, {}, {})["repetition"].severity == "note"
    assert found({}, {}, {"bpb": 3.5})["hot_samples"].sampling["temperature"] < 1
    assert "--valid-utf8" in found({}, {}, {"utf8_validity": 0.9})["invalid_utf8"].advice[-1]
    assert "valid_utf8" in known
    assert "low_entropy" in found({"entropy": 1.0}, {}, {})
    assert "64 bytes in a row" in found({}, {"copy": 64}, {})["copies"].evidence[0]
    assert "copies" not in found({}, {"copy": 63}, {})


@pytest.mark.slow
def test_a_run_from_its_checkpoint(tmp_path):
    config = tiny(tmp_path / "run")
    Trainer(config).train()
    out = tmp_path / "report"
    r = CliRunner().invoke(diagnose, [config.out, "--generate", "--json", "--out", str(out)])
    assert r.exception is None or r.exit_code == 1, r.output
    (report,) = json.loads(r.stdout)
    assert [x["temperature"] for x in report["generation"]] == [*g.TEMPERATURES, None]
    assert all(0 < x["bpb"] < 20 for x in report["generation"])
    assert any(f["analysis"] == "generation" for f in report["findings"])
    pictures = {"loss_curves", "learning_rates", "grad_norms", "compression", "chunk_lengths", "sample_segmentation"}
    assert pictures <= {p.stem for p in out.glob("*.png")}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(out.glob("*.png")))
    assert 'src="http' not in page
    assert "<script" not in page
    assert (out / "report.md").read_text().index("What to do now") < 600
    assert json.loads((out / "report.json").read_text()) == report
