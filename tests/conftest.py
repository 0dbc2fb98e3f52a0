import re
from collections import Counter

import pytest
import torch


def pytest_collection_modifyitems(items):
    # the longest first, or a worker is left alone with them
    items.sort(key=lambda item: "test_triton_interpreted" not in item.nodeid)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """One line for each reason to skip."""
    for reason, count in skip_reasons(terminalreporter.stats.get("skipped", [])).most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


def skip_reasons(reports) -> Counter[str]:
    return Counter(re.sub(r"^Skipped: ", "", r.longrepr[2]) for r in reports)  # (file, line, "Skipped: why")
