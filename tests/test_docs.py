"""The Python blocks of docs/kernels.md run, in order, in one namespace."""

import functools
import re
from pathlib import Path

import pytest
import torch

import hnet_kernels as hk

from .integrations import standin

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def outside_world(monkeypatch):
    """What the page needs and this machine lacks: the published package. And torch.compile without C++ compilation."""
    standin.install(standin.build(), monkeypatch)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()


@pytest.mark.usefixtures("outside_world")
def test_blocks_run():
    torch.manual_seed(0)
    text = PAGE.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")
    names = {"__name__": "docs"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")  # so that a traceback points into the page
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)


def test_every_op_has_its_place():
    headings = " ".join(re.findall(r"^### (.*)$", PAGE.read_text(), re.MULTILINE))
    for name in set(hk.__all__) - {"Routing", "backend"}:
        assert re.search(rf"\b{name}\b", headings), f"docs/kernels.md has no section on {name}"
