"""Printed training logs -> rows: nanoGPT, nanochat, llm.c, Megatron, torchtitan, HF Trainer, ChunkLM, our console."""

from __future__ import annotations

import ast
import json
import re
import sys
import warnings
from typing import Any

from .names import canonical

Row = dict[str, Any]

LONGEST = 4000  # characters of a line that are read: the time is quadratic in them
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?![\d.])|\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan\b|inf\b|NaN\b)"
_VALUE = re.compile(rf"(?<![\w.])({_NUMBER})\s?(ms\b|s\b|k\b|K\b|M\b)?")
_LABEL = re.compile(r"((?:[A-Za-z_][\w/\-]*[ ]+){0,3}[A-Za-z_][\w/\-]*)[^\w,|;]*$")
_STEP = re.compile(
    r"\b(?:global[_ ])?(?:step|iter|iteration|it|update)\b\s*[:=#]?\s*\[?\s*(\d+)(?:\s*/\s*(\d+))?", re.I
)
_EPOCH_END = re.compile(r"\bEpoch\s+(\d+)(?:/\d+)?\b.*\bavg_loss\b", re.I)
_RAISED = re.compile(r"(?:CUTOFF RAISED:?|\[PLATEAU\])\s*(\d+)\s*->\s*(\d+)")
_BROKEN = re.compile(r"[\w.+-]*\ufffd[\w.+\ufffd-]*")
_DICT = re.compile(r"\{[^{}]*\}")
_PHRASES = (
    (re.compile(r"\bresum(ed|ing)\b", re.I), "resume"),
    (re.compile(r"\bearly[- ]stopp", re.I), "early_stop"),
    (re.compile(r"out of memory|OutOfMemoryError", re.I), "out_of_memory"),
    (re.compile(r"no space left on device", re.I), "disk_full"),
)


def read_text(text: str) -> list[Row]:
    """Rows of a printed log, in its order; events as {"step", "event", "message"}.

    Lines without any step (HF Trainer) are numbered 1, 2, ... where they report a training loss. ChunkLM counts
    the steps of each epoch anew ("step 10/1000"): they are put end to end, with `steps_per_epoch` in each row, as long
    as the log closes its epochs ("Epoch 1 avg_loss=...").
    """
    reader = _Reader()
    for line in re.split(r"[\r\n]+", _ANSI.sub("", text)):
        if line.strip():
            reader.line(_legible(line))
    return reader.rows


def head(text: str) -> list[str]:
    """The lines before the first with a step and a number."""
    reader, lines = _Reader(), []
    for line in re.split(r"[\r\n]+", _ANSI.sub("", text)):
        line = _legible(line)
        reader.line(line)
        if any({"loss", "ce", "bpb", "val_ce"} & r.keys() for r in reader.rows):
            break
        lines.append(line)
    return lines


