"""Chunks as lines of JSON, for other programs."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from .boundaries import Segmentation


def json_line(piece: Segmentation, stages: list[int]) -> str:
    """One object for a piece, without a line end.

    offset          of the piece in the file, bytes
    text            the piece; where it is not valid UTF-8, U+FFFD stands for what is not, and
    base64          (only there) has its bytes
    bytes_per_chunk of the outermost of `stages` in this piece, null without a chunk
    loss            nats of every byte
    stages          one object for each of `stages`:
      stage         its number, 0 is the outermost
      offsets       of its positions in the file, bytes (left out for stage 0, whose positions are all bytes)
      probability   of a boundary at each position
      starts        offsets in the file where its chunks begin
    """
    line: dict[str, Any] = {"offset": piece.offset, "text": piece.text.decode("utf-8", "replace")}
    if line["text"].encode() != piece.text:
        line["base64"] = base64.b64encode(piece.text).decode()
    chunks = len(piece.stages[stages[0]].starts)
    line["bytes_per_chunk"] = round(len(piece.text) / chunks, 4) if chunks else None
    line["loss"] = _rounded(piece.loss)
    line["stages"] = []
    for i in stages:
        s = piece.stages[i]
        where = {} if i == 0 else {"offsets": (s.offsets + piece.offset).tolist()}
        starts = (s.starts + piece.offset).tolist()
        line["stages"].append({"stage": i} | where | {"probability": _rounded(s.probability), "starts": starts})
    return json.dumps(line, ensure_ascii=False)


def _rounded(x: np.ndarray) -> list[float]:
    return x.astype(np.float64).round(4).tolist()
