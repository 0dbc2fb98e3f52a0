"""`hnet generate`: files of prompts, by turns, chunks on the screen, mistakes."""

import json
import re

import pytest
import torch
from click.testing import CliRunner

from hnet import HNetConfig, HNetForCausalLM
from hnet.chunk_lm import ChunkLM
from hnet.chunk_lm.config import ChunkLMConfig
from hnet.cli import main
from hnet.generate import Engine, quantize
from hnet.segment.render import show

from ..model.test_decode_graphs import decided


def run(*args, stdin="", **env):
    return CliRunner().invoke(main, ["generate", *(str(a) for a in args)], input=stdin, env=env)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    decided(HNetConfig.preset("tiny")).save_pretrained(root / "hnet")
    sick = HNetForCausalLM(HNetConfig.preset("tiny"))
    with torch.no_grad():
        sick.embeddings.weight[7] = float("nan")
    sick.save_pretrained(root / "sick")
    ChunkLM(ChunkLMConfig(d_model=16, n_layers=1, seq_len=32, kernel_len=8, chunk=4)).save_pretrained(root / "chunk_lm")
    return root


@pytest.fixture(scope="module")
def model(place):
    return HNetForCausalLM.from_pretrained(place / "hnet").eval()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- files of prompts -------------------------------------------------------------------------------------------------

PROMPTS = [
    {"prompt": "def "},
    {"prompt": "\udcff\udcfe", "id": "bytes", "temperature": 0},
    {"prompt": "tell", "max_new_bytes": 0},
    {"prompt": "é", "valid_utf8": True, "seed": 9, "logprobs": 2, "stop": ["zzz"]},
    {"prompt": "x", "logit_bias": {"65": 1e4}, "max_new_bytes": 3},
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    return path


def test_a_file_of_prompts(place, model, tmp_path, prompts):
    r = run(place / "hnet", "--prompts", prompts, "--out", tmp_path / "out.jsonl", "--max-new-bytes", 12, "--seed", 3)
    assert r.exit_code == 0, r.output
    found = lines(tmp_path / "out.jsonl")
    assert [line["index"] for line in found] == [0, 1, 2, 3, 4]
    assert [line["prompt"] for line in found] == [p["prompt"] for p in PROMPTS]
    assert [line["seed"] for line in found] == [3, 4, 5, 9, 7]
    assert found[1]["id"] == "bytes"
    assert (found[2]["text"], found[2]["finish"]) == ("", "length")
    assert found[4]["text"] == "AAA"
    own = [{}, {"temperature": 0}, None, {"valid_utf8": True}]
    for line, options in zip(found, own, strict=False):
        if options is not None:
            text = line["prompt"].encode("utf-8", "surrogateescape")
            settings = {"temperature": 0.8, "top_p": 0.95} | options
            expected = model.generate(text, max_new_bytes=12, seed=line["seed"], **settings)[0]
            assert line["text"].encode("utf-8", "surrogateescape") == expected
    found[3]["text"].encode()  # whole characters
    steps = found[3]["logprobs"]
    assert bytes(s["byte"] for s in steps) == found[3]["text"].encode()
    assert all(len(s["top"]) == 2 and s["logprob"] <= max(s["top"].values()) for s in steps)
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == ["out.jsonl"]


def test_it_goes_on_where_it_stopped(place, tmp_path, prompts, monkeypatch):
    args = [place / "hnet", "--prompts", prompts, "--max-new-bytes", 12, "--seed", 3, "--batch", 2]
    assert run(*args, "--out", tmp_path / "whole.jsonl").exit_code == 0
    out, step, asked = tmp_path / "out.jsonl", Engine.step, []

    def stopping(engine):
        if len(asked) == 14:
            raise KeyboardInterrupt
        asked.append(1)
        return step(engine)

    with monkeypatch.context() as m:
        m.setattr(Engine, "step", stopping)
        assert run(*args, "--out", out).exit_code != 0
    assert not out.exists()
    journal = tmp_path / "out.jsonl.unfinished"
    kept = len(lines(journal)) - 1
    assert 0 < kept < 5
    journal.write_bytes(journal.read_bytes() + b'{"index": 4, "te')  # the power went
    other = run(*args, "--out", out, "--temperature", 0.5)
    assert "is of other prompts or options: remove it to begin anew" in other.stderr
    submitted, submit = [], Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda *a, **k: submitted.append(a[1]) or submit(*a, **k))
    assert run(*args, "--out", out).exit_code == 0
    assert len(submitted) == 5 - kept
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not journal.exists()
    assert "out.jsonl exists" in run(*args, "--out", out).stderr


