"""The implicit-function gradient: the reference that deep equilibrium models use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from toreq.core.energy import Dynamics
from toreq.estimators.adjoint import adjoint
from toreq.estimators.base import Estimate, Estimator, FreePhase, Nudge, Statistics, Support
from toreq.solvers.base import require


@dataclass(frozen=True, kw_only=True)
class Implicit(Estimator):
    r"""The adjoint fixed point (Almeida 1987, Pineda 1987; Bai et al. 2019): :math:`w = v + J^\top\sigma' w`,
    gradient :math:`\langle\sigma' w, \partial_\theta f\rangle`.

    Exact up to the tolerances of both solves; memory does not grow with steps. The adjoint is relaxed by the layer's
    own solver. This is the reference (BP-eq) the other estimators are held against.

    Args:
        tolerance: relative residual of the adjoint.
        max_steps: most adjoint steps; the solver's own limit when None.
    """

    name: ClassVar[str] = "implicit"
    tolerance: float = 1e-5
    max_steps: int | None = None

    def __post_init__(self) -> None:
        require("Implicit", "tolerance", self.tolerance, 0 <= self.tolerance < 1, "in [0, 1)", "try 1e-5")
        steps_ok = self.max_steps is None or self.max_steps >= 1
        require("Implicit", "max_steps", self.max_steps, steps_ok, "None or >= 1", "leave it None")

    def supports(self, dynamics: Dynamics) -> Support:
        return Support(True)

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        v = nudge.cotangent(free.h)
        problem = adjoint(free, v)
        start = {n: v[n] if n in v else t.new_zeros(t.shape) for n, t in free.a.items()}
        steps = free.solver.max_steps if self.max_steps is None else self.max_steps
        solver = replace(free.solver, tolerance=self.tolerance, max_steps=steps)
        solution = solver.solve(problem, start, record=record)
        gradients = free.dynamics.field_gradient(solution.h, solution.state, free.a, free.h, free.bindings)
        return Estimate(gradients, Statistics.of(solution), solution)
