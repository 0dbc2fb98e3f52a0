"""The search: trials are begun, watched, pruned and told to Optuna until all are over.

    SWEEP/study.db            Optuna's database: what was tried and what came of it (optuna-dashboard reads it)
    SWEEP/trials/0007/        the run of trial 7 (see hnet.train), with log.txt and outcome.json
    SWEEP/sweep.toml          the sweep in one file

Only this process writes the database; trials write their own folders. So whatever is killed when: a trial is over when
the database says so; one that is not is begun again in its folder, where its run goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from optuna import Study
from optuna.trial import Trial, TrialState

from hnet.config.run import RunConfig
from hnet.disk import replacing
from hnet.errors import UserError, user_path

from .config import SweepConfig
from .objective import Formula
from .process import Process, Tail, why
from .study import METRICS, REASON, next_trial, suggest, unfinished
from .worker import read_outcome

LOOK_EVERY = 0.25  # seconds
KILLS = 2  # a trial whose process is killed this often has failed


class Job(Protocol):
    """A process, or what a test has in its place."""

    def poll(self) -> int | None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


@dataclasses.dataclass
class Active:
    """A trial under way."""

    trial: Trial
    point: dict[str, Any]
    folder: Path
    steps: int  # 0: only its run knows
    job: Job | None  # None: it was over already
    tail: Tail
    reported: set[int]
    begin: float = dataclasses.field(default_factory=time.monotonic)
    step: int = 0
    evaluations: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)  # by step
    value: float | None = None  # of the latest evaluation
    pruned: bool = False

    @property
    def number(self) -> int:
        return self.trial.number


class Search:
    """`run()` it inside `process.locked`.

    Args:
        lock: file descriptor that the workers inherit.
        say: is told what begins and ends, a line each.
        show: is called with self, several times a second.
        launch: starts a worker: folder, threads, lock. Default: a process.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        study: Study,
        lock: int,
        *,
        say: Callable[[str], None] = lambda line: None,
        show: Callable[[Search], None] = lambda search: None,
        launch: Callable[[Path, int, int], Job] | None = None,
    ) -> None:
        self.sweep, self.study, self.lock, self.say, self.show = sweep, study, lock, say, show
        self.launch = launch or Process
        self.formula = Formula(sweep.objective)
        self.points = list(sweep.points()) if sweep.enumerated else []
        self.threads = sweep.threads or max((os.cpu_count() or 1) // sweep.workers, 1)
        self.active: list[Active] = []
        self.waiting = unfinished(study)
        self.killed: Counter[int] = Counter()
        self.stopping = False

    def run(self) -> bool:
        """Until all trials are over, or a signal: then they save and stop, to go on next time. Whether all are over."""
        handlers = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        self._write_sweep()
        complete = True
        try:
            while True:
                while len(self.active) < self.sweep.workers and not self.stopping and (trial := self._next()):
                    self._begin(trial)
                if not self.active:
                    break
                self.show(self)
                for a in list(self.active):
                    if self._look(a):
                        self.active.remove(a)
                        complete = self._end(a) and complete
                if self.active:
                    time.sleep(LOOK_EVERY)
        finally:
            for a in self.active:
                if a.job is not None:
                    a.job.kill()
            for s, handler in handlers.items():
                signal.signal(s, handler)
        self.show(self)
        return complete and not self.stopping

    def _next(self) -> Trial | None:
        return self.waiting.pop(0) if self.waiting else next_trial(self.study, self.sweep, self.points)

    def _begin(self, trial: Trial) -> None:
        point = suggest(trial, self.sweep.parameters)
        folder = self.sweep.folder / "trials" / f"{trial.number:04d}"
        try:
            config = self.sweep.run_of(point, folder)
            text = config.to_toml()
            config.validate()
        except UserError as e:
            self._fail(trial, str(e))
            return
        reported = set(self.study.trials[trial.number].intermediate_values)
        a = Active(trial, point, folder, _steps(config), None, Tail(folder / "metrics.jsonl"), reported)
        if read_outcome(folder) is None:  # else: killed between its end and the telling of it
            with user_path(folder, "write"):
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(folder / "config.toml") as partial:
                    partial.write_text(text)
            a.job = self.launch(folder, self.threads, self.lock)
        self.active.append(a)
        again = " again" if (folder / "metrics.jsonl").exists() else ""
        self.say(f"trial {trial.number} begins{again}: {describe(point)}")

    def _look(self, a: Active) -> bool:
        """Whether the trial's process has ended; what it wrote since the last look is reported to Optuna."""
        ended = a.job is None or a.job.poll() is not None
        if self.stopping and not ended and a.job is not None:
            a.job.stop()
        for row in a.tail.rows():
            if "event" in row:
                continue
            a.step = row["step"]
            if "val_bpb" in row and a.step > 0:
                a.evaluations[a.step] = row
                self._report(a, row)
        return ended

    def _report(self, a: Active, row: dict[str, Any]) -> None:
        try:
            a.value = self.formula(row)
        except UserError:  # judged at the end of the trial, where it may matter
            a.value = None
            return
        if a.step in a.reported:
            return
        a.reported.add(a.step)
        a.trial.report(a.value, a.step)
        if a.job is not None and a.step != a.steps and a.trial.should_prune():
            a.pruned = True
            a.job.stop()

    def _end(self, a: Active) -> bool:
        """Tell Optuna how a trial ended; False if it has not ended, and goes on when the sweep is started again."""
        outcome, trial = read_outcome(a.folder), a.trial
        trial.set_user_attr("seconds", max((r.get("time", 0.0) for r in a.evaluations.values()), default=0.0))
        if outcome is not None and "failed" in outcome:
            self._fail(trial, outcome["failed"])
        elif outcome is not None:
            self._complete(a)
        elif a.pruned:
            row = a.evaluations[max(a.evaluations)]
            trial.set_user_attr(METRICS, row)
            self.study.tell(trial, state=TrialState.PRUNED)
            self.say(f"trial {a.number} is pruned at step {a.step}: objective {a.value:.5g}")
        elif self.stopping:
            return False
        elif (code := a.job.poll() if a.job is not None else None) == 0:
            self.say(
                f"trial {a.number} was stopped from outside at step {a.step}: start the sweep again to go on with it"
            )
            return False
        else:
            return self._broken(a, code or 0)
        return True

    def _broken(self, a: Active, code: int) -> bool:
        self.killed[a.number] += 1
        if code < 0 and self.killed[a.number] < KILLS:
            self.say(f"trial {a.number} was {why(code)}; it goes on from its checkpoint")
            self.waiting.append(Trial(self.study, a.trial._trial_id))
        else:
            self._fail(a.trial, why(code))
        return True

    def _complete(self, a: Active) -> None:
        rows = a.evaluations
        if not rows:
            self._fail(a.trial, "it has no evaluation after a step")
            return
        step = max(rows)
        if self.sweep.at == "best":
            judged = {s: r["val_ce"] for s, r in rows.items() if isinstance(r.get("val_ce"), int | float)}
            step = min(judged, key=judged.__getitem__, default=step)
        try:
            value = self.formula(rows[step])
        except UserError as e:
            self._fail(a.trial, str(e))
            return
        a.trial.set_user_attr(METRICS, rows[step])
        self.study.tell(a.trial, value)
        self.say(f"trial {a.number} is complete: objective {value:.5g}, {describe(a.point)}")

    def _fail(self, trial: Trial, reason: str) -> None:
        trial.set_user_attr(REASON, reason)
        self.study.tell(trial, state=TrialState.FAIL)
        self.say(f"trial {trial.number} failed: {reason}")

    def _write_sweep(self) -> None:
        with user_path(self.sweep.folder, "write"), replacing(self.sweep.folder / "sweep.toml") as partial:
            partial.write_text(self.sweep.to_toml())

    def _interrupt(self, *_: object) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.say("stopping: trials save and go on when the sweep is started again (again: at once)")


def _steps(config: RunConfig) -> int:
    return 0 if getattr(config, "epochs", 0.0) else config.steps


def describe(point: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in point.items()
    )
