"""`hnet diagnose` and `hnet plot`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hnet.errors import UserError, user_path

if TYPE_CHECKING:
    from hnet.diagnose.report import Report


class Unreadable(click.ClickException):
    exit_code = 2


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_OR_LOG...")
@click.option("--config", type=click.Path(path_type=Path), help="Config of the run: TOML, JSON or YAML of any trainer.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with one object for each log.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write report.md and the plots here.")
@click.option(
    "--fail-on", type=click.Choice(["warning", "critical"]), default="critical", show_default=True,
    help="The least severe finding that makes the exit code 1.",
)  # fmt: skip
def diagnose(runs: tuple[Path, ...], config: Path | None, as_json: bool, out: Path | None, fail_on: str) -> None:
    """Say what is wrong with a training run, with evidence and what to change.

    RUN_OR_LOG is a run directory, a config.toml alone, a metrics.jsonl, a CSV, HF's trainer_state.json, or what a
    trainer printed (nanoGPT, torchtitan, HF Trainer, Megatron, ChunkLM and the like).

    Exit code: 0 without findings as severe as --fail-on, 1 with one, 2 when a log cannot be read.
    """
    from rich.console import Console

    from hnet.diagnose.report import examine, print_report
    from hnet.diagnose.runs import read_log

    try:
        logs = [read_log(r, config) for r in runs]
    except UserError as e:
        raise Unreadable(str(e)) from None
    reports = [examine(log) for log in logs]
    if as_json:
        click.echo(json.dumps([r.to_dict() for r in reports], indent=2))
    else:
        console = Console(highlight=False)
        for report in reports:
            print_report(console, report)
    if out is not None:
        for i, report in enumerate(reports):
            folder = out if len(reports) == 1 else out / f"{i}_{report.log.path.resolve().stem}"
            click.echo(f"wrote {write_report(folder, report)[0]} and its plots", err=True)
    failing = ("critical",) if fail_on == "critical" else ("critical", "warning")
    if any(r.worst in failing for r in reports):
        raise click.exceptions.Exit(1)


def write_report(out: Path, report: Report) -> list[Path]:
    """report.md and the plots below `out`; returns the files written."""
    from hnet.diagnose.markdown import to_markdown
    from hnet.plots.run import plot_rows

    with user_path(out, "write"):
        out.mkdir(parents=True, exist_ok=True)
    plots = plot_rows(report.log.rows, out)
    page = out / "report.md"
    page.write_text(to_markdown(report, plots))
    return [page, *plots]


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where to; default: RUN/plots.")
def plot(run: Path, out: Path | None) -> None:
    """Draw a run's loss, learning rate, gradient norms, compression and how decided its routers are, as PNG files."""
    from hnet.plots.run import plot_run

    for path in plot_run(run, out):
        click.echo(str(path))
