"""What hnet diagnose finds in runs with one fault each, and in healthy ones."""

from __future__ import annotations

from .markdown import line


def faulty_runs_section(data: dict) -> str:
    faults = [r for r in data["rows"] if not r["healthy"]]
    healthy = [r for r in data["rows"] if r["healthy"]]
    found = sum(bool(r["found"]) for r in faults)
    noted = sum(bool(r["found"]) and set(r["found"].values()) == {"note"} for r in faults)
    false = sum("critical" in r["others"].values() for r in healthy)
    share = f" ({100 * found / len(faults):.0f} %)" if faults else ""
    only = f", {noted} of them as a note only" if noted else ""
    lines = [
        f"{found} of {len(faults)} faults found{share}{only}; {false} of {len(healthy)} healthy runs with a critical "
        "finding.",
        "",
        "| fault | steps | | by | other criticals and warnings |",
        "|---|--:|---|---|---|",
    ]
    for r in [*faults, *healthy]:
        by = ", ".join(f"`{n}` {s}" for n, s in r["found"].items())
        others = ", ".join(f"`{n}`" + (" **critical**" if s == "critical" else "") for n, s in _worse(r).items())
        if r["healthy"]:
            verdict = "**false alarm**" if "critical" in r["others"].values() else "nothing critical"
        else:
            verdict = "found" if r["found"] else "**missed**"
        name = f"*healthy:* {r['run']}" if r["healthy"] else r["run"]
        lines.append(line([name, str(r["steps"]), verdict, by, others]))
    m, seconds = data["machine"], sum(r["seconds"] for r in data["rows"])
    where = f"{m['cpu']}, torch {m['torch']}, {m['date']}, {seconds / 60:.1f} minutes of training: `{m['command']}`."
    return "\n".join([*lines, "", where, ""])


def _worse(row: dict) -> dict[str, str]:
    return {n: s for n, s in row["others"].items() if s in ("critical", "warning")}