class _Reader:
    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.base = 0  # steps of the epochs before this one
        self.per_epoch = 0  # the 1000 of "step 10/1000"
        self.last = 0.0  # the 10
        self.first = 0  # row at which this epoch began
        self.going_on = False  # steps go on over the epochs
        self.counted = False  # the log names its steps

    def line(self, line: str) -> None:
        if m := _RAISED.search(line):
            self._event("cutoff_raised", line, cutoff=float(m[2]))
            return
        if m := _EPOCH_END.search(line):
            self._epoch_end(int(m[1]), line)
            return
        for pattern, name in _PHRASES:
            if pattern.search(line):
                self._event(name, line)
        values = _dictionary(line) or _pairs(line)
        step = values.pop("step", None)
        if m := _STEP.search(line):
            step, total = float(m[1]), int(m[2] or 0)
        else:
            total = 0
        if not values.keys() - {"epoch", "cutoff", "planned_steps"}:
            return
        if step is not None:
            self._step(step, total, values)
        elif not self.counted:
            self._unnumbered(values)
        elif self.rows:
            self._merge(values)

    def _step(self, step: float, total: int, values: Row) -> None:
        self.counted, self.per_epoch, self.last = True, total or self.per_epoch, step
        step += self.base
        if total:
            values["planned_steps"] = float(total)
        if self.rows and "event" not in self.rows[-1] and self.rows[-1]["step"] == step:
            self._merge(values)
        else:
            self.rows.append({"step": step, **values})

    def _epoch_end(self, epoch: int, line: str) -> None:
        values = {k: v for k, v in _pairs(line).items() if k in ("epoch_loss", "cutoff")}
        if not self.counted:
            self.rows.append({"step": float(epoch), "epoch": float(epoch), "loss": values.pop("epoch_loss"), **values})
            return
        self._merge({"epoch": float(epoch), **values})
        for row in self.rows:  # it was the length of an epoch
            row.pop("planned_steps", None)
        self.going_on = self.going_on or self.last < 0.9 * self.per_epoch or not self.per_epoch
        if self.going_on:
            return
        late = (epoch - 1) * self.per_epoch - self.base  # a log that begins or resumes in the middle tells only now
        for row in self.rows[self.first :]:
            row["step"] += late
            row["steps_per_epoch"] = float(self.per_epoch)
        self.base, self.first = epoch * self.per_epoch, len(self.rows)

    def _unnumbered(self, values: Row) -> None:
        if "loss" in values or not self.rows:
            self.rows.append({"step": float(sum("event" not in r for r in self.rows) + 1), **values})
        else:
            self._merge(values)

    def _merge(self, values: Row) -> None:
        row = next((r for r in reversed(self.rows) if "event" not in r), None)
        if row is not None:
            row |= {k: v for k, v in values.items() if k not in row}

    def _event(self, name: str, line: str, **more: float) -> None:
        last = next((r["step"] for r in reversed(self.rows)), 0.0)
        self.rows.append({"step": max(last, self.base), "event": name, "message": line.strip(), **more})


def _legible(line: str) -> str:
    """As many characters of it as are read; words with a broken byte in them become ";", which no label crosses."""
    line = line[:LONGEST]
    return _BROKEN.sub(";", line) if "\ufffd" in line else line


def _dictionary(line: str) -> Row:
    """The numbers of a {...} in a line, under our names; {} when there is none."""
    if not (m := _DICT.search(line)):
        return {}
    for parse in (ast.literal_eval, json.loads):
        try:
            with warnings.catch_warnings():  # of escapes that Python does not know
                warnings.simplefilter("ignore")
                found = parse(re.sub(r"(?<=: )(nan|inf)\b", "None", m[0]) if parse is ast.literal_eval else m[0])
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return named(found) if isinstance(found, dict) else {}
    return {}


def named(values: dict[Any, Any]) -> Row:
    """The numbers of a dictionary under our names; None and non-finite numbers become None. Strings that are numbers
    count (HF Trainer prints them so). Our own names win over aliases of the same thing; unknown names are left out
    unless they look like ours (stage0/...)."""
    out: Row = {}
    for exact in (True, False):
        for k, v in values.items():
            ours = canonical(str(k))
            if ours is None or (ours == k) is not exact:
                continue
            if isinstance(v, str):
                try:
                    v = float(v.replace(",", ""))
                except ValueError:
                    continue
            if v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)):
                out.setdefault(ours, float(v) if v is not None and abs(v) <= sys.float_info.max else None)
    return out


def _pairs(line: str) -> Row:
    """ "iter 100: loss 2.3, time 12.00ms" -> {"step": 100, "loss": 2.3, "step_ms": 12}"""
    out: Row = {}
    end = 0
    for m in _VALUE.finditer(line):
        label = _LABEL.search(line[end : m.start()])
        end = m.end()
        if not label:
            continue
        words = label[1].split()
        names = [" ".join(words[i:]) for i in range(len(words))]
        name = next((c for n in names if (c := canonical(n))), None)
        if name is None and m[2] == "ms" and words[-1].lower() in ("time", "dt", "step_time"):
            name = "step_ms"
        if name is None or name in out:
            continue
        value = float(m[1].replace(",", ""))
        if name == "step_ms" and m[2] == "s":
            value *= 1e3
        scale = {"k": 1e3, "K": 1e3, "M": 1e6}.get(m[2] or "", 1.0)
        out[name] = value * scale if abs(value) < float("inf") else None
    return out
