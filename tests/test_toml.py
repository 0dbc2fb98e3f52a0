"""What hnet.config.toml writes, Python reads back."""

import math
from datetime import date, datetime

import pytest

from hnet.config import toml
from hnet.config.keys import tomllib


@pytest.mark.parametrize(
    "value",
    [
        "", 'a "quoted" \\ path', "line\nand\ttab\r", "\x00\x1b\x7f\x80", "naïve 漢字 🚀", "[x] = # y",
        True, False, 0, -7, 2**62, 0.0, -0.5, 1e-7, 1e22, math.inf, -math.inf,
        [], [1, 2], ["a", "b"], [0.25], [[1], []], [{"path": "a b", "weight": 0.7}, {"path": "c"}], {"of a": {"b": 1}},
        date(2026, 1, 2), datetime(2026, 1, 2, 3, 4, 5),
    ],
)  # fmt: skip
def test_round_trip(value):
    text = toml.dumps({"key": value, "another one": 1, "ß": 2})
    found = tomllib.loads(text)
    assert found == {"key": value, "another one": 1, "ß": 2}
    assert type(found["key"]) is type(value)
    assert text.count("\n") == 3


def test_nan():
    assert math.isnan(tomllib.loads(toml.dumps({"x": math.nan}))["x"])


def test_what_toml_has_not():
    with pytest.raises(TypeError, match="no NoneType"):
        toml.dumps({"x": None})
