"""What a rule hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .catalogue import CATALOGUE

SEVERITIES = ("critical", "warning", "note", "ok")
CONFIDENCES = ("high", "medium", "low")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    severity: "critical" (the run did not do what it was asked, or its numbers cannot be trusted), "warning" (it works
    less well than it could), "note", or "ok" (measured and good). name: its stable id, one of `CATALOGUE`.
    title: one sentence. evidence: sentences with numbers and steps.
    keys: keys of a run's config.toml and the values to give them. sampling: the same for `hnet generate`.
    change: what else to do, in words. steps: (first, last) step concerned, None for the config alone.
    stage: None for the whole model. confidence: high, medium or low; refute: what would show it to be wrong;
    both by default as the catalogue has them.
    """

    severity: str
    name: str
    title: str
    evidence: list[str]
    change: list[str] = field(default_factory=list)
    steps: tuple[int, int] | None = None
    stage: int | None = None
    keys: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    confidence: str = ""
    refute: str = ""

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity must be one of {', '.join(SEVERITIES)}, got {self.severity!r}")
        if self.name not in CATALOGUE:
            raise ValueError(f"name must be in hnet.diagnose.catalogue, got {self.name!r}")
        known = CATALOGUE[self.name]
        object.__setattr__(self, "confidence", self.confidence or known.confidence)
        object.__setattr__(self, "refute", self.refute or known.refute)
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence must be one of {', '.join(CONFIDENCES)}, got {self.confidence!r}")

    @property
    def analysis(self) -> str:
        """Which of the six it belongs to."""
        return CATALOGUE[self.name].analysis

    @property
    def advice(self) -> list[str]:
        """All there is to do: flags of `hnet train` and `hnet generate`, then the words."""
        lines = [flags(self.keys)] if self.keys else []
        lines += [f"hnet generate {flags(self.sampling)}"] if self.sampling else []
        return [*lines, *self.change]

    def to_dict(self) -> dict[str, Any]:
        """As docs/diagnose.md describes it."""
        return {
            "id": self.name,
            "analysis": self.analysis,
            "severity": self.severity,
            "title": self.title,
            "evidence": self.evidence,
            "keys": self.keys,
            "sampling": self.sampling,
            "advice": self.advice,
            "confidence": self.confidence,
            "refute": self.refute,
            "steps": self.steps,
            "stage": self.stage,
        }


def by_severity(findings: list[Finding]) -> list[Finding]:
    """Critical ones first; within a severity, in the order found."""
    return sorted(findings, key=lambda f: SEVERITIES.index(f.severity))


def flags(keys: dict[str, Any]) -> str:
    """{"warmup_steps": 50, "lr_multipliers": [2.0, 1.0]} -> "--warmup-steps 50 --lr-multipliers 2,1" """
    return " ".join(f"--{name.replace('_', '-')} {_text(value)}" for name, value in keys.items())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
