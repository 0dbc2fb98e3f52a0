"""What a rule hands back."""

from __future__ import annotations

from dataclasses import dataclass, field

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    severity: "error" (the run did not do what it was asked, or its numbers cannot be trusted), "warning" (it works
    less well than it could) or "note". name: short and stable, for programs.
    evidence: sentences with numbers and steps. change: what to do, in keys of the config or flags.
    steps: (first, last) step concerned, None for the config alone. stage: None for the whole model.
    """

    severity: str
    name: str
    title: str
    evidence: list[str]
    change: list[str] = field(default_factory=list)
    steps: tuple[int, int] | None = None
    stage: int | None = None

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity must be one of {', '.join(SEVERITIES)}, got {self.severity!r}")


def by_severity(findings: list[Finding]) -> list[Finding]:
    """Errors first; within a severity, in the order found."""
    return sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
