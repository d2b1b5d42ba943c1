"""One nudged phase of a prediction-error energy, in error coordinates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from toreq.core.couplings import Only
from toreq.core.energy import Dynamics, Energy
from toreq.core.residual import Residual
from toreq.core.state import Bindings, State, difference, scaled
from toreq.estimators.base import Contrastive, Estimate, FreePhase, Nudge, Statistics, Support
from toreq.estimators.pairs import relative_response
from toreq.solvers.base import require
from toreq.solvers.fixed_point import FixedPoint
from toreq.solvers.problem import relative


class _ErrorCoordinates:
    r"""Errors and states together: :math:`\epsilon \leftarrow J(h)^\top\epsilon - \beta v,\ h \leftarrow f(h) +
    \epsilon`."""

    def __init__(self, energy: Energy, bindings: Bindings, force: State) -> None:
        self.network, self.bindings, self.force = energy, bindings, force
        self.blocks = [(name, c) for name, c in energy.terms() if isinstance(c, Residual)]

    def activate(self, a: State, only: Only = None) -> State:
        return {n: t for n, t in a.items() if only is None or n in only}

    def field(self, h: State, only: Only = None) -> State:
        out: State = {}
        state = {n: h[f"h_{n}"] for n in self.network.names}
        for n in self.network.names:
            if only is None or f"eps_{n}" in only:
                total = self.force[n] if n in self.force else torch.zeros_like(state[n])
                for name, c in self.blocks:
                    if c.source == n:
                        total = total + c.transpose(state, self.bindings[name], h[f"eps_{c.node}"])
                out[f"eps_{n}"] = total
            if only is None or f"h_{n}" in only:
                out[f"h_{n}"] = self.network.map(state, self.bindings, None, frozenset([n]))[n] + h[f"eps_{n}"]
        return out

    def colours(self) -> list[frozenset[str]]:
        # errors travel backwards and states forwards: on a chain one sweep of this order is exact in eps
        return [frozenset([f"eps_{n}"]) for n in reversed(self.network.names)] + [
            frozenset([f"h_{n}"]) for n in self.network.names
        ]

    def eliminable(self) -> frozenset[str]:
        return frozenset()

    def energy(self, a: State, h: State) -> Tensor | None:
        return None


def _errors_only(r: State, a: State) -> Tensor:
    return relative(
        {n: t for n, t in r.items() if n.startswith("eps_")},
        {n: t for n, t in a.items() if n.startswith("eps_")},
    )


@dataclass(frozen=True, kw_only=True)
class Predictive(Contrastive):
    r"""One nudged phase of :math:`E = \tfrac12\sum_l\|h_l - f_l(h_{l-1}; x)\|^2` (cf. Rao and Ballard 1999;
    Whittington and Bogacz 2017).

    At the free equilibrium E and its gradient vanish, so one phase gives
    :math:`-\tfrac1\beta\sum_l\epsilon_l^\top\partial_\theta f_l` for any block. The errors are variables of their
    own, so a tiny beta loses no digits; as :math:`\beta\to0` this is the adjoint recursion done by local error nodes.

    Args:
        beta: aimed size of the errors relative to the state with ``nudge="relative"``.
    """

    name: ClassVar[str] = "predictive"
    beta: float = 1e-6
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            "Predictive",
            "nudge",
            self.nudge,
            self.nudge != "cost",
            "'relative' or 'absolute'",
            "use 'relative'",
        )

    def supports(self, dynamics: Dynamics) -> Support:
        if isinstance(dynamics, Energy) and dynamics.predictive:
            return Support(True)
        return Support(
            False,
            "Predictive needs a pure prediction-error energy, in which every node is predicted by one Residual and "
            "nothing else; use Centered, or build the network of Residual couplings",
        )

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        energy = free.dynamics
        assert isinstance(energy, Energy)
        v = nudge.cotangent(free.h)
        beta = self.betas(free, v)
        problem = _ErrorCoordinates(energy, free.bindings, scaled(v, -beta))
        start = {f"eps_{n}": torch.zeros_like(t) for n, t in free.h.items()}
        start |= {f"h_{n}": t for n, t in free.h.items()}
        damping = getattr(free.solver, "damping", 1.0)
        sweep = FixedPoint(damping=damping, order="gauss_seidel", max_steps=free.solver.max_steps)
        active = self.active(v)
        solution = self.relax(problem, (start, start), replace(free, solver=sweep), _errors_only, active, record)
        state = {n: solution.h[f"h_{n}"] for n in energy.names}
        grads: dict[str, dict[str, Tensor]] = {}
        for name, c in problem.blocks:
            grads[name] = c.prediction_gradient(
                state, free.bindings[name], scaled({"e": solution.h[f"eps_{c.node}"]}, -1 / beta)["e"]
            )
        flat = [
            grads.get(name, {}).get(k)
            for name, b in free.bindings.items()
            for group in (b.shared, b.batched)
            for k in group
        ]
        response = relative_response(difference(state, free.h), free.h)
        return Estimate(flat, replace(Statistics.of(solution), beta=beta, response=response), solution)
