"""What a sweep varies: choices and ranges of a run's keys."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import Any

from hnet.config.keys import check, fields, parse
from hnet.errors import UserError
from hnet.train.config import TrainConfig

KEYS = {f.name: f for f in fields(TrainConfig)}
RANGE = ("low", "high", "log", "step")
NUMBERS = {"int": int, "float": float, "list[int]": int, "list[float]": float, "float | str": float}
MOST = 10_000  # values that a range with a step may stand for


@dataclass(frozen=True)
class Parameter:
    """One axis of the search: named choices, each of which sets some keys of a run, or a range of one key."""

    name: str
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)  # label -> keys; empty: a range
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether a range is one of integers."""
        return NUMBERS[str(KEYS[self.name].type)] is int

    def keys(self, value: Any) -> dict[str, Any]:
        """The keys of a run that a value (of a choice its label) stands for."""
        if self.choices:
            return self.choices[value]
        return {self.name: parse(self.name, int(value) if self.whole else float(value), str(KEYS[self.name].type))}

    def names(self) -> set[str]:
        """Every key that some value sets."""
        return {key for keys in self.choices.values() for key in keys} or {self.name}

    def count(self) -> float:
        """Values it may have."""
        if self.choices:
            return len(self.choices)
        step = 1 if self.whole and self.step is None else self.step
        return math.inf if step is None else math.floor((self.high - self.low) / step + 1e-9) + 1

    def spelled_out(self) -> Parameter:
        """The same as choices.

        Raises:
            UserError: a range without a step holds no countable values.
        """
        if self.choices:
            return self
        if self.step is None and not self.whole:
            raise UserError(
                f"parameters.{self.name} must be a list, or have a step, to be enumerated; got {self.range}"
            )
        if self.log:
            raise UserError(f"parameters.{self.name} must be a list to be enumerated in steps of a factor")
        step = 1 if self.step is None else self.step
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        if count > MOST:
            raise UserError(
                f"parameters.{self.name} must stand for at most {MOST:,} values, got {count:,}: {self.range}"
            )
        values = [self.low + i * step for i in range(count)]
        return Parameter(self.name, {show(v): self.keys(float(f"{v:.12g}")) for v in values})

    @property
    def range(self) -> str:
        more = ", log" if self.log else "" if self.step is None else f", step {self.step:g}"
        return f"{self.low:g} to {self.high:g}{more}"


def parse_parameters(given: dict[str, Any], where: str) -> list[Parameter]:
    """The table [parameters].

    Raises:
        UserError: an unknown key (the closest one is named), no choice, one twice, a value that the key may not have, a
            range that is none.
    """
    if not given:
        raise UserError(f"{where}: [parameters] must name at least one key to vary")
    return [_parameter(name, value, f"{where}: parameters.{name}") for name, value in given.items()]


def check_apart(parameters: list[Parameter]) -> None:
    """Raises UserError if two parameters set one key: which one should win?"""
    owner: dict[str, str] = {}
    for p in parameters:
        for key in p.names():
            if key in owner:
                raise UserError(f"parameters {owner[key]} and {p.name} both set {key}")
            owner[key] = p.name


def _parameter(name: str, value: Any, where: str) -> Parameter:
    if isinstance(value, dict):
        return _range(name, value, where)
    if not isinstance(value, list):
        raise UserError(f"{where} must be a list of choices or a table {{low, high, log, step}}, got {value!r}")
    if not value:
        raise UserError(f"{where} must list at least one choice, got []")
    choices: dict[str, dict[str, Any]] = {}
    for v in value:
        label, keys = _choice(name, v, where)
        if label in choices or keys in choices.values():
            raise UserError(f"{where} lists {label} twice")
        choices[label] = keys
    return Parameter(name, choices)


def _choice(name: str, value: Any, where: str) -> tuple[str, dict[str, Any]]:
    """(label, keys)"""
    if not isinstance(value, dict):
        keys = {name: run_key(name, value, where)}
        return show(keys[name]), keys
    label = value.get("label")
    if label is not None and (not isinstance(label, str) or not label):
        raise UserError(f"{where}: label must be some text, got {label!r}")
    keys = {k: run_key(k, v, f"{where}: {k}") for k, v in value.items() if k != "label"}
    if not keys:
        raise UserError(f"{where}: a choice must set at least one key, got {value}")
    return label or ", ".join(f"{k} {show(v)}" for k, v in keys.items()), keys


def _range(name: str, value: dict[str, Any], where: str) -> Parameter:
    run_key_known(name, where)
    if NUMBERS.get(str(KEYS[name].type)) is None:
        raise UserError(f"{where} must be a list of choices: {name} is no number")
    for k in value:
        if k not in RANGE:
            raise UserError(f"{where}: unknown {k!r}{closest(k, RANGE)}; a range has {', '.join(RANGE)}")
    for k in ("low", "high", "step"):
        v = value.get(k, None if k == "step" else "")
        if v is not None and (isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v)):
            raise UserError(f"{where}: {k} must be a number, got {v!r}" if v != "" else f"{where} must have a {k}")
    low, high, step, log = value["low"], value["high"], value.get("step"), value.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{where}: log must be true or false, got {log!r}")
    if not low < high:
        raise UserError(f"{where}: low must be below high, got {low} and {high}")
    if log and (low <= 0 or step is not None):
        raise UserError(f"{where}: with log, low must be positive and step left out, got low {low} and step {step}")
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"{where}: step must be above 0 and at most high - low, got {step}")
    if step is not None:  # the last value that is reached
        high = float(f"{low + math.floor((high - low) / step + 1e-9) * step:.12g}")
    p = Parameter(name, low=low, high=high, log=log, step=step)
    if p.whole and any(v is not None and v != int(v) for v in (low, high, step)):
        raise UserError(f"{where}: low, high and step must be integers, as {name} is; got {p.range}")
    for end in (low, high):
        check(KEYS[name], p.keys(end)[name])
    return p


def run_key(name: str, value: Any, where: str) -> Any:
    """A value for a key of a run.

    Raises:
        UserError: no such key, or not a value for it.
    """
    run_key_known(name, where)
    found = parse(where, value, str(KEYS[name].type))
    try:
        check(KEYS[name], found)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    return found


def run_key_known(name: str, where: str) -> None:
    if name == "out":
        raise UserError(f"{where}: out must be left out: every trial has a folder of its own")
    if name not in KEYS:
        raise UserError(f"{where}: a run has no key {name!r}{closest(name, KEYS)}; docs/training.md lists all keys")


def closest(name: str, known: Any) -> str:
    """A hint, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f", the closest is {near[0]!r}" if near else ""


def show(value: Any) -> str:
    """A value in a table: short, and different for different values."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, list):
        return ",".join(show(v) for v in value) or "none"
    return str(value)
