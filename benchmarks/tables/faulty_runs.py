"""What hnet diagnose finds in runs with one fault each, and in healthy ones."""

from __future__ import annotations

from .markdown import line


def faulty_runs_section(data: dict) -> str:
    faults = [r for r in data["rows"] if not r["healthy"] and not r.get("unseen")]
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
        by, others = _names(r)
        if r["healthy"]:
            verdict = "**false alarm**" if "critical" in r["others"].values() else "nothing critical"
        else:
            verdict = "found" if r["found"] else "**missed**"
        name = f"*healthy:* {r['run']}" if r["healthy"] else r["run"]
        lines.append(line([name, str(r["steps"]), verdict, by, others]))
    lines += _unseen([r for r in data["rows"] if r.get("unseen")])
    m, seconds = data["machine"], sum(r["seconds"] for r in data["rows"])
    where = f"{m['cpu']}, torch {m['torch']}, {m['date']}, {seconds / 60:.1f} minutes of training: `{m['command']}`."
    return "\n".join([*lines, "", where, ""])


def _unseen(rows: list[dict]) -> list[str]:
    """Faults that no rule was made for, when they were judged first and now."""
    if not rows:
        return []
    learnt, fresh = ([r for r in rows if r["unseen"] == kind] for kind in ("learnt", "fresh"))
    first, now, unhelped = (
        sum(bool(r[key]) for r in kind) for kind, key in ((learnt, "at_first"), (learnt, "found"), (fresh, "found"))
    )
    lines = [
        "",
        f"Not seen when the rules were written: of {len(learnt)} faults the rules as they were named {first}, and name "
        f"{now} since rules were made for them; of {len(fresh)} written down after that, {unhelped} are named, and no "
        "rule was made for them.",
        "",
        "| fault | steps | rules made for it | at first | now | by | other criticals and warnings |",
        "|---|--:|---|---|---|---|---|",
    ]
    for r in rows:
        made = "yes" if r["unseen"] == "learnt" and set(r["found"]) - set(r["at_first"]) else "no"
        verdicts = ["found" if x else "**missed**" for x in (r["at_first"], r["found"])]
        lines.append(line([r["run"], str(r["steps"]), made, *verdicts, *_names(r)]))
    return lines


def _names(row: dict) -> tuple[str, str]:
    """What names the fault, and what else is found."""
    by = ", ".join(f"`{n}` {s}" for n, s in row["found"].items())
    return by, ", ".join(f"`{n}`" + (" **critical**" if s == "critical" else "") for n, s in _worse(row).items())


def _worse(row: dict) -> dict[str, str]:
    return {n: s for n, s in row["others"].items() if s in ("critical", "warning")}
