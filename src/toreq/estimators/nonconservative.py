"""Equilibrium Propagation for fields that are no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from toreq.core.energy import Dynamics
from toreq.core.spectral import field_products
from toreq.core.state import State, added, difference, halves, norm, repeated, scaled, stacked
from toreq.estimators.base import Contrastive, Estimate, FreePhase, LinearNudge, Nudge, Statistics, Support
from toreq.estimators.equilibrium_propagation import _asymmetry
from toreq.solvers.base import Relaxation, pair_difference, require


@dataclass(frozen=True, kw_only=True)
class NonConservative(Contrastive):
    r"""Nudged phases whose linear response is the adjoint's, whatever the field (cf. Scellier et al. 2018 for
    vector fields; Laborieux and
    Zenke 2024 for the asymmetry's effect).

    .. math:: a \leftarrow (1-\gamma)a + \gamma\left[f(h) - (J - J^\top)(h - h^0) \mp \beta v\right],\qquad
              \nabla_\theta = -\tfrac1{2\beta}\langle h^+ - h^-, \partial_\theta f(h^0)\rangle

    with J at the free equilibrium; error :math:`O(\beta^2)`. The correction vanishes for a conservative field. It
    needs one
    :math:`J` and one :math:`J^\top` product a step, from a graph that is built once.
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

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        v = nudge.cotangent(free.h)
        beta = self.betas(free, v)
        a0, h0 = stacked(free.a, free.a), stacked(free.h, free.h)
        bindings = repeated(free.bindings, 2)
        force, _ = self.force(LinearNudge(stacked(v, v)), h0, torch.cat([beta, -beta]))
        transpose, forward = field_products(free.dynamics, h0, bindings, both=True)

        def correction(h: State) -> State:
            dh = difference(h, h0)
            return difference(transpose(dh), forward(dh))

        problem = Relaxation(free.dynamics, bindings, None, lambda h: added(correction(h), force or {}), as_map=True)
        solution = self.relax(problem, a0, free, pair_difference, record)
        (a1, a2), (h1, h2) = halves(solution.state), halves(solution.h)
        weight = -0.5 / beta
        u, w = scaled(difference(h1, h2), weight), scaled(difference(a1, a2), weight)
        gradients = free.dynamics.field_gradient(u, w, free.a, free.h, free.bindings)
        size = beta.shape[0]
        statistics = Statistics(
            torch.maximum(solution.steps[:size], solution.steps[size:]),
            solution.residual[:size],
            solution.converged[:size] & solution.converged[size:],
            _asymmetry(solution.h, free.h),
            beta,
            norm(difference(h1, h2)) / (2 * norm(free.h)).clamp_min(1e-30),
        )
        return Estimate(gradients, statistics, solution)
