"""Optuna's side of a sweep: its database in the sweep's folder, what to try next, what to give up."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

from hnet.errors import PathTaken, UserError, user_path

from .config import SweepConfig
from .parameters import Parameter

try:
    import optuna
except ImportError as e:
    raise UserError(f"hnet sweep needs Optuna: pip install 'hnet-kernels[sweep]' ({e})") from None
from optuna.trial import FrozenTrial, Trial, TrialState

DATABASE, NAME = "study.db", "sweep"
SAME, METRICS, REASON = "same_as", "metrics", "reason"  # user attributes of trials
REPEATS = 100  # suggestions in a row that were tried already until there is nothing left
PRUNERS = {
    "none": optuna.pruners.NopPruner, "median": optuna.pruners.MedianPruner,
    "percentile": optuna.pruners.PercentilePruner, "threshold": optuna.pruners.ThresholdPruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner, "hyperband": optuna.pruners.HyperbandPruner,
    "patient": optuna.pruners.PatientPruner,
}  # fmt: skip
optuna.logging.set_verbosity(optuna.logging.WARNING)


def make_sampler(sweep: SweepConfig, number: int) -> optuna.samplers.BaseSampler:
    """For one trial, seeded by its number: a sweep that was killed goes on with the suggestions it would have made."""
    kind = optuna.samplers.TPESampler if sweep.sampler == "tpe" else optuna.samplers.RandomSampler
    seed = (1_000_003 * sweep.seed + number) % 2**32
    return _make(kind, "sampler", sweep.sampler, {"seed": seed}, sweep.options["sampler"])


def make_pruner(sweep: SweepConfig) -> optuna.pruners.BasePruner:
    own = {"wrapped_pruner": None} if sweep.pruner == "patient" else {}
    return _make(PRUNERS[sweep.pruner], "pruner", sweep.pruner, own, sweep.options["pruner"])


def _make(kind: Any, what: str, name: str, own: dict[str, Any], options: dict[str, Any]) -> Any:
    known = [k for k in inspect.signature(kind.__init__).parameters if k not in ("self", "args", "kwargs", *own)]
    for k in options:
        if k not in known:
            raise UserError(f"{what}_options: {what} {name!r} has no {k!r}; known are {', '.join(known) or 'none'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Optuna calls experimental
            return kind(**own, **options)
    except (TypeError, ValueError) as e:
        raise UserError(f"{what}_options of {what} {name!r}: {e}") from None


def check_folder(sweep: SweepConfig) -> None:
    """Reads only.

    Raises:
        UserError: an option of the sampler or pruner that it does not have.
        PathTaken: the folder holds another sweep, or something else.
    """
    make_sampler(sweep, 0)
    make_pruner(sweep)
    folder = sweep.folder
    with user_path(folder):
        if (folder / DATABASE).is_file():
            _check_identity(sweep, _load(folder, make_pruner(sweep)))
            return
        if folder.exists() and not folder.is_dir():
            raise PathTaken(f"{folder} is a file: name another folder with --out")
        found = {p.name for p in folder.iterdir()} if folder.exists() else set()
    if others := {name for name in found if not name.startswith((".partial_", ".lock"))}:
        raise PathTaken(f"{folder} holds {min(others)} and no sweep: name another folder with --out")


def open_study(sweep: SweepConfig) -> optuna.Study:
    """The sweep's study, made if there is none; call `check_folder` first."""
    path, partial = sweep.folder / DATABASE, sweep.folder / f".partial_{DATABASE}"
    pruner = make_pruner(sweep)
    if not path.exists():
        for left in sweep.folder.glob(f"{partial.name}*"):  # half made by a start that was killed
            left.unlink()
        storage = optuna.storages.RDBStorage(f"sqlite:///{partial.resolve()}")
        direction: Any = sweep.direction
        study = optuna.create_study(storage=storage, study_name=NAME, direction=direction)
        study.set_user_attr("identity", json.dumps(sweep.identity()))
        storage.remove_session()
        storage.engine.dispose()
        partial.rename(path)
    return _load(sweep.folder, pruner)


def load_study(folder: Path) -> optuna.Study:
    """
    Raises:
        UserError: there is none.
    """
    if not (folder / DATABASE).is_file():
        raise UserError(f"{folder} holds no sweep: it has no {DATABASE}")
    return _load(folder, optuna.pruners.NopPruner())


def _load(folder: Path, pruner: optuna.pruners.BasePruner) -> optuna.Study:
    path = folder / DATABASE
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")
        return optuna.load_study(study_name=NAME, storage=storage, pruner=pruner)
    except Exception as e:  # SQLAlchemy's, SQLite's and Optuna's own, by what is wrong
        raise UserError(f"{path} is not the database of a sweep: {str(e).splitlines()[0]}") from None


def _check_identity(sweep: SweepConfig, study: optuna.Study) -> None:
    before = json.loads(study.user_attrs.get("identity", "{}"))
    now = json.loads(json.dumps(sweep.identity()))
    for name in [*now, *before]:
        a, b = (json.dumps(d[name], ensure_ascii=False) if name in d else "nothing" for d in (before, now))
        if a != b:
            raise PathTaken(
                f"{sweep.folder} holds another sweep: {name} was {a} there and is {b} now; name another --out"
            )


def suggest(trial: Trial, parameters: list[Parameter]) -> dict[str, Any]:
    """The point of a trial: of one that was begun before, what it had."""
    point: dict[str, Any] = {}
    for p in parameters:
        if p.choices:
            point[p.name] = trial.suggest_categorical(p.name, list(p.choices))
        elif p.whole:
            step = 1 if p.step is None else int(p.step)
            point[p.name] = trial.suggest_int(p.name, int(p.low), int(p.high), step=step, log=p.log)
        else:
            point[p.name] = trial.suggest_float(p.name, p.low, p.high, step=p.step, log=p.log)
    return point


def unfinished(study: optuna.Study) -> list[Trial]:
    """Trials that were begun and are not over, to be taken up again."""
    begun = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
    return [Trial(study, t._trial_id) for t in begun]


def next_trial(study: optuna.Study, sweep: SweepConfig, points: list[dict[str, str]]) -> Trial | None:
    """The next point, of `points` where they are enumerated; None if that was all. A point that was tried is not tried
    again: it gets the value it had, or is passed over."""
    for _ in range(REPEATS):
        trials = study.get_trials(deepcopy=False)
        waiting = [t for t in trials if t.state == TrialState.WAITING]  # killed between the two calls below
        if sum(SAME not in t.user_attrs for t in trials) - len(waiting) >= sweep.wanted:
            return None
        if sweep.enumerated and not waiting:
            study.enqueue_trial(points[len(trials)])
        study.sampler = make_sampler(sweep, waiting[0].number if waiting else len(trials))
        trial = study.ask()
        point = suggest(trial, sweep.parameters)
        same = [t for t in trials if t.params == point and SAME not in t.user_attrs]
        if not same:
            return trial
        trial.set_user_attr(SAME, same[0].number)
        if same[0].state == TrialState.COMPLETE:
            study.tell(trial, same[0].value)
        else:
            study.tell(trial, state=TrialState.FAIL)
    return None


def by_objective(sweep: SweepConfig, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The complete ones, the best first."""
    sign = 1 if sweep.direction == "minimize" else -1
    return sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: sign * (t.value or 0.0))


def real_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Without repetitions."""
    return [t for t in study.get_trials(deepcopy=False) if SAME not in t.user_attrs and t.state != TrialState.WAITING]
