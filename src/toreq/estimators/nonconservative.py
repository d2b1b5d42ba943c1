"""Equilibrium Propagation for fields that are no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from toreq.core.energy import Dynamics
from toreq.core.spectral import field_products
from toreq.core.state import State, added, difference, halves, repeated, scaled, stacked
from toreq.estimators.base import Estimate, FreePhase, Nudge, Support
from toreq.estimators.pairs import Paired, twice
from toreq.solvers.base import require
from toreq.solvers.problem import Relaxation, pair_difference
from toreq.solvers.solution import Solution


@dataclass(frozen=True, kw_only=True)
class NonConservative(Paired):
    r"""Nudged phases whose linear response is the adjoint's, whatever the field (cf. Scellier et al. 2018 for vector
    fields; Laborieux and Zenke 2024 for the asymmetry's effect).

    .. math:: a \leftarrow (1-\gamma)a + \gamma\left[f(h) - (J - J^\top)(h - h^0) \mp \beta v\right],\qquad
              \nabla_\theta = -\tfrac1{2\beta}\langle h^+ - h^-, \partial_\theta f(h^0)\rangle

    with J at the free equilibrium; error :math:`O(\beta^2)`. The correction vanishes for a conservative field. It
    needs one :math:`J` and one :math:`J^\top` product a step, from a graph that is built once.
    """

    name: ClassVar[str] = "nonconservative"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            "NonConservative",
            "nudge",
            self.nudge,
            self.nudge != "cost",
            "'relative' or 'absolute'",
            "use 'relative'",
        )

    def supports(self, dynamics: Dynamics) -> Support:
        return Support(True)

    def aim(self, dynamics: Dynamics) -> float:
        # what is contrasted here are states, which lose digits that an energy near zero keeps
        return super().aim(dynamics) * (3 if self.beta is None and dynamics.response else 1)

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        pair = self.calibrated(free, nudge, record)
        (a1, a2), (h1, h2) = halves(pair.solution.state), halves(pair.solution.h)
        weight = -0.5 * pair.active / pair.beta
        u, w = scaled(difference(h1, h2), weight), scaled(difference(a1, a2), weight)
        gradients = free.dynamics.field_gradient(u, w, free.a, free.h, free.bindings)
        return Estimate(gradients, pair.statistics(), pair.solution)

    def pair(self, free: FreePhase, nudge: Nudge, beta: Tensor, active: Tensor, record: bool) -> Solution:
        a0, h0 = stacked(free.a, free.a), stacked(free.h, free.h)
        bindings = repeated(free.bindings, 2)
        force, _ = self.force(twice(nudge), h0, torch.cat([beta, -beta]))
        transpose, forward = field_products(free.dynamics, h0, bindings, both=True)

        def push(h: State) -> State:
            dh = difference(h, h0)
            return added(difference(transpose(dh), forward(dh)), force or {})

        problem = Relaxation(free.dynamics, bindings, None, push, as_map=True, origin=(a0, h0))
        return self.relax(problem, (a0, h0), free, pair_difference, active, record)
