"""Reading a run: ours (a directory), metrics.jsonl, CSV, trainer_state.json, or whatever a trainer printed."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hnet.errors import MissingPath, UserError, user_path
from hnet.train.config import TrainConfig

from . import foreign
from .names import canonical
from .text_log import Row, head, named, read_text

_LOSSES = {"loss", "ce", "bpb", "val_ce", "val_bpb"}
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+([eE][-+]?\d+)?")
_LOG_ENDINGS = (".jsonl", ".log", ".txt", ".out", ".csv", ".json")


@dataclass(frozen=True)
class Event:
    step: int
    name: str
    message: str
    row: int  # how many rows of numbers came before it


@dataclass
class Log:
    """One run as a table of steps.

    rows: lines of the log in its order under our names, events among them (what `plots.plot_rows` takes).
    step: (R,) float64, the steps of the rows with numbers, in the log's order (a resumed run may go back).
    columns: name -> (R,) float64, NaN where a row lacks it or it was not finite; `non_finite` tells those apart.
    config: keys of the run; empty when unknown.
    """

    path: Path
    kind: str
    rows: list[Row]
    config: dict[str, Any] = field(default_factory=dict)
    step: np.ndarray = field(init=False)
    columns: dict[str, np.ndarray] = field(init=False)
    non_finite: dict[str, list[int]] = field(init=False)
    events: list[Event] = field(init=False)

    def __post_init__(self) -> None:
        numbers: list[Row] = []
        self.events, self.non_finite = [], {}
        for row in self.rows:
            if "event" in row:
                step = int(row.get("step") or 0)
                self.events.append(Event(step, str(row["event"]), str(row.get("message", "")), len(numbers)))
            else:
                numbers.append(row)
        self.step = np.array([float(r["step"]) for r in numbers])
        names = dict.fromkeys(k for r in numbers for k in r if k != "step")
        self.columns = {n: np.full(len(numbers), np.nan) for n in names}
        for i, row in enumerate(numbers):
            for name, v in row.items():
                if name == "step":
                    continue
                if _finite(v):
                    self.columns[name][i] = v
                elif v is None or isinstance(v, float):
                    self.non_finite.setdefault(name, []).append(int(row["step"]))
        self.columns = {n: c for n, c in self.columns.items() if np.isfinite(c).any()}

    def series(self, *names: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the first of `names` that the log has: finite, by step, the last line of a step wins."""
        values = next((self.columns[n] for n in names if n in self.columns), None)
        if values is None:
            return np.zeros(0), np.zeros(0)
        ok = np.isfinite(values)
        found = dict(zip(self.step[ok], values[ok], strict=True))
        steps = sorted(found)
        return np.array(steps), np.array([found[s] for s in steps])

    def stages(self, key: str) -> list[int]:
        """Stages with a column stage{i}/key."""
        return sorted(int(m[1]) for n in self.columns if (m := re.fullmatch(rf"stage(\d+)/{re.escape(key)}", n)))

    def setting(self, *names: str, default: Any = None) -> Any:
        """The first of these keys that the config has."""
        return next((self.config[n] for n in names if n in self.config), default)

    def number(self, *names: str, default: float = float("nan")) -> float:
        """`setting` where it must be a number; a list counts by its first element, anything else is the default."""
        value = self.setting(*names)
        value = value[0] if isinstance(value, list) and value else value
        return float(value) if _finite(value) else default

    def events_named(self, *names: str) -> list[Event]:
        return [e for e in self.events if e.name in names]

    @property
    def last_step(self) -> int:
        return int(self.step.max()) if len(self.step) else 0

    @property
    def planned_steps(self) -> int:
        """Steps the config asks for, or the log ("step 10/1000"); 0 where neither does."""
        steps = self.number("steps", default=0)
        said = self.series("planned_steps")[1]
        if not steps and len(said) and "cutoff" not in self.columns:  # a ChunkLM counts those of an epoch
            steps = float(said[-1])
        return int(steps) if 0 < steps < 2**53 else 0

    @property
    def total_steps(self) -> int:
        """`planned_steps`, else the last one logged."""
        return self.planned_steps or self.last_step


def read_log(path: str | Path, config: str | Path | None = None) -> Log:
    """A run from a directory of ours, a config.toml alone, metrics.jsonl, CSV, trainer_state.json or a printed log.

    config: its config, TOML, JSON or YAML of any trainer; default: config.toml (.json, .yaml) beside it, and what a
    printed log says before its first step.

    Raises:
        FileNotFoundError: no such path, or a directory that holds nothing readable.
        ValueError: no step or loss recognised, or a broken config; the message names the file.
    """
    path = Path(path)
    log = _read(path)
    if config is not None:
        log.config = {**log.config, **read_config(Path(config))}
    return log


def _read(path: Path) -> Log:
    if path.is_dir():
        return _read_directory(path)
    if not path.is_file():
        raise MissingPath(f"{path} does not exist")
    if path.suffix == ".toml":
        return Log(path, "config", [], read_config(path))
    if "tfevents" in path.name:
        raise UserError(f"{path} is a TensorBoard event file; export its scalars to CSV and give that")
    with user_path(path):
        data = path.read_bytes()
    wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what PowerShell's > writes
    if b"\0" in data[:4096] and not wide:
        raise UserError(f"{path} is not text")
    text = data.decode("utf-16" if wide else "utf-8", "replace").lstrip("\ufeff")
    if text.count("\ufffd") > 0.1 * len(text):
        raise UserError(f"{path} is not text")
    settings = _config_beside(path)
    for kind, parse in (("json", _json_rows), ("csv", _csv_rows), ("text", lambda t, _: read_text(t))):
        rows = parse(text, path)
        if any(_LOSSES & r.keys() for r in rows):
            said = foreign.ours(foreign.printed(head(text))) if kind == "text" else {}
            return Log(path, kind, rows, said | settings)
    raise UserError(
        f"{path}: no training log recognised (looked for JSON lines, CSV, and lines with a step and a loss)"
    )


