"""The README's tables are those of the results files."""

from benchmarks.table import update
from benchmarks.tables.files import ROOT


def test_tables_come_from_results():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = path.read_text()
        assert text == update(text), f"{path.name}: run `python -m benchmarks.table`"