def test_prompts_that_fail_are_named_and_the_others_kept(place, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "\\u0007"}\n{"prompt": "good"}\n')
    args = ["--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--max-new-bytes", 3, "--ignore-eos"]
    r = run(place / "sick", *args, "--seed", 1, "--logit-bias", "7=-1e9")
    assert r.exit_code == 1
    assert r.stderr.splitlines()[-1].startswith("Error: 1 of 2 prompts ended in an error: see ")
    bad, good = lines(tmp_path / "out.jsonl")
    assert (bad["finish"], bad["error"], bad["text"]) == ("error", generate_error(), "")
    assert (good["finish"], len(good["text"].encode("utf-8", "surrogateescape"))) == ("length", 3)


def generate_error():
    return "the model's logits are not finite: there is nothing to sample"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", 'line 2 must be an object with a text "prompt"'),
        ('{"prompt": 3}', 'line 2 must be an object with a text "prompt"'),
        ('{"prompt": ""}', "line 2: prompt must hold at least one byte"),
        ('{"prompt": "x", "temperatur": 1}', "line 2 has an unknown option 'temperatur'; there are"),
        ('{"prompt": "x", "temperature": -1}', "line 2: temperature must be >= 0, got -1"),
        ('{"prompt": "x", "temperature": "hot"}', "line 2: temperature must be >= 0, got hot"),
        ('{"prompt": "x", "max_new_bytes": -1}', "line 2: max_new_bytes must be >= 0, got -1"),
        ('{"prompt": "x", "stop": [""]}', "line 2: stop must be texts or bytes, none of them empty"),
        ('{"prompt": "x", "stop": 3}', "line 2: stop must be texts or bytes"),
        ('{"prompt": "x", "seed": -1}', "line 2: seed must be a whole number from 0"),
        ('{"prompt": "x", "logit_bias": {"300": 1}}', "line 2: a byte of logit_bias must be in [0, 255], got 300"),
        ('{"prompt": "\\ud800"}', "line 2: "),
        ('{"prompt": "' + "x" * 101 + '"}', "line 2: a prompt of 101 bytes is over the limit of 100"),
    ],
)
def test_mistakes_in_a_file(place, tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n' + line + "\n")
    r = run(place / "hnet", "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "o", "--max-prompt-bytes", 100)
    assert r.exit_code == 1
    assert message in r.stderr
    assert r.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


# --- one text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "prompt must hold at least one byte"),
        (["--prompt", "x" * 9, "--max-prompt-bytes", "8"], "a prompt of 9 bytes is over the limit of 8"),
        (["--prompt", "x", "--interactive"], "--prompt and --interactive do not go together"),
        (["--prompts", "x"], "--prompts and --out need each other"),
        (["--prompts", "/nowhere", "--out", "x"], "cannot read /nowhere"),
        (["--prompt", "x", "--logprobs", "1"], "--logprobs is for --prompts"),
        (["--prompt", "x", "--top-k", "-1"], "top_k must be >= 0, got -1"),
        (["--prompt", "x", "--min-p", "2"], "min_p must be in [0, 1], got 2"),
        (["--prompt", "x", "--stop", ""], "stop must be texts or bytes, none of them empty"),
        (["--prompt", "x", "--logit-bias", "e"], "logit-bias must be BYTE=X such as 101=-2 or 0x65=-2, got 'e'"),
        (["--prompt", "x", "--logit-bias", "256=1"], "a byte of logit_bias must be in [0, 255], got 256"),
    ],
)
def test_mistakes(place, args, message):
    r = run(place / "hnet", *args)
    assert r.exit_code == 1
    assert message in r.stderr
    assert r.stderr.count("\n") == 1


def test_an_unknown_option_and_a_model_of_the_wrong_kind(place, tmp_path):
    r = run(place / "hnet", "--tempratur", 1)
    assert r.exit_code == 2
    assert "No such option" in r.stderr
    assert "--tempratur" in r.stderr
    for option in (["--interactive"], ["--show-chunks", "--prompt", "x"], ["--prompts", "x", "--out", tmp_path / "o"]):
        r = run(place / "chunk_lm", *option)
        assert f"{option[0]} needs an H-Net" in r.stderr
    r = run(place / "sick", "--prompt", "\7")
    assert (r.exit_code, r.stderr) == (1, f"Error: {generate_error()}\n")