def _config_beside(path: Path) -> dict[str, Any]:
    """The config that lies beside a log; {} where there is none, or none that can be read as one."""
    for ending in foreign.ENDINGS:
        file = path.parent / f"config{ending}"
        if file.is_file() and file != path:
            if path.name == "metrics.jsonl":
                return read_config(file)
            try:
                return read_config(file)
            except UserError:  # perhaps not of this log
                continue
    return {}


def _read_directory(path: Path) -> Log:
    metrics, config = path / "metrics.jsonl", path / "config.toml"
    if metrics.is_file() and metrics.stat().st_size:
        log = read_log(metrics)
        return Log(path, "run", log.rows, log.config)
    if config.is_file():
        return Log(path, "config", [], read_config(config))
    with user_path(path):
        found = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in _LOG_ENDINGS and p.stem != "config")
    if not found:
        raise MissingPath(f"{path} holds no metrics.jsonl, config.toml or log file")
    if all(p.suffix == ".csv" for p in found):  # TensorBoard exports one file for each quantity
        rows: dict[float, Row] = {}
        for p in found:
            for row in read_log(p).rows:
                rows.setdefault(row["step"], {}).update(row)
        return Log(path, "csv", [rows[s] for s in sorted(rows)])
    if len(found) > 1:
        raise UserError(f"{path} holds several logs ({', '.join(p.name for p in found[:6])}); name one of them")
    return read_log(found[0])


def read_config(path: Path) -> dict[str, Any]:
    """Keys of a config, tables flattened; keys of TrainConfig not in it get their defaults, unless it is another
    trainer's, whose keys stand under our names besides their own. Unknown keys stay.

    Raises:
        ValueError: the file is not TOML, JSON or YAML, as it is called.
    """
    flat = foreign.read_any(path)
    if flat.keys() & {"cutoffs", "kernel_len"}:  # a ChunkLM: the defaults of an H-Net say nothing about it
        return flat
    if path.suffix != ".toml" or foreign.is_foreign(flat):
        return foreign.ours(flat)
    values = {**dataclasses.asdict(TrainConfig()), **flat}
    if values["epochs"]:  # how many steps these are takes the data
        del values["steps"]
    return values


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _json_rows(text: str, path: Path) -> list[Row]:
    """JSON lines, or HF Trainer's trainer_state.json; [] for anything else."""
    if path.suffix == ".json" or text.lstrip().startswith("{\n"):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            whole = None
        history = whole.get("log_history") if isinstance(whole, dict) else whole
        if isinstance(history, list):
            return _number_rows([r for r in history if isinstance(r, dict)])
    found = []
    for line in text.splitlines():
        if line.lstrip().startswith("{"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # cut short by a crash, or a printed Python dictionary
            if isinstance(row, dict):
                found.append(row)
    return _number_rows(found)


def _number_rows(found: list[dict[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    for row in found:
        if "event" in row:
            step = row.get("step")
            rows.append({**row, "step": step if _finite(step) else (rows[-1]["step"] if rows else 0)})
            continue
        ours = {k: v for k, v in row.items() if re.fullmatch(r"stage\d+/\w+|bytes|time", k)}
        values = named(row) | {k: v if _finite(v) else None for k, v in ours.items()}
        if not _finite(values.get("step")):
            if not values.keys() & {"loss", "ce", "bpb", "val_ce"}:
                continue
            values["step"] = float(len(rows) + 1)
        if len(values) > 1:
            rows.append(values)
    return rows


def _csv_rows(text: str, path: Path) -> list[Row]:
    """A table with a header; TensorBoard's (Wall time, Step, Value) is named by its file. [] for anything else."""
    header = text.lstrip().split("\n", 1)[0]
    delimiter = next((d for d in ",\t;" if d in header), None)
    if delimiter is None or not any(canonical(h.strip('" ')) == "step" for h in header.strip().split(delimiter)):
        return []
    rows = []
    for i, row in enumerate(csv.DictReader(text.lstrip().splitlines(), delimiter=delimiter)):
        cells = {k.strip(): v for k, v in row.items() if k and isinstance(v, str) and v.strip()}
        if delimiter != ",":  # where that is used, the comma may be a decimal point
            cells = {k: v.replace(",", ".") if _DECIMAL_COMMA.fullmatch(v.strip()) else v for k, v in cells.items()}
        if "Value" in cells:
            cells[_tag(path)] = cells.pop("Value")
        values = named(cells)
        values["step"] = values.get("step") or (0.0 if "step" in values else float(i + 1))
        if len(values) > 1:
            rows.append(values)
    return rows


def _tag(path: Path) -> str:
    """Which quantity a file of TensorBoard is: "run-x-tag-train_loss.csv" -> "train_loss"; the loss if unclear."""
    stem = path.stem.split("-tag-")[-1]
    parts = re.split(r"[_\-. ]", stem)
    tails = ["_".join(parts[i:]) for i in range(len(parts))]
    return next((t for t in tails if canonical(t) not in (None, "step")), "loss")
