"""The search: quasi-random points first, then a tree-structured Parzen estimator (Bergstra et al. 2011) by Optuna."""

from __future__ import annotations

import importlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
from scipy.stats import qmc

from toreq.errors import ConfigError, DivergenceError
from toreq.tuning import storage as files
from toreq.tuning.space import Choice, Integer, Real, Space, Value
from toreq.tuning.tuned import Attempt, Direction, Tuned, TuneError

QUASI_RANDOM = 5
"""Trials before the estimator takes over; the points that are given to start with are among them."""
_DRAWN = 8  # points of a Sobol sequence are balanced in powers of two
_POINT, _SECONDS, _REASON, _ASKED = "point", "seconds", "reason", "asked"

Objective = Callable[[int, Mapping[str, Value]], float]
"""(number of the trial, parameters) -> the value that is tuned."""


def tune(
    objective: Objective,
    space: Space,
    trials: int,
    *,
    seed: int = 0,
    storage: Path | None = None,
    direction: Direction = "maximize",
    name: str = "tune",
    start: Mapping[str, Value] | None = None,
    about: Mapping[str, Any] | None = None,
    done: Callable[[Attempt], None] | None = None,
) -> Tuned:
    r"""Search a space with exactly so many trials and return the best.

    The first trials are ``start`` and points of a scrambled Sobol sequence, up to five; each later one maximises the
    ratio :math:`l(x)/g(x)` of the densities of good and other points (Bergstra et al. 2011). Trial n is drawn by
    a generator of (seed, n), so that an interrupted search tries the same points as an unbroken one: a trial that was
    cut off is begun again with its parameters. A trial that diverges, or whose value is not finite, is kept as failed
    with its reason, and counts.

    Args:
        objective: called with the trial's number (the same after an interruption) and its parameters. Other errors
            than `DivergenceError` stop the search, and the trial is begun again by the next call.
        space: what is searched.
        trials: at least 1; those that ``storage`` holds count.
        seed: of the search.
        storage: an SQLite file that keeps every trial as it ends; None keeps them in memory alone.
        direction: ``maximize`` or ``minimize``.
        name: of the study in the storage.
        start: a point to try first.
        about: what else the objective depends on, as JSON-able values; a search goes on with the same only.
        done: called with every trial that ends; with one that ``storage`` holds already, too.

    Raises:
        ConfigError: optuna is not installed, or an argument is out of range.
        TuneError: every trial failed, or the storage holds a search that was asked for otherwise or is being run.
    """
    if trials < 1:
        raise ConfigError(f"tune: expected at least one trial, got {trials}; ask for more")
    if direction not in ("maximize", "minimize"):
        raise ConfigError(f"tune: expected the direction 'maximize' or 'minimize', got {direction!r}; choose one")
    first = None if start is None else space.check(start)
    asked = {
        "space": space.describe(),
        "seed": seed,
        "direction": direction,
        "start": first,
        # as they come out of the storage: a tuple as a list
        "settings": json.loads(json.dumps(dict(about or {}))),
    }
    optuna = _optuna()
    with _quiet(optuna), files.opened(optuna, storage) as backend:
        study = optuna.create_study(storage=backend, study_name=name, direction=direction, load_if_exists=True)
        _same(study, asked, storage)
        _requeue(optuna, study, space)
        found = _attempts(optuna, study)[:trials]
        for attempt in found:
            _tell(done, attempt)
        while len(found) < trials:
            found.append(_step(optuna, study, space, objective, len(found), seed, first))
            _tell(done, found[-1])
    return _tuned(found, space, direction, seed)


def _tell(done: Callable[[Attempt], None] | None, attempt: Attempt) -> None:
    if done is not None:
        done(attempt)


def require_optuna() -> None:
    """Raise `ConfigError`, naming the extra, where optuna is not installed."""
    _optuna()


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise ConfigError('tune: expected optuna, got none installed; pip install "toreq[tune]"') from error


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without Optuna's own log, which is put back at the end."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            # the joint estimator is marked experimental, and has been since 2020
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _same(study: Any, asked: dict[str, Any], storage: Path | None) -> None:
    before = study.user_attrs.get(_ASKED)
    if before is None:
        study.set_user_attr(_ASKED, asked)
        return
    for what, value in asked.items():
        if before.get(what) != value:
            raise TuneError(
                f"tune: expected the {what} of the search in {storage}, {before.get(what)}, got {value}; go on with "
                "the same, or write to another place"
            )


