"""The model a config describes: its size and widths."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import lru_cache
from pathlib import Path

from hnet.config import HNetConfig
from hnet.config.architecture import from_shorthand
from hnet.errors import UserError
from hnet.model.parameters import count_parameters
from hnet.train.init_from import architecture

from . import foreign
from .findings import Finding
from .runs import Log


def model_of(log: Log) -> HNetConfig | None:
    """The architecture a config names: preset, file, shorthand or layout; None for ChunkLMs and what cannot be read."""
    if not log.config or log.config.keys() & {"cutoffs", "kernel_len"}:
        return None
    names = HNetConfig.presets()
    try:
        if path := log.setting("model_config"):
            return HNetConfig.from_json(str(path))
        if log.setting("arch_layout"):
            return HNetConfig.from_dict(log.config)
        if arch := log.setting("arch"):
            return from_shorthand(str(arch), widths_of(log), heads=log.setting("heads") or [])
        given = [log.setting(k) for k in ("preset", "model", "model_name", "name")]
        for name in given:
            if isinstance(name, str) and name in names:
                return HNetConfig.preset(name)
        start = str(log.setting("init_from", default=""))
        if start and Path(start).exists():  # a repository is not fetched for this
            return architecture(start, Path(str(log.setting("out", default=""))), None)
        return None
    except (UserError, ValueError, TypeError, KeyError, AttributeError):  # another trainer's keys may be anything
        return None


def parameters_of(log: Log) -> float:
    """As the log or config says, else counted; NaN where unknown."""
    if (said := log.number("parameters")) > 0:
        return said
    if (model := model_of(log)) is not None:
        return _count(json.dumps(dataclasses.asdict(model), sort_keys=True, default=str))
    for key in ("model", "model_name", "name", "preset", "run_name"):
        if m := re.search(r"(?<![\d.])(\d+(?:\.\d+)?[bBmM])(?![a-zA-Z])", str(log.setting(key, default=""))):
            return foreign.count(m[1]) or float("nan")
    return float("nan")


@lru_cache(maxsize=8)
def _count(text: str) -> float:
    return float(count_parameters(HNetConfig.from_dict(json.loads(text))))


def num_stages(log: Log) -> int:
    """Stages, the innermost included; 1 where only one is known of."""
    seen = [len(log.stages("lr")), len(log.stages("grad_norm")), len(log.stages("F")) + 1 if log.stages("F") else 0]
    model = model_of(log)
    return max(1, *seen, model.num_stages if model else 0, len(multipliers_of(log)))


def multipliers_of(log: Log) -> list[float]:
    """Factor on the learning rate of every stage, outermost first: configured, else of the logged rates over the
    innermost one's; [] where unknown."""
    given = log.setting("lr_multipliers")
    if isinstance(given, list) and given and all(isinstance(m, (int, float)) and m > 0 for m in given):
        return [float(m) for m in given]
    tops = [float(log.series(f"stage{i}/lr")[1].max()) for i in log.stages("lr")]
    base = log.number("learning_rate")
    if len(tops) < 2 or min(tops) <= 0:
        return []
    return [round(t / (base if base > 0 else tops[-1]), 3) for t in tops]


def widths_of(log: Log) -> list[int]:
    given = log.setting("d_model")
    if isinstance(given, str):
        given = [int(v) for v in given.replace(",", " ").split() if v.isdigit()]
    return given if isinstance(given, list) and all(type(v) is int for v in given) else []


def widths(log: Log) -> list[Finding]:
    given = widths_of(log)
    if not given:
        model = model_of(log)
        given = model.d_model if model else []
    if len(given) < 2 or all(b > a for a, b in zip(given, given[1:], strict=False)):
        return []
    text = " ".join(map(str, given))
    step = round(1.5 * given[0] / 64) * 64
    better = [given[0]] + [max(step, given[0] + 64) + 64 * 4 * i for i in range(len(given) - 1)]
    why = [
        f"d_model is {text}, outermost first. An inner position stands for several bytes and most of the "
        "compute belongs there; at equal widths the inner stage has no more room than a byte."
    ]
    change = ["or doubling inwards like 256 512"]
    title = "Widths do not grow inwards"
    return [Finding("warning", "widths", title, why, change, keys={"d_model": better})]


RULES = (widths,)