@pytest.mark.parametrize("kind", ["hnet", "chunk_lm"])
def test_settings_reach_the_sampler(place, kind):
    r = run(place / kind, "--prompt", "x", "--max-new-bytes", 9, "--logit-bias", "0x41=1e5", "--logit-bias", "66=9e4",
            "--no-repeat-ngram", 3, "--stop", "AB")  # fmt: skip
    assert r.stdout == "xAA\n"
    r = run(
        place / kind, "--prompt", "x", "--max-new-bytes", 9, "--logit-bias", "0xe2=1e5", "--valid-utf8", "--seed", 1
    )
    assert "�" not in r.stdout
    assert len(r.stdout) == 1 + 3 + 1


def test_chunks_while_they_are_made(place, model):
    args = [place / "hnet", "--prompt", "hello é", "--max-new-bytes", 30, "--seed", 1, "--valid-utf8", "--ignore-eos"]
    plain = run(*args)
    assert plain.exit_code == 0, plain.output
    r = run(*args, "--show-chunks")
    assert r.exit_code == 0, r.output
    text = plain.stdout[:-1].encode()
    mask = model(torch.tensor([[254, *text]])).routing[0].boundary_mask[1:].tolist()
    # all bytes but the last, which the model has not read
    chunks = sum(mask[:-1])
    assert r.stderr == f"stage 0: {(len(text) - 1) / chunks:.2f} bytes per chunk, {chunks} chunks\n"
    bars, pending, seen = [], b"", ""
    for at, byte in enumerate(text):
        if mask[at] and at < len(text) - 1:
            if pending:
                seen, pending = seen + show(pending), b""
            bars.append(len(seen))
            seen += "|" if seen else ""
        pending += bytes([byte])
        try:
            pending.decode()
        except UnicodeDecodeError:
            continue
        seen, pending = seen + show(pending), b""
    assert r.stdout[:-1] == seen + show(pending)
    assert 5 < len(bars) < 30
    painted = run(*args, "--show-chunks", FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="").stdout
    runs = [(m[1], m[2]) for m in re.finditer(r"\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m", painted)]
    colours, same = [], None
    for colour, piece in runs:
        if colour != same:
            colours.append("")
        same, colours[-1] = colour, colours[-1] + piece
    assert [c for c in colours if c] == [c for c in (seen + show(pending)).replace("\n", "").split("|") if c]


def test_by_turns(place, model):
    said = "abc\n\n/show\n/undo\n/undo\n/undo\nxyz\n/reset\n/show\n/unknown\n" + "y" * 100 + "\n"
    r = run(
        place / "hnet", "--interactive", "--max-new-bytes", 6, "--temperature", 0, "--max-prompt-bytes", 50, stdin=said
    )
    assert r.exit_code == 0, r.output

    def then(text):
        return text + model.generate(text, max_new_bytes=6, temperature=0)[0]

    def shown(text):
        return text.decode(errors="replace")

    first = then(b"abc")
    second = then(first)
    out = r.stdout_bytes.decode(errors="replace").replace("> ", "")
    turns = [shown(first[3:]), shown(second[len(first) :]), shown(second), shown(then(b"xyz")[3:])]
    assert out.startswith("\n".join(turns) + "\n\n")
    assert "100 bytes of text are over the limit of 50 (--max-prompt-bytes): /undo or /reset" in out
    assert "/reset  begin anew" in out


def test_int8_writes_what_the_rounded_model_writes_and_is_for_an_hnet(place, tmp_path):
    options = ["--temperature", 0, "--max-new-bytes", 20, "--ignore-eos", "--dtype", "int8"]
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "def f("}\n{"prompt": "x"}\n')
    result = run(place / "hnet", "--prompts", prompts, "--out", out, *options)
    assert result.exit_code == 0, result.output
    rounded = quantize(HNetForCausalLM.from_pretrained(place / "hnet").eval())
    for line, prompt in zip(lines(out), ["def f(", "x"], strict=True):
        (want,) = rounded.generate([prompt], max_new_bytes=20, temperature=0, stop_at_eos=False)
        assert line["text"].encode("utf-8", "surrogateescape") == want
    refused = run(place / "chunk_lm", "--prompt", "x", *options)
    assert refused.exit_code != 0
    assert "--dtype int8 is for an H-Net on a CPU" in refused.output
