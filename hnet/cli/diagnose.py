"""`hnet diagnose` and `hnet plot`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hnet.errors import UserError


class Unreadable(click.ClickException):
    exit_code = 2


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_OR_LOG...")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with one object for each log.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write report.md and the plots here.")
def diagnose(runs: tuple[Path, ...], as_json: bool, out: Path | None) -> None:
    """Say what is wrong with a training run, with evidence and what to change.

    RUN_OR_LOG is a run directory, a config.toml alone, a metrics.jsonl, a CSV, HF's trainer_state.json, or what a
    trainer printed (nanoGPT, torchtitan, HF Trainer, Megatron, ChunkLM and the like).

    Exit code: 0 without errors (there may be warnings and notes), 1 when a finding is an error, 2 when a log cannot be
    read.
    """
    from rich.console import Console

    from hnet.diagnose.report import diagnose as find
    from hnet.diagnose.report import print_report, to_dict, write_report
    from hnet.diagnose.runs import read_log

    try:
        logs = [read_log(r) for r in runs]
    except UserError as e:
        raise Unreadable(str(e)) from None
    found = [find(log) for log in logs]
    if as_json:
        click.echo(json.dumps([to_dict(a, f) for a, f in zip(logs, found, strict=True)], indent=2))
    else:
        console = Console(highlight=False)
        for log, findings in zip(logs, found, strict=True):
            print_report(console, log, findings)
    if out is not None:
        for i, (log, findings) in enumerate(zip(logs, found, strict=True)):
            folder = out if len(logs) == 1 else out / f"{i}_{log.path.resolve().stem}"
            report = write_report(folder, log, findings)[0]
            click.echo(f"wrote {report} and its plots", err=True)
    if any(f.severity == "error" for findings in found for f in findings):
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where to; default: RUN/plots.")
def plot(run: Path, out: Path | None) -> None:
    """Draw a run's loss, learning rate, gradient norms, compression and how decided its routers are, as PNG files."""
    from hnet.plots.run import plot_run

    for path in plot_run(run, out):
        click.echo(str(path))
