"""scripts/gpu_harvest.sh: what it would run, and the running of items (scripts/items.sh) on made-up ones."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HARVEST = ROOT / "scripts" / "gpu_harvest.sh"
LIMIT = 480  # seconds of a part


def bash(folder, *command, **env):
    here = {k: v for k, v in os.environ.items() if k not in ("OUT", "STATE", "DRY", "REHEARSE", "WHEELS", "BUDGET")}
    here |= {"STATE": str(folder / "state"), "PYTHON": sys.executable, **env}
    return subprocess.run(
        ["bash", *map(str, command)], env=here, cwd=folder, capture_output=True, text=True, timeout=60
    )


def items(folder, *lines, budget=60, **env):
    """Runs these lines between begin and finish."""
    script = "\n".join([f"source {ROOT}/scripts/items.sh", f"begin fake {budget}", *lines, "finish"])
    return bash(folder, "-c", script, OUT=str(folder / "out"), **env)


def statuses(folder):
    lines = (folder / "out" / "fake.tsv").read_text().splitlines()
    return {name: (status, last) for name, status, seconds, last in (x.split("\t") for x in lines) if int(seconds) < 60}


def test_an_item_that_fails_stops_no_other(tmp_path):
    done = items(
        tmp_path, "item bad 9 sh -c 'echo no; echo worse >&2; exit 3'", "item good 9 sh -c 'echo one; echo; echo two'",
        "item absent 9 sh -c 'echo no tool; exit 77'",
    )  # fmt: skip
    assert done.returncode == 1
    assert statuses(tmp_path) == {"bad": ("FAIL", "worse"), "good": ("pass", "two"), "absent": ("skip", "no tool")}
    table = done.stdout[done.stdout.index("\nfake: ") :].splitlines()[2:]
    assert [x.split()[:2] for x in table] == [["item", "status"], ["bad", "FAIL"], ["good", "pass"], ["absent", "skip"]]
    log = (tmp_path / "out" / "fake.log").read_text()
    assert "=== good (at most 9 s): sh -c" in log
    assert "one\n\ntwo\n" in log


def test_what_is_done_is_not_done_again(tmp_path):
    lines = ["item good 9 sh -c 'echo ran >> good'", "item bad 9 sh -c 'echo ran >> bad; test -e repaired'"]
    assert items(tmp_path, *lines).returncode == 1
    (tmp_path / "repaired").touch()
    done = items(tmp_path, *lines)
    assert done.returncode == 0, done.stdout
    assert "=== good: done before" in done.stdout
    assert [(tmp_path / name).read_text().count("ran") for name in ("good", "bad")] == [1, 2]
    assert {name: status for name, (status, *_) in statuses(tmp_path).items()} == {"good": "pass", "bad": "pass"}


def test_each_item_has_its_time_and_takes_its_children_with_it(tmp_path):
    stubborn = 'trap "" INT; sleep 40 & echo $! > child; wait; sleep 40'
    begin = time.monotonic()
    done = items(
        tmp_path, "item slow 1 sleep 40", f"item stubborn 1 bash -c '{stubborn}'", "item good 9 echo ok", GRACE="1"
    )
    assert time.monotonic() - begin < 15
    assert done.returncode == 1
    assert [status for status, *_ in statuses(tmp_path).values()] == ["timeout", "timeout", "pass"]
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_all_items_together_have_a_limit(tmp_path):
    lines = ["item long 40 sleep 40", "item late 5 echo ok"]
    done = items(tmp_path, *lines, budget=1)
    assert done.returncode == 1
    assert [status for status, *_ in statuses(tmp_path).values()] == ["timeout", "left"]
    done = items(tmp_path, "item long 40 true", lines[1])
    assert done.returncode == 0, done.stdout


def test_results_leave_after_every_item(tmp_path):
    keep = "keep() { cp numbers $OUT 2>/dev/null; wc -l < $STATE/fake.tsv >> kept; }"
    done = items(tmp_path, keep, "item one 9 sh -c 'echo 1 > numbers'", "item two 9 cat numbers")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out" / "numbers").read_text() == "1\n"
    assert (tmp_path / "kept").read_text().split() == ["1", "2"]


ITEM = re.compile(r"^(\w+) +(\d+) s  (.*)$", re.MULTILINE)


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("part1", ["versions", "build", "kernels", "model", "graphs"]),
        ("part2", ["build", "ops", "compiled", "decode", "ncu"]),
        ("part3", ["build", "steps", "memcheck", "large"]),
    ],
)
def test_dry_run(tmp_path, part, names):
    """Every item with its limit and its command; they fit together; files they name exist; nothing is touched."""
    done = bash(tmp_path, HARVEST, part, DRY="1")
    assert done.returncode == 0, done.stderr
    found = ITEM.findall(done.stdout)
    assert [name for name, *_ in found] == names
    assert sum(int(seconds) for _, seconds, _ in found) < LIMIT
    together = int(re.search(r"at most (\d+) s", done.stdout)[1])
    assert together + 15 < LIMIT  # the last item may take its time to die
    for _, _, command in found:
        assert "-m gpu" in command or command.startswith("scripts/gpu_harvest.sh ")
        for path in re.findall(r"(?:tests|benchmarks|scripts)/[\w/.]+", command):
            assert (ROOT / path).exists(), path
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = bash(tmp_path, HARVEST, "part1")
    assert done.returncode != 0
    assert "sees no CUDA device" in done.stderr
    assert done.stdout == ""


def test_usage(tmp_path):
    done = bash(tmp_path, HARVEST, "part4")
    assert done.returncode == 2
    assert "OUT=results scripts/gpu_harvest.sh part3" in done.stderr
