"""A sweep as a TOML file: where it begins, what it varies, what it wants.

base = "laptop.toml"               # a run's config file, relative to this file; [run] beats it
objective = "val_bpb + 0.5 * abs(val_bytes_per_chunk / target - 1)"
sampler = "tpe"
trials = 30

[run]
data = ["texts"]

[parameters]
learning_rate = {low = 1e-4, high = 1e-2, log = true}
compression = [3, 5, 7]
size = [{arch = "m2 T4", d_model = [256, 256]}, {label = "large", arch = "m4 T8", d_model = [256, 512]}]
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hnet.config import toml
from hnet.config.keys import check, fields, override, parse, parse_toml, read_toml
from hnet.errors import UserError
from hnet.train.config import TrainConfig

from .keys import SweepKeys
from .objective import Formula, known_metrics
from .parameters import Parameter, check_apart, closest, parse_parameters, run_key, show

TABLES = ("run", "parameters", "sampler_options", "pruner_options")
QUIET = {"plots": False, "sample_bytes": 0}  # of trials, unless the run's keys say otherwise
LARGEST = 100_000  # configurations that are enumerated


@dataclass
class SweepConfig(SweepKeys):
    """All of a sweep. values: keys of the run that all trials share. options: of the sampler and the pruner."""

    values: dict[str, Any] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def enumerated(self) -> bool:
        return self.sampler in ("grid", "one_at_a_time")

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def size(self) -> float:
        """How many configurations there are."""
        counts = [p.count() for p in self.parameters]
        return 1 + sum(n - 1 for n in counts) if self.sampler == "one_at_a_time" else math.prod(counts)

    @property
    def wanted(self) -> int:
        """Trials."""
        return int(min(self.trials or (self.size if self.enumerated else 20), self.size))

    def base_point(self) -> dict[str, str]:
        """one_at_a_time: the label of what the base has, for every parameter."""
        return {
            p.name: next(label for label, keys in p.choices.items() if self._is_base(keys)) for p in self.parameters
        }

    def points(self) -> Iterator[dict[str, str]]:
        """The labels of every configuration of an enumerated search, in order."""
        if self.sampler == "grid":
            for labels in itertools.product(*(p.choices for p in self.parameters)):
                yield {p.name: label for p, label in zip(self.parameters, labels, strict=True)}
            return
        base = self.base_point()
        yield base
        for p in self.parameters:
            yield from ({**base, p.name: label} for label in p.choices if label != base[p.name])

    def run_of(self, point: dict[str, Any], out: str | Path, quiet: bool = True) -> TrainConfig:
        """The run of a point of the search, not validated.

        Raises:
            UserError: steps beside epochs.
        """
        values = (QUIET if quiet else {}) | self.values
        for p in self.parameters:
            keys = p.keys(point[p.name])
            if not (self.sampler == "one_at_a_time" and self._is_base(keys)):
                values = override(values, keys)
        if values.get("epochs") and "steps" in values:
            raise UserError(f"steps and epochs exclude each other, got {values['steps']} and {values['epochs']:g}")
        return TrainConfig(**{**values, "out": str(out)})

    def _is_base(self, keys: dict[str, Any]) -> bool:
        base = dataclasses.asdict(TrainConfig(**self.values))
        return all(base[k] == v for k, v in keys.items())

    def spelled_out(self) -> SweepConfig:
        """Returns self, with every parameter of an enumerated search as choices, the base's among them.

        Raises:
            UserError: a key out of range, nothing to enumerate, or two parameters for one key.
        """
        for f in fields(SweepKeys):
            check(f, getattr(self, f.name))
        if self.enumerated:
            self.parameters = [p.spelled_out() for p in self.parameters]
        if self.sampler == "one_at_a_time":
            self.parameters = [self._with_base(p) for p in self.parameters]
        else:
            check_apart(self.parameters)
        if self.enumerated and self.size > LARGEST:
            raise UserError(f"a {self.sampler} of {self.size:,} configurations is too much: use tpe or random")
        return self

    def validate(self) -> SweepConfig:
        """Returns self, spelled out.

        Raises:
            UserError: what would stop every trial, or an objective that is no formula over what a trial reports.
        """
        formula = Formula(self.objective)
        self.spelled_out()
        usable, refused = [], ""
        for point in self._samples():
            try:
                usable.append(self.run_of(point, self.folder / "trial").validate())
            except UserError as e:
                refused = refused or str(e)
        if not usable:
            raise UserError(f"the first configuration of the sweep is refused: {refused}")
        formula.check(known_metrics(usable))
        return self

    def _with_base(self, p: Parameter) -> Parameter:
        if any(self._is_base(keys) for keys in p.choices.values()):
            return p
        base = dataclasses.asdict(TrainConfig(**self.values))
        keys = {k: base[k] for k in sorted(p.names())}
        label = show(base[p.name]) if keys.keys() == {p.name} else "base"
        return dataclasses.replace(p, choices={label: keys, **p.choices})

    def _samples(self) -> Iterator[dict[str, Any]]:
        """Points that show what trials can be: each choice once beside the first ones, and the ends of ranges."""
        ends: dict[str, list[Any]] = {p.name: list(p.choices) or [p.low, p.high] for p in self.parameters}
        first = self.base_point() if self.sampler == "one_at_a_time" else {name: v[0] for name, v in ends.items()}
        yield first
        for name, values in ends.items():
            yield from ({**first, name: v} for v in values if v != first[name])

    def identity(self) -> dict[str, Any]:
        """What may not change when a sweep goes on."""
        parameters = {p.name: p.choices or [p.low, p.high, p.log, p.step] for p in self.parameters}
        names = ("objective", "direction", "at", "sampler", "seed")
        mine = {name: getattr(self, name) for name in names} | {"sampler_options": self.options["sampler"]}
        return (
            mine
            | {f"run.{k}": v for k, v in self.values.items()}
            | {f"parameters.{k}": v for k, v in parameters.items()}
        )

    def to_toml(self) -> str:
        """The sweep in one file, without a base."""
        top = {f.name: getattr(self, f.name) for f in fields(SweepKeys) if f.name != "base"}
        tables: dict[str, Any] = {
            "run": self.values,
            "parameters": {p.name: _to_table(p) for p in self.parameters},
            **{f"{name}_options": t for name, t in self.options.items() if t},
        }
        return toml.dumps(top) + "".join(f"\n[{name}]\n{toml.dumps(table)}" for name, table in tables.items())


def _to_table(p: Parameter) -> Any:
    if p.choices:
        plain = all(
            keys == {p.name: keys.get(p.name)} and label == show(keys[p.name]) for label, keys in p.choices.items()
        )
        return [keys[p.name] if plain else {"label": label, **keys} for label, keys in p.choices.items()]
    return {
        "low": p.low,
        "high": p.high,
        **({"log": True} if p.log else {}),
        **({} if p.step is None else {"step": p.step}),
    }


def read_sweep(path: str | Path, flags: dict[str, Any] | None = None, run: dict[str, Any] | None = None) -> SweepConfig:
    """The sweep in a file, not validated yet.

    Args:
        flags: keys that beat the file's.
        run: keys of the run that beat those of [run].

    Raises:
        FileNotFoundError: no such file, or no such base.
        UserError: not TOML, an unknown key (the closest one is named), a value of the wrong type; see
            `parse_parameters`.
    """
    path = Path(path)
    given = parse_toml(path)
    kinds = {f.name: str(f.type) for f in fields(SweepKeys)}
    for name in given:
        if name not in kinds and name not in TABLES:
            hint = closest(name, [*kinds, *TABLES])
            raise UserError(f"{path}: a sweep has no key {name!r}{hint}; known are {', '.join([*kinds, *TABLES])}")
    tables = {name: given.pop(name, {}) for name in TABLES}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{path}: {name} must be a table, got {table!r}")
    flags = flags or {}
    top = {name: parse(f"{path}: {name}", value, kinds[name]) for name, value in given.items()} | flags
    values: dict[str, Any] = {}
    if top.get("base"):  # a flag is relative to where the command is given
        values = read_toml(Path(top["base"]) if "base" in flags else path.parent / top["base"], TrainConfig)
        values.pop("out", None)
    own = {name: run_key(name, value, f"{path}: run.{name}") for name, value in tables["run"].items()}
    own = override(own, {name: run_key(name, value, name) for name, value in (run or {}).items()})
    return SweepConfig(
        **top, values=override(values, own), parameters=parse_parameters(tables["parameters"], str(path)),
        options={name: tables[f"{name}_options"] for name in ("sampler", "pruner")},
    )  # fmt: skip
