"""Which bytes can come next in well-formed UTF-8 (The Unicode Standard, table 3-7).

No overlong forms, no surrogates, nothing above U+10FFFF: exactly what `bytes.decode` accepts. A state is what the bytes
since the last whole character ask for.
"""

from __future__ import annotations

import numpy as np

START = 0  # between characters
# (first byte, last byte, state after it) of every state
_RANGES = (
    ((0x00, 0x7F, 0), (0xC2, 0xDF, 1), (0xE0, 0xE0, 4), (0xE1, 0xEC, 2), (0xED, 0xED, 5), (0xEE, 0xEF, 2),
     (0xF0, 0xF0, 6), (0xF1, 0xF3, 3), (0xF4, 0xF4, 7)),
    ((0x80, 0xBF, 0),),
    ((0x80, 0xBF, 1),),
    ((0x80, 0xBF, 2),),
    ((0xA0, 0xBF, 1),),  # after E0: shorter forms exist below
    ((0x80, 0x9F, 1),),  # after ED: surrogates above
    ((0x90, 0xBF, 2),),  # after F0: shorter forms exist below
    ((0x80, 0x8F, 2),),  # after F4: above U+10FFFF
)  # fmt: skip
STATES = len(_RANGES)
MISSING = (0, 1, 2, 3, 2, 2, 3, 3)  # bytes until the character is whole
LONGEST = 4  # bytes of a character

NEXT = np.full((STATES, 256), -1, dtype=np.int8)  # -1: the byte cannot come
for _state, _ranges in enumerate(_RANGES):
    for _first, _last, _after in _ranges:
        NEXT[_state, _first : _last + 1] = _after


def advance(state: int, byte: int) -> int:
    """The state after `byte`; START where it could not come."""
    return max(int(NEXT[state, byte]), START)


def state_after(text: bytes) -> int:
    """The state at the end of any bytes: START unless they end in the beginning of a character."""
    for back in range(1, min(LONGEST, len(text) + 1)):
        if text[-back] >= 0xC0:
            state = START
            for byte in text[-back:]:
                state = int(NEXT[state, byte])
                if state <= START:
                    return START
            return state
    return START


def allowed(state: int, left: int) -> np.ndarray:
    """(256,) bool: bytes after which the character can still be whole within `left` bytes, this one included."""
    after = NEXT[state]
    return (after >= 0) & (1 + np.array(MISSING)[after] <= left)
