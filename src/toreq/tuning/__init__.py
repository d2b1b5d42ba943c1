"""Tuning: named parameters, a search with a fixed number of trials, and what came out."""

from toreq.tuning.space import Choice, Integer, Real, Size, Space
from toreq.tuning.study import require_optuna, tune
from toreq.tuning.tuned import Attempt, Tuned, TuneError

__all__ = ["Attempt", "Choice", "Integer", "Real", "Size", "Space", "TuneError", "Tuned", "require_optuna", "tune"]
