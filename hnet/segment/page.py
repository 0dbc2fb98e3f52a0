"""Chunks as one HTML page that needs nothing else: no network, no file beside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import TextIO

import numpy as np

from .boundaries import Segmentation
from .frame import begin, end, for_script

FULL = 65535  # probability 1; losses are in thousandths of a nat, up to 65.535
RECORD = 1 << 16  # bytes of text in one script element, about

HEADER = """<p id="summary"></p>
<div id="controls">
<fieldset id="stages"><legend>Chunks of</legend></fieldset>
<label for="threshold">Hide chunks under p <input type="range" id="threshold" min="0.5" max="1" step="0.01" value="0.5">
<output id="threshold-value" for="threshold">0.50</output></label>
<button type="button" id="theme">Light or dark</button>
</div>
</header>
<main id="text" role="listbox" aria-label="Chunks of the text, in order"></main>
<aside id="detail" aria-label="The chunk under the pointer or the keyboard">
<div id="about" aria-live="polite"></div>
<div class="scroll"><table id="bytes"></table></div>
<p class="help">Hover, tap, or Tab and the arrow keys; Home and End go to the ends of a line. Fainter: less sure.
<span class="x">E0·B0</span> are bytes of a character that chunks share; ◌ stands where a mark is cut from its
letter.</p>
</aside>
<noscript>This page draws its text with JavaScript.</noscript>
<script type="application/json" id="about-data">{about}</script>
"""


def write_page(
    out: TextIO,
    found: Iterable[Segmentation],
    *,
    title: str,
    model: str = "",
    stages: int,
    shown: Sequence[int] | None = None,
) -> None:
    """Write the page of a text or of the pieces of a file, in memory for a few pieces.

    Args:
        title: of the page; model: a word on where the chunks are from.
        stages: how many every piece has.
        shown: numbers of the stages to show at first, outermost first. Default: all.
    """
    about = {"stages": stages, "shown": list(range(stages)) if shown is None else list(shown), "model": model}
    out.write(begin(title, "chunks") + HEADER.format(about=for_script(about)))
    record: list[Segmentation] = []
    for piece in found:
        record.append(piece)
        if sum(len(p.text) for p in record) >= RECORD:
            out.write(_script(record))
            record = []
    if record:
        out.write(_script(record))
    out.write(end("page.js"))


def _script(record: list[Segmentation]) -> str:
    """Little-endian arrays as base64, in which there is no `<`, whatever the text."""
    stages = zip(*(p.stages for p in record), strict=True)
    data = {
        "text": _base64(b"".join(p.text for p in record)),
        "loss": _base64(_uint16(np.concatenate([p.loss for p in record]) * 1000)),
        "depth": _base64(np.concatenate([p.depth for p in record]).tobytes()),
        "prob": [_base64(_uint16(np.concatenate([s.probability for s in stage]) * FULL)) for stage in stages],
    }
    return f'<script type="application/json" class="piece">{for_script(data)}</script>\n'


def _uint16(x: np.ndarray) -> bytes:
    return np.nan_to_num(x, nan=FULL).round().clip(0, FULL).astype("<u2").tobytes()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
