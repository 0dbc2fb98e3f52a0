"""Version, changelog, workflows and the tests' own closing lines."""

import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import hnet_kernels as hk

from .conftest import skip_reasons

ROOT = Path(__file__).parent.parent


def test_the_version_stands_in_one_place():
    assert version("hnet-kernels") == hk.__version__
    written = re.compile(rf"version\w* *=.*{re.escape(hk.__version__)}")
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *ROOT.glob("hnet*/**/*.py")]
    assert [f.relative_to(ROOT).as_posix() for f in files if written.search(f.read_text())] == [
        "hnet_kernels/__init__.py"
    ]


def test_the_changelog_has_the_version_and_what_is_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert any(re.fullmatch(rf"{re.escape(hk.__version__)} - \d{{4}}-\d\d-\d\d", h) for h in headings)
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security",
    }  # fmt: skip


def test_ci_runs_what_anyone_runs():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert [run.split()[0] for run in re.findall(r"\brun: (.*)", workflow)] == [".ci/run"]
    script = (ROOT / ".ci" / "run").read_text()
    for target in re.findall(r"make ([\w-]+)", script):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    assert {"test", "test-slow", "gate", "check", "smoke"} <= set(re.findall(r"make ([\w-]+)", script))


def test_no_test_escapes_all_of_make_test_and_its_slow_kin():
    chosen = re.findall(
        r"^test[\w-]*: setup.*\n\t\$\(PYTEST\) .*?(-m .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert chosen == ['-m "not slow"', '-m "slow and not long"', "-m long"]


def test_skips_are_one_line_a_reason():
    reports = [
        SimpleNamespace(longrepr=(__file__, line, f"Skipped: {why}"))
        for line, why in enumerate(["no CUDA device", "no CUDA device", "needs nm"])
    ]
    assert skip_reasons(reports) == Counter({"no CUDA device": 2, "needs nm": 1})
