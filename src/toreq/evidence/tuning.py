"""The tuning of one side of a claim, as a job like any other."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping

import torch

from toreq.evidence.claim import Outcome, Quantity, Trial, Tuning
from toreq.tuning import tune
from toreq.tuning.space import Value

STORAGE = "tuning.sqlite"


def tune_side(tuning: Tuning, trial: Trial) -> Outcome:
    """Tune the side of ``trial`` in its scratch folder; an interrupted search goes on in the trial where it was.

    Raises:
        ConfigError: optuna is not installed.
        TuneError: every trial failed.
    """

    def objective(number: int, params: Mapping[str, Value]) -> float:
        own = dataclasses.replace(trial, scratch=trial.scratch / f"trial-{number}")
        own.scratch.mkdir(parents=True, exist_ok=True)
        # every trial begins alike, whatever ran before it in this process
        torch.manual_seed(trial.seed)
        value = tuning.objective(own, params)
        shutil.rmtree(own.scratch, ignore_errors=True)
        return value

    found = tune(
        objective,
        tuning.spaces[trial.side],
        tuning.count(trial.budget),
        seed=trial.seed,
        storage=trial.scratch / STORAGE,
        direction=tuning.direction,
        start=tuning.start.get(trial.side),
    )
    return Outcome({"best value": Quantity(found.value, "")}, search=found)
