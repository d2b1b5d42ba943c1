"""Backpropagation through the relaxation: the memory-hungry reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from toreq.core.energy import Dynamics
from toreq.estimators.base import Estimate, Estimator, FreePhase, Nudge, Support
from toreq.solvers.base import Solver, require
from toreq.solvers.fixed_point import FixedPoint
from toreq.solvers.multiscale import CoarseToFine


@dataclass(frozen=True, kw_only=True)
class Unrolled(Estimator):
    """Autograd through the loop (BPTT): exact for the loop as run, memory grows with its steps.

    The forward relaxation itself is recorded, so double backward works. The loop is the plain iteration: an accelerated
    solver is replaced by :class:`~toreq.solvers.FixedPoint` of the same damping, tolerance and step limit, and
    :class:`~toreq.solvers.CoarseToFine` by its own sweeps, not extrapolated.

    Args:
        steps: run exactly this many; the solver's own stopping rule when None.
    """

    name: ClassVar[str] = "unrolled"
    unrolls: ClassVar[bool] = True
    steps: int | None = None

    def __post_init__(self) -> None:
        ok = self.steps is None or self.steps >= 1
        require("Unrolled", "steps", self.steps, ok, "None or an integer >= 1", "try 30")

    def loop(self, solver: Solver) -> Solver:
        """The iteration that is recorded in place of ``solver``."""
        if isinstance(solver, CoarseToFine):
            # its sweeps without the extrapolation: stiff springs would make the plain iteration very slow
            solver = replace(solver, accelerated=False)
        elif not isinstance(solver, FixedPoint):
            solver = FixedPoint(
                damping=getattr(solver, "damping", 1.0), tolerance=solver.tolerance, max_steps=solver.max_steps
            )
        solver = replace(solver, precision="full", compaction=0.0, compile=False)
        return solver if self.steps is None else replace(solver, max_steps=self.steps, tolerance=0.0)

    def supports(self, dynamics: Dynamics) -> Support:
        return Support(True)

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        raise RuntimeError(
            "Unrolled.estimate: expected the recorded forward loop to be differentiated, got a request for a "
            "nudged phase; "
            "Unrolled has none: call backward() on the loss, or choose Centered"
        )
