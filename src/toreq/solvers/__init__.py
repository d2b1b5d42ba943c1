"""Solvers: how a state reaches its equilibrium."""

import dataclasses
from typing import Any

from toreq.errors import ConfigError, nearest
from toreq.solvers.anderson import Anderson
from toreq.solvers.base import Solver
from toreq.solvers.fixed_point import Fading, FixedPoint
from toreq.solvers.langevin import Langevin
from toreq.solvers.multiscale import CoarseToFine
from toreq.solvers.problem import Problem, Relaxation
from toreq.solvers.solution import Solution, Step, Trace
from toreq.solvers.spiking import Spiking, SpikingSolution

REGISTRY: dict[str, type[Solver]] = {
    "fixedpoint": FixedPoint,
    "anderson": Anderson,
    "coarsetofine": CoarseToFine,
    "langevin": Langevin,
    "spiking": Spiking,
}


def names() -> list[str]:
    """Names that ``create(..., solver=name)`` accepts."""
    return sorted(REGISTRY)


def create(name: str, **fields: Any) -> Solver:
    """A solver by its name, with fields other than the shipped ones if given.

    Raises:
        ConfigError: for an unknown name or field, with the nearest valid one.
    """
    if name not in REGISTRY:
        raise ConfigError(f"solvers.create: expected a solver by name, got {name!r}; {nearest(name, REGISTRY)}")
    legal = [f.name for f in dataclasses.fields(REGISTRY[name])]
    for key in fields:
        if key not in legal:
            raise ConfigError(f"solvers.create: expected a field of {name!r}, got {key!r}; {nearest(key, legal)}")
    return REGISTRY[name](**fields)


__all__ = [
    "REGISTRY",
    "Anderson",
    "CoarseToFine",
    "Fading",
    "FixedPoint",
    "Langevin",
    "Problem",
    "Relaxation",
    "Solution",
    "Solver",
    "Spiking",
    "SpikingSolution",
    "Step",
    "Trace",
    "create",
    "names",
]
