"""`hnet diagnose` and `hnet plot`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hnet.errors import UserError, user_path

if TYPE_CHECKING:
    from hnet.diagnose.checkpoint import Material
    from hnet.diagnose.fixes import Fix
    from hnet.diagnose.report import Report
    from hnet.diagnose.runs import Log

PATH = click.Path(path_type=Path)
SMALL = 1 << 28  # bytes of weights that are loaded without being asked for


class Unreadable(click.ClickException):
    exit_code = 2


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN_OR_LOG...")
@click.option("--config", type=PATH, help="Config of the run: TOML, JSON or YAML of any trainer.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with one object for each log.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write report.html, report.md, report.json and the plots here.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["warning", "critical"]),
    default="critical",
    show_default=True,
    help="The least severe finding that makes the exit code 1.",
)
@click.option("--generate", is_flag=True, help="Load the run's latest checkpoint too, let it write, and judge that.")
@click.option(
    "--checkpoint/--no-checkpoint",
    default=None,
    help="Load the run's latest checkpoint and examine weights, routers and packs, with --out draw chunks too; "
    "default: where it and the data have at most 256 MiB.",
)
@click.option("--text", type=PATH, help="Held-out text for --generate and pictures of chunks; default: the run's.")
@click.option("--write-config", type=PATH, help="Write the run's config with the keys of its findings, and why.")
@click.option("--accept", help="With --write-config: ids of the findings to follow, with commas; default: all.")
@click.option(
    "--against", type=PATH, help="Say, cause by cause, whether the config given has the fixes this run needs."
)
@click.option("--compare", is_flag=True, help="Of two runs: what differs in config, numbers and findings.")
def diagnose(
    runs: tuple[Path, ...],
    config: Path | None,
    as_json: bool,
    out: Path | None,
    fail_on: str,
    generate: bool,
    checkpoint: bool | None,
    text: Path | None,
    write_config: Path | None,
    accept: str | None,
    against: Path | None,
    compare: bool,
) -> None:
    """Say what is wrong with a training run, with evidence and what to change.

    RUN_OR_LOG is a run directory, a config.toml alone, a metrics.jsonl, a CSV, HF's trainer_state.json, or what a
    trainer printed (nanoGPT, torchtitan, HF Trainer, Megatron, ChunkLM and the like). All findings: docs/diagnose.md.

    Exit code: 0 without findings as severe as --fail-on, 1 with one, 2 when a log cannot be read. With --against: 1
    where a fix as severe is missing.
    """
    from hnet.diagnose import fixes
    from hnet.diagnose.runs import read_log
    from hnet.diagnose.whole import examine_run

    failing = ("critical",) if fail_on == "critical" else ("critical", "warning")
    single = [n for n, v in (("--write-config", write_config), ("--against", against)) if v is not None]
    if single and len(runs) != 1:
        raise UserError(f"{single[0]} takes one run, got {len(runs)}")
    if compare and len(runs) != 2:
        raise UserError(f"--compare takes two runs, got {len(runs)}")
    try:
        logs = [read_log(r, config) for r in runs]
        reference = read_log(against) if against is not None else None
    except UserError as e:
        raise Unreadable(str(e)) from None
    if reference is not None:
        found = fixes.against(logs[0], examine_run(reference, _material(reference, None, checkpoint)))
        written = _test_generation(logs[0], reference, text) if checkpoint is not False else None
        _print_fixes(found, written, as_json)
        if any(f.finding.severity in failing and f.state in ("missing", "partly") for f in found):
            raise click.exceptions.Exit(1)
        return
    reports, materials = [], []
    for log in logs:
        material = _material(log, text, True if generate else checkpoint)
        reports.append(examine_run(log, material, generate))
        materials.append(material)
    if compare:
        _print_comparison(reports[0], reports[1], as_json)
    elif as_json:
        click.echo(json.dumps([r.to_dict() for r in reports], indent=2))
    else:
        _print(reports)
    if out is not None:
        from hnet.diagnose.page import write_report

        for i, (report, material) in enumerate(zip(reports, materials, strict=True)):
            folder = out if len(reports) == 1 else out / f"{i}_{report.log.path.resolve().stem}"
            click.echo(f"wrote {write_report(folder, report, material)[0]} and its plots", err=True)
    if write_config is not None:
        fixed = fixes.write_config(reports[0], accept.split(",") if accept else None)
        with user_path(write_config, "write"):
            write_config.write_text(fixed)
        click.echo(f"wrote {write_config}", err=True)
    if any(r.worst in failing for r in reports):
        raise click.exceptions.Exit(1)


def _material(log: Log, text: Path | None, wanted: bool | None) -> Material | None:
    """The checkpoint and the data: asked for (True), not wanted (False), or where they are here and small (None)."""
    from hnet.diagnose.checkpoint import open_material, weights_bytes
    from hnet.diagnose.data import data_files
    from hnet.diagnose.whole import READ

    if wanted is None:
        files = data_files(log) if log.kind == "run" else []
        here = 0 < sum(p.stat().st_size for p in files) <= READ
        wanted = None if here and 0 < weights_bytes(_folder(log)) <= SMALL else False
    if wanted is False:
        return None
    try:
        return open_material(_folder(log), text)
    except (UserError, OSError):
        if wanted:
            raise
        return None


def _folder(log: Log) -> Path:
    return log.path if log.path.is_dir() else log.path.parent


def _test_generation(fixed: Log, run: Log, text: Path | None) -> dict[str, Any] | None:
    """What a checkpoint writes: that of the fixed config's run, if it has been made, else the run's own."""
    from hnet.diagnose.checkpoint import open_material, weights_bytes
    from hnet.diagnose.generation import generation, samples

    own = Path(str(fixed.setting("out", default="")))
    tried = [p for p in (own, _folder(run)) if str(p) not in ("", ".") and weights_bytes(p)]
    if not tried:
        return None
    try:
        material = open_material(tried[0], text)
        rows = samples(material.model, material.held_out, material.source)
    except (UserError, OSError) as e:
        return {"path": str(tried[0]), "step": None, "why": str(e), "rows": [], "findings": []}
    findings = [f.to_dict() for f in generation(rows)]
    return {"path": str(tried[0]), "step": material.step, "why": None, "rows": rows, "findings": findings}


def _print(reports: list[Report]) -> None:
    from rich.console import Console

    from hnet.diagnose.report import print_report

    console = Console(highlight=False)
    for report in reports:
        print_report(console, report)


def _print_fixes(found: list[Fix], written: dict[str, Any] | None, as_json: bool) -> None:
    from hnet.config.toml import dumps

    if as_json:
        rows = [
            {
                "id": f.finding.name, "severity": f.finding.severity, "state": f.state,
                "keys": {k: {"was": a, "wanted": b, "is": c} for k, (a, b, c) in f.keys.items()},
            }
            for f in found
        ]  # fmt: skip
        click.echo(json.dumps({"fixes": rows, "generation": written}, indent=2))
        return
    for f in found:
        click.echo(f"{f.state:<10}{f.finding.name}: {f.finding.title}")
        for k, (was, wanted, now) in f.keys.items():
            values = [dumps({"x": v})[4:].strip() if v is not None else "unset" for v in (was, now, wanted)]
            click.echo(f"          {k}: was {values[0]}, is {values[1]}, asked for {values[2]}")
        if f.state == "elsewhere":
            click.echo(f"          {(f.finding.advice or ['no key of a config answers it'])[0]}")
    if not found:
        click.echo("the run has no finding that a config could answer")
    if written is None:
        click.echo("generation: no checkpoint to judge")
    elif written["why"]:
        click.echo(f"generation: {written['path']} could not be judged: {written['why']}")
    else:
        click.echo(f"generation, from {written['path']} at step {written['step']}:")
        for f in written["findings"]:
            click.echo(f"{f['severity']:<10}{f['id']}: {f['evidence'][0]}")
            for line in f["advice"]:
                click.echo(f"          -> {line}")


def _print_comparison(a: Report, b: Report, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from hnet.diagnose.compare import compare

    found = compare(a, b)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    console = Console(highlight=False)
    for part in ("config", "summary"):
        table = Table(part, *found["runs"])
        for name, values in found[part].items():
            table.add_row(name, *(f"{v:.5g}" if isinstance(v, float) else str(v) for v in values))
        console.print(table)
    for what, names in found["findings"].items():
        console.print(f"{what}: {', '.join(names) or 'none'}", markup=False)


@click.command()
@click.argument("run", type=PATH)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where to; default: RUN/plots.")
def plot(run: Path, out: Path | None) -> None:
    """Draw a run's loss, learning rate, gradient norms, compression and how decided its routers are, as PNG files."""
    from hnet.plots.run import plot_run

    for path in plot_run(run, out):
        click.echo(str(path))
