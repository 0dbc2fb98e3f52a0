"""Pieces of a text as characters, whatever way its bytes come."""

import random

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed")

from hnet.serve.choices import Writer
from hnet.serve.limits import Limits
from hnet.serve.task import parse
from hnet.serve.worker import Piece


def test_any_cut_of_any_bytes():
    r = random.Random(0)
    alphabet = ["a", "é", "日", "\U0001f600", b"\xe2", b"\x80", b"\xf0\x9f", b"\xff"]
    for n in range(300):
        parts = r.choices(alphabet, k=r.randrange(1, 12))
        data = b"".join(p if isinstance(p, bytes) else p.encode() for p in parts)
        writer = Writer(parse(b'{"prompt": "x", "chunks": %s}' % (b"true" if n % 2 else b"false"), Limits(), "m"), 0)
        cuts = sorted({0, len(data), *(r.randrange(len(data)) for _ in range(3))})
        shown = ""
        for start, end in zip(cuts, cuts[1:], strict=False):
            last = end == len(data)
            choice = writer.choice(Piece(0, data[start:end], [], [], "length" if last else None, None))
            if choice is not None:
                shown += choice["text"]
        assert shown == data.decode(errors="replace")
        if n % 2:  # the character that a byte is of: as many whole ones as lie before the end of that byte
            for at, offset in enumerate(writer.offsets):
                assert offset == len(data[: at + 1].decode(errors="replace")) - 1
