"""Estimators: how a contrast of equilibria becomes a gradient."""

import dataclasses
from typing import Any

from toreq.core.energy import Dynamics
from toreq.errors import ConfigError, nearest
from toreq.estimators.base import Contrastive, Estimate, Estimator, Statistics, Support
from toreq.estimators.equilibrium_propagation import Centered, Holomorphic, OneSided
from toreq.estimators.implicit import Implicit
from toreq.estimators.nonconservative import NonConservative
from toreq.estimators.predictive import Predictive
from toreq.estimators.thermal import Thermal, ThermalStatistics
from toreq.estimators.unrolled import Unrolled
from toreq.solvers import FixedPoint, Solver

REGISTRY: dict[str, type[Estimator]] = {
    e.name: e for e in (OneSided, Centered, Holomorphic, NonConservative, Predictive, Thermal, Implicit, Unrolled)
}


def names() -> list[str]:
    """Names that ``create(..., estimator=name)`` accepts."""
    return sorted(REGISTRY)


def create(name: str, **fields: Any) -> Estimator:
    """An estimator by its name, with fields other than the shipped ones if given.

    Raises:
        ConfigError: for an unknown name or field, with the nearest valid one.
    """
    if name not in REGISTRY:
        raise ConfigError(f"estimators.create: expected an estimator by name, got {name!r}; {nearest(name, REGISTRY)}")
    legal = [f.name for f in dataclasses.fields(REGISTRY[name])]
    for key in fields:
        if key not in legal:
            raise ConfigError(f"estimators.create: expected a field of {name!r}, got {key!r}; {nearest(key, legal)}")
    return REGISTRY[name](**fields)


def all_for(dynamics: Dynamics, solver: Solver | None = None) -> list[tuple[str, Estimator]]:
    """The shipped estimators, at their shipped settings, that support a network and fit a solver (one that settles
    when None)."""
    solver = FixedPoint() if solver is None else solver
    shipped = [(name, kind()) for name, kind in REGISTRY.items()]
    return [(name, e) for name, e in shipped if e.supports(dynamics) and e.accepts(solver)]


__all__ = [
    "REGISTRY",
    "Centered",
    "Contrastive",
    "Estimate",
    "Estimator",
    "Holomorphic",
    "Implicit",
    "NonConservative",
    "OneSided",
    "Predictive",
    "Statistics",
    "Support",
    "Thermal",
    "ThermalStatistics",
    "Unrolled",
    "all_for",
    "create",
    "names",
]
