"""Solvers: how a state reaches its equilibrium."""

from toreq.solvers.anderson import Anderson
from toreq.solvers.base import Problem, Relaxation, Solution, Solver, Step, Trace
from toreq.solvers.fixed_point import Fading, FixedPoint

REGISTRY: dict[str, type[Solver]] = {"fixedpoint": FixedPoint, "anderson": Anderson}


def names() -> list[str]:
    """Names that ``create(..., solver=name)`` accepts."""
    return sorted(REGISTRY)


__all__ = [
    "REGISTRY",
    "Anderson",
    "Fading",
    "FixedPoint",
    "Problem",
    "Relaxation",
    "Solution",
    "Solver",
    "Step",
    "Trace",
    "names",
]
