"""The table beside peers, and what is said where they are not installed. Whether both compute the same thing is asked
in benchmarks/test_peers.py, before they race."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.tables.gpu import gpu_section
from benchmarks.tables.peers import peers_section
from benchmarks.test_peers import require

ROOT = Path(__file__).parent.parent


def row(direction: str, **changes) -> dict:
    return {
        "op": "peers", "direction": direction, "projections": True, "device": "cpu", "peer": "h 0.5", "ours": "ours",
        "seconds": {"ours": 0.4, "torch.compile": 0.42, "h 0.5": 0.5, "projections alone": 0.38}, **changes,
    }  # fmt: skip


def test_table():
    machine = dict.fromkeys(("cpu", "isa", "threads", "torch", "date", "command"), "x")
    alone = row("both", projections=False, seconds={"ours": 0.02, "torch.compile": 0.01, "h 0.5": 0.16})
    text = peers_section({"machine": machine, "rows": [row("forward"), alone, row("both", device="cuda")]})
    assert "| projections included | forward | 400.0 ms | 420.0 ms (1.05x) | 500.0 ms (1.25x) | 380.0 ms |" in text
    assert "| without | both | 20.0 ms | 10.0 ms (0.50x) | 160.0 ms (8.00x) |  |" in text  # where we lose, too
    assert text.count("included") == 1
    assert peers_section({"machine": machine, "rows": []}) == ""


def test_where_a_card_has_them_too():
    machine = dict.fromkeys(("driver", "cuda", "torch", "triton", "python", "date", "command"), "x")
    rows = [row("both", device="cuda", N=8, D=1024)]
    text = gpu_section({"machine": {"gpu": "Some GPU", **machine}, "rows": rows}, full=False)
    assert "| projections included | both | 400.0 ms | 420.0 ms (1.05x) | 500.0 ms (1.25x) | 380.0 ms |" in text


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    said: list[str] = []
    with pytest.raises(pytest.skip.Exception, match=r"hnet-kernels\[peers\]"):
        require(said.append)
    assert said == ["left out: h-net-dynamic-chunking is not installed: pip install hnet-kernels[peers]"]
    extra = re.search(r"^peers = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert extra is not None
    assert peers.PACKAGE in extra[1]


def test_inputs_have_boundaries_and_one_first_row():
    x = peers.inputs(3, 40, 64)
    assert torch.equal(x.x[0], x.x[40])
    out, ratio = peers.ours(x, projections=True).run()
    same, _ = peers.ours(x, projections=False).run()
    assert torch.allclose(out, same, atol=1e-5)
    assert ratio > 0
    q, k = x.q.view(3, 40, 64)[:, :-1], x.k.view(3, 40, 64)[:, 1:]
    cosine = torch.cosine_similarity(q, k, dim=-1)
    assert cosine.abs().min() > 0.2  # nowhere near a tie
    assert 0.05 < (cosine < 0).float().mean() < 0.4
