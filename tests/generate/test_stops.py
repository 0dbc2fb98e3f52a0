import random

import pytest

from hnet.generate.stops import StopStrings, checked


def slow(text: bytes, stops: list[bytes]) -> tuple[bytes, bool]:
    """The text before the stop string that ends first (the longest of those that end there)."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def test_against_a_search_of_the_whole_text():
    r, stopped = random.Random(0), 0
    for _ in range(2000):
        stops = ["".join(r.choices("ab", k=r.randrange(1, 5))).encode() for _ in range(r.randrange(4))]
        text = "".join(r.choices("abc", weights=[3, 3, 1], k=12)).encode()
        matcher, shown, ended = StopStrings(checked(stops)), b"", False
        expected, stops_there = slow(text, stops)
        for i, byte in enumerate(text):
            piece, ended = matcher.push(byte)
            shown += piece
            if ended:
                break
            # as much is shown as can be: what is held back may become a stop string
            held = text[len(shown) : i + 1]
            assert not held or any(s.startswith(held) for s in stops)
        if not ended:
            shown += matcher.flush()
        assert (shown, ended) == (expected, stops_there)
        stopped += ended
    assert 200 < stopped < 1800


@pytest.mark.parametrize("stop", ["", b"", ["a", ""], [3], [None]], ids=str)
def test_what_is_no_stop_string(stop):
    with pytest.raises(ValueError, match="stop must be texts or bytes, none of them empty"):
        checked(stop)


def test_broken_characters_stop_only_bytes():
    assert checked(b"\xa9") == (b"\xa9",)
    with pytest.raises(ValueError, match="stop must be UTF-8 where valid_utf8 is asked for"):
        checked(b"\xa9", valid_utf8=True)
