"""docs/diagnose.md says what the code has."""

from pathlib import Path

from hnet.diagnose.catalogue import CATALOGUE
from hnet.diagnose.thresholds import TABLE

PAGE = (Path(__file__).parents[2] / "docs" / "diagnose.md").read_text()


def test_every_finding_has_its_line():
    for name, e in CATALOGUE.items():
        assert f"| `{name}` | {e.analysis} | {e.meaning} | {e.confidence} | {e.refute} |" in PAGE


def test_every_threshold_has_its_line():
    for name, rows in TABLE.items():
        for r in rows:
            below = "any size" if r.below == float("inf") and len(rows) == 1 else f"{r.below:.0e}"
            assert f"| `{name}` | {below} | {r.value:.3g} | {r.source} |" in PAGE
