"""Two runs side by side: what differs in config, numbers and findings."""

from __future__ import annotations

from typing import Any

from .report import Report


def compare(a: Report, b: Report) -> dict[str, Any]:
    """config, summary: name -> [in a, in b] of what differs, None where one lacks it. findings: ids of those only in
    a ("gone"), only in b ("new") and in both ("stayed")."""
    names = [{f.name for f in r.findings if f.severity != "ok"} for r in (a, b)]
    return {
        "runs": [str(a.log.path), str(b.log.path)],
        "config": _differing(a.log.config, b.log.config),
        "summary": _differing(flat(a.summary), flat(b.summary)),
        "findings": {
            "gone": sorted(names[0] - names[1]),
            "new": sorted(names[1] - names[0]),
            "stayed": sorted(names[0] & names[1]),
        },
    }


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loss": {"last": 1}} -> {"loss.last": 1}"""
    out: dict[str, Any] = {}
    for k, v in values.items():
        out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    return {k: [a.get(k), b.get(k)] for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k) and k != "data.histogram"}
