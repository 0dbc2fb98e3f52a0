"""The keys that findings ask for: a config with them, and whether another config has them."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any, NamedTuple

from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.config import toml
from hnet.config.keys import fields, parse
from hnet.config.run import RunConfig
from hnet.errors import UserError
from hnet.train.config import TrainConfig

from .architecture import num_stages
from .findings import Finding
from .report import Report
from .runs import Log

DATA = ["texts"]  # where the config is another trainer's and names none of our files


def _class(log: Log) -> type[RunConfig]:
    return ChunkLMTrainConfig if log.config.keys() & {"cutoffs", "kernel_len"} else TrainConfig


def _known(log: Log) -> tuple[dict[str, Any], list[str]]:
    """(keys of the run that our trainer has, in its types, but for defaults; names of those it cannot read)"""
    types = {f.name: str(f.type) for f in fields(_class(log))}
    known: dict[str, Any] = {}
    left = []
    default = dataclasses.asdict(_class(log)())
    for name, value in log.config.items():
        if name in default and value == default[name]:
            continue
        try:
            known[name] = parse(name, value, types[name])
        except (KeyError, UserError):
            left.append(name)
    return known, left


def write_config(report: Report, accept: list[str] | None = None) -> str:
    """config.toml of the run with the keys of its findings, each under a comment that says why.

    accept: ids of the findings to follow; default: all. Where two ask for one key, the worse finding has it. A change
    with which the whole would not validate is left out, and said to be.

    Raises:
        UserError: an id that is none of the findings', or a config that does not validate without any change.
    """
    names = {f.name for f in report.findings}
    if unknown := sorted(set(accept or []) - names):
        raise UserError(f"accept must name findings of the run ({', '.join(sorted(names))}), got {', '.join(unknown)}")
    values, left = _known(report.log)
    whys: dict[str, list[str]] = {}
    if not values.get("data"):
        values["data"] = list(DATA)
        whys["data"] = ["the run's config names no data: put your files here"]
    if "out" in values or report.log.kind == "run":
        values["out"] = f"{values.get('out', 'runs/hnet').rstrip('/')}-fixed"
        whys["out"] = ["a run of its own"]
    cls = _class(report.log)
    try:
        _validate(cls, values)
    except UserError as e:
        if not str(e).startswith("compression"):
            raise
        values["compression"] = [3.0] * (num_stages(report.log) - 1)
        whys["compression"] = ["the run's config has no target for each stage; 3 is the published recipe's"]
        _validate(cls, values)
    refused = []
    for f in report.findings:
        if accept and f.name not in accept:
            continue
        new = {k: v for k, v in f.keys.items() if not any(n == k for n in whys)}
        try:
            _validate(cls, values | new)
        except (UserError, TypeError) as e:
            refused.append(f"{f.name} asked for {', '.join(new)}: {e}")
            continue
        for k, v in new.items():
            old = values.get(k, report.log.setting(k))
            was = "was not set" if old is None else f"was {toml.dumps({'x': old})[4:].strip()}"
            whys[k] = [f"{f.name}: {f.title} ({was}).", f.evidence[0]]
            values[k] = v
    lines = [f"# What hnet diagnose changes in {report.log.path}, with the reason above each change."]
    lines += [f"# Left out, not a key of ours or not readable: {', '.join(left)}"] if left else []
    lines += [f"# Not changed, {r}" for r in refused]
    return "\n".join(w for line in lines for w in _comment(line)) + "\n" + _body(values, whys)


def _validate(cls: type[RunConfig], values: dict[str, Any]) -> None:
    types = {f.name: str(f.type) for f in fields(cls)}
    if unknown := values.keys() - types.keys():
        raise UserError(f"{', '.join(sorted(unknown))} is no key of this model's run")
    cls(**{k: parse(k, v, types[k]) for k, v in values.items()}).validate()


def _body(values: dict[str, Any], whys: dict[str, list[str]]) -> str:
    out = []
    for k, v in values.items():
        out += [w for why in whys.get(k, []) for w in _comment(f"# {why}")]
        out.append(toml.dumps({k: v}).rstrip())
    return "\n".join(out) + "\n"


def _comment(line: str) -> list[str]:
    """One line of a comment as several that are not too long; no text ends a comment early."""
    return textwrap.wrap(" ".join(line.split()), 110, subsequent_indent="# ") or ["#"]


class Fix(NamedTuple):
    """How a config answers a finding of a run. state: "applied", "partly", "missing", or "elsewhere" where no key of a
    config can answer it. keys: name -> (the run's value, what was asked for, what the config has)."""

    finding: Finding
    state: str
    keys: dict[str, tuple[Any, Any, Any]]


def against(config: Log, run: Report) -> list[Fix]:
    """Cause by cause, whether `config` has what the findings of `run` ask for; worst first."""
    out = []
    for f in run.findings:
        if f.severity == "ok":
            continue
        keys = {k: (run.log.setting(k), wanted, config.setting(k)) for k, wanted in f.keys.items()}
        done = [_answered(k, *v) for k, v in keys.items()]
        state = "elsewhere" if not keys else "applied" if all(done) else "partly" if any(done) else "missing"
        out.append(Fix(f, state, keys))
    return out


def _answered(name: str, was: Any, wanted: Any, now: Any) -> bool:
    """At least as far from what it was as asked for."""
    if now == wanted:
        return True
    lists = [v for v in (wanted, now) if isinstance(v, list) and v and all(_number(x) and x > 0 for x in v)]
    if name == "lr_multipliers" and len(lists) == 2:
        falling = all(b <= a for a, b in zip(now, now[1:], strict=False))
        return falling and max(now) / min(now) <= max(wanted) / min(wanted) + 1e-9
    was, wanted, now = (v[0] if isinstance(v, list) and len(v) == 1 else v for v in (was, wanted, now))
    if not all(_number(v) for v in (was, wanted, now)):
        return False
    return bool(now >= wanted > was or now <= wanted < was)


def _number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool)
