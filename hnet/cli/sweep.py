"""`hnet sweep`: a search over a run's keys."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from hnet.config.keys import tomllib
from hnet.errors import UserError
from hnet.sweep.keys import SweepKeys

from .options import config_options, given

if TYPE_CHECKING:
    from hnet.sweep.config import SweepConfig


@click.command()
@click.argument("sweep", type=click.Path(dir_okay=False))
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="A key of the run that all trials share, above [run]: --set data=texts/ --set steps=500. May be repeated.",
)  # fmt: skip
@click.option(
    "--dry-run", is_flag=True, help="Check everything, list the configurations; write nothing, train nothing."
)
@click.option("--report", "report_only", is_flag=True, help="Write the report of what there is, train nothing.")
@config_options(SweepKeys)
def sweep(sweep: str, settings: tuple[str, ...], dry_run: bool, report_only: bool, **options: Any) -> None:
    """Search over a run's keys: grid, random, Optuna's TPE, or one key at a time around a base.

    SWEEP is a TOML file: the keys below, [run] with keys of a run that all trials share, and [parameters] with those
    that vary, as lists of choices or {low, high, log, step}. docs/sweep.md has it all.

    Killed at any moment and started again with the same command it goes on: no trial that is over is repeated, the
    others go on from their checkpoints. Needs Optuna: pip install 'hnet-kernels[sweep]'.

    Exit code: 0 when all trials are over, 1 when some are not or none is complete.
    """
    from hnet.sweep.config import read_sweep
    from hnet.sweep.study import check_folder

    found = read_sweep(sweep, given(options), dict(_setting(s) for s in settings))
    if report_only:
        check_folder(found.spelled_out())
        done = report(found)
    else:
        check_folder(found.validate())
        if dry_run:
            click.echo(dry(found))
            return
        done = search(found)
    if not done:
        sys.exit(1)


def search(found: SweepConfig) -> bool:
    """Run the trials that are not over, then write the report. Whether all are over, and one complete."""
    from hnet.sweep.console import SweepConsole
    from hnet.sweep.process import locked
    from hnet.sweep.search import Search
    from hnet.sweep.study import open_study

    with locked(found.folder) as lock:
        study = open_study(found)
        with SweepConsole() as console:
            over = Search(found, study, lock, say=console.say, show=console.show).run()
        return report(found) and over


def report(found: SweepConfig) -> bool:
    """Whether there was a complete trial to report."""
    from hnet.sweep.report import write_report
    from hnet.sweep.study import load_study

    files = write_report(found, load_study(found.folder))
    for path in files:
        click.echo(f"wrote {path}")
    return len(files) > 1


def dry(found: SweepConfig) -> str:
    """The configurations of an enumerated search, each with what is wrong with it; of others what they vary."""
    from hnet.sweep.search import describe

    lines = [f"{found.wanted} trials in {found.folder}, {found.direction} {found.objective}, sampler {found.sampler}"]
    if not found.enumerated:
        return "\n".join([*lines, *(f"  {p.name}: {', '.join(p.choices) or p.range}" for p in found.parameters)])
    for number, point in zip(range(found.wanted), found.points(), strict=False):
        try:
            found.run_of(point, found.folder).validate()
            wrong = ""
        except UserError as e:
            wrong = f"  REFUSED: {e}"
        lines.append(f"  {number:04d}  {describe(point)}{wrong}")
    return "\n".join(lines)


def _setting(text: str) -> tuple[str, Any]:
    """ "steps=500" -> ("steps", 500); what is no TOML is text"""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set must be KEY=VALUE, got {text!r}")
    try:
        return name.strip(), tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()
