"""The analyses of a log, each a function that returns plain findings."""

from __future__ import annotations

from collections.abc import Callable

from . import architecture as _architecture
from . import configuration as _configuration
from . import data as _data
from . import gradients, rates, router, schedule
from . import segmentation as _segmentation
from . import training as _training
from .findings import Finding
from .runs import Log

Rule = Callable[[Log], list[Finding]]


def _of(log: Log, rules: tuple[Rule, ...]) -> list[Finding]:
    return [f for rule in rules for f in rule(log)]


def training(log: Log) -> list[Finding]:
    """Loss, gradients, learning rate, as the log shows them."""
    return _of(log, (*_training.RULES, *gradients.RULES, *rates.RULES, *schedule.RULES))


def architecture(log: Log) -> list[Finding]:
    """The model that the config describes."""
    return _of(log, _architecture.RULES)


def segmentation(log: Log) -> list[Finding]:
    """Chunks and routers."""
    return _of(log, (*_segmentation.RULES, *router.RULES))


def configuration(log: Log) -> list[Finding]:
    """What a config alone shows; nothing without one."""
    return _of(log, _configuration.RULES) if log.config else []


def data(log: Log) -> list[Finding]:
    """Passes over the data, the batch, the held-out split, and whether it arrives in time."""
    return _of(log, _data.RULES)


OF_A_LOG = (training, architecture, segmentation, data, configuration)