def _requeue(optuna: Any, study: Any, space: Space) -> None:
    """Give up the trials that an earlier process did not finish, and queue their points again."""
    states = optuna.trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
        # without all of its parameters it was cut off before it began: its point is drawn again
        if trial.params.keys() == space.parameters.keys():
            study.enqueue_trial(trial.params)


def _attempts(optuna: Any, study: Any) -> list[Attempt]:
    """The finished trials. Failed ones are stored as pruned, since the estimator then knows them as bad."""
    states = optuna.trial.TrialState
    finished = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))
    return [
        Attempt(
            number,
            dict(trial.user_attrs[_POINT]),
            trial.value,
            "complete" if trial.state == states.COMPLETE else "failed",
            float(trial.user_attrs[_SECONDS]),
            str(trial.user_attrs.get(_REASON, "")),
        )
        for number, trial in enumerate(finished)
    ]


def _step(
    optuna: Any, study: Any, space: Space, objective: Objective, number: int, seed: int, first: dict[str, Value] | None
) -> Attempt:
    states = optuna.trial.TrialState
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=QUASI_RANDOM, multivariate=True, seed=_seed(seed, number)
    )
    if number < QUASI_RANDOM and not study.get_trials(deepcopy=False, states=(states.WAITING,)):
        study.enqueue_trial(_encoded(space, _opening(space, number, seed, first)))
    trial = study.ask(_distributions(optuna, space))
    point = _decoded(space, trial.params)
    started, value, reason = time.perf_counter(), None, ""
    try:
        value = float(objective(number, point))
        if not math.isfinite(value):
            reason = f"expected a finite value, got {value}"
    except DivergenceError as error:
        reason = str(error)
    seconds = time.perf_counter() - started
    trial.set_user_attr(_POINT, point)
    trial.set_user_attr(_SECONDS, seconds)
    if reason:
        trial.set_user_attr(_REASON, reason)
        study.tell(trial, state=states.PRUNED)
        return Attempt(number, point, None, "failed", seconds, reason)
    study.tell(trial, value)
    return Attempt(number, point, value, "complete", seconds)


def _seed(seed: int, number: int) -> int:
    return int(numpy.random.SeedSequence([seed, number]).generate_state(1)[0])


def _opening(space: Space, number: int, seed: int, first: dict[str, Value] | None) -> dict[str, Value]:
    if first is not None and number == 0:
        return first
    shares = qmc.Sobol(len(space.parameters), scramble=True, rng=seed).random(_DRAWN)
    return space.at([float(share) for share in shares[number - (first is not None)]])


def _distributions(optuna: Any, space: Space) -> dict[str, Any]:
    known = optuna.distributions
    made = {}
    for name, parameter in space.parameters.items():
        match parameter:
            case Real():
                made[name] = known.FloatDistribution(parameter.low, parameter.high, log=parameter.log)
            case Integer():
                made[name] = known.IntDistribution(parameter.low, parameter.high, log=parameter.log)
            case Choice():
                # by index, since to Optuna True, 1 and 1.0 are one choice
                made[name] = known.CategoricalDistribution(range(len(parameter.values)))
    return made


def _encoded(space: Space, point: Mapping[str, Value]) -> dict[str, Any]:
    coded: dict[str, Any] = dict(point)
    for name, parameter in space.parameters.items():
        if isinstance(parameter, Choice):
            value = point[name]
            coded[name] = next(i for i, own in enumerate(parameter.values) if type(own) is type(value) and own == value)
    return coded


def _decoded(space: Space, params: Mapping[str, Any]) -> dict[str, Value]:
    found = {}
    for name, parameter in space.parameters.items():
        found[name] = parameter.values[params[name]] if isinstance(parameter, Choice) else params[name]
    return found


def _tuned(found: list[Attempt], space: Space, direction: Direction, seed: int) -> Tuned:
    complete = [attempt for attempt in found if attempt.value is not None]
    if not complete:
        raise TuneError(
            f"tune: expected a value from one of {len(found)} trials at least, all failed; the first one: "
            f"{found[0].reason}"
        )
    sign = 1.0 if direction == "maximize" else -1.0
    # of equal ones the first
    best = max(complete, key=lambda attempt: (sign * float(attempt.value or 0.0), -attempt.number))
    return Tuned(
        best=best.params,
        value=float(best.value or 0.0),
        trials=tuple(found),
        space=space.describe(),
        size=str(space.size),
        direction=direction,
        seed=seed,
        at_edge=tuple(space.at_edge(best.params)),
    )
