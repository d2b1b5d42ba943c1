"""Contrasts of nudged equilibria of an energy: one-sided, centered and holomorphic Equilibrium Propagation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from toreq.core.energy import Dynamics, Energy
from toreq.core.state import (
    Bindings,
    added,
    cast,
    halves,
    leaves,
    repeated,
    scaled,
    stacked,
    with_leaves,
)
from toreq.estimators.base import Contrastive, Estimate, FreePhase, Nudge, Statistics, Support
from toreq.estimators.pairs import Paired, relative_response, twice
from toreq.solvers.base import require
from toreq.solvers.problem import Relaxation, displacement_from, pair_difference
from toreq.solvers.solution import Solution


def _energy(free: FreePhase) -> Energy:
    assert isinstance(free.dynamics, Energy)
    return free.dynamics


@dataclass(frozen=True, kw_only=True)
class OneSided(Contrastive):
    r"""One nudged phase (Scellier and Bengio 2017):
    :math:`\tfrac1\beta[\partial_\theta E(h^\beta) - \partial_\theta E(h^0)]`, error :math:`O(\beta)`.

    There is no asymmetry to measure.
    """

    name: ClassVar[str] = "onesided"
    usual: ClassVar[float] = 1e-3
    tolerance: float = 1e-3

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        energy = _energy(free)
        v = nudge.cotangent(free.h)
        beta, active = self.betas(free, v), self.active(v)
        force, extra = self.force(nudge, free.h, beta)
        problem = Relaxation(energy, free.bindings, force, extra, origin=(free.a, free.h))
        solution = self.relax(problem, (free.a, free.h), free, displacement_from(free.a), active, record)
        # far from the read-out a response can be smaller than the rounding of an activation, which a centered
        # difference cancels and this one does not
        moved = energy.increment(solution.state, (free.a, free.h), free.bindings)
        solution = replace(solution, h=added(free.h, moved))
        weight = active / beta
        gradients = energy.contrast((solution.state, solution.h), (free.a, free.h), weight, free.contrasted())
        response = relative_response(moved, free.h)
        statistics = replace(Statistics.of(solution), beta=beta, response=response)
        return Estimate(gradients, statistics, solution)


@dataclass(frozen=True, kw_only=True)
class Centered(Paired):
    r"""Two nudged phases of opposite sign (Laborieux et al. 2021):
    :math:`\tfrac1{2\beta}[\partial_\theta E(h^{\beta}) - \partial_\theta E(h^{-\beta})]`, error :math:`O(\beta^2)`.

    Both phases run as one batch of 2B from the free equilibrium and stop when their difference has settled. A unit that
    crosses a kink costs the second order. Where :math:`\|h^+ + h^- - 2h^0\|/\|h^+ - h^-\|` exceeds ``asym_limit``, that
    example is run again at half its beta, and keeps the run of smaller asymmetry.
    """

    name: ClassVar[str] = "centered"

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        pair = self.calibrated(free, nudge, record)
        (a1, a2), (h1, h2) = halves(pair.solution.state), halves(pair.solution.h)
        weight = 0.5 * pair.active / pair.beta
        gradients = _energy(free).contrast((a1, h1), (a2, h2), weight, free.contrasted())
        return Estimate(gradients, pair.statistics(), pair.solution)

    def pair(self, free: FreePhase, nudge: Nudge, beta: Tensor, active: Tensor, record: bool) -> Solution:
        both = stacked(free.a, free.a), stacked(free.h, free.h)
        force, extra = self.force(twice(nudge), both[1], torch.cat([beta, -beta]))
        problem = Relaxation(free.dynamics, repeated(free.bindings, 2), force, extra, origin=both)
        return self.relax(problem, both, free, pair_difference, active, record)


@dataclass(frozen=True, kw_only=True)
class Holomorphic(Contrastive):
    r"""Cauchy's formula over complex nudges (Laborieux and Zenke 2022), error :math:`O(r^M)`.

    .. math:: \partial_\beta\partial_\theta E|_0 \approx \frac1M\sum_k\frac{\partial_\theta E(h^{\beta_k})}{\beta_k},
              \quad \beta_k = r\,e^{i\pi(2k+1)/M}

    Points come in conjugate pairs, of which only one each is relaxed. Needs analytic activations and couplings.

    Args:
        beta: the radius r; the relative response of each example with ``nudge="relative"``.
        points: M, even and at least 2.
    """

    name: ClassVar[str] = "holomorphic"
    usual: ClassVar[float] = 0.02
    tolerance: float = 1e-3
    points: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            "Holomorphic",
            "points",
            self.points,
            self.points >= 2 and self.points % 2 == 0,
            "even and >= 2",
            "try 4",
        )
        require(
            "Holomorphic",
            "nudge",
            self.nudge,
            self.nudge != "cost",
            "'relative' or 'absolute'",
            "a cost is not analytic",
        )

    def supports(self, dynamics: Dynamics) -> Support:
        base = super().supports(dynamics)
        if not base or not isinstance(dynamics, Energy):
            return base
        kinked = [n for n in dynamics.names if not dynamics.activation(n).analytic]
        if kinked:
            return Support(
                False,
                f"Holomorphic needs analytic activations, and {kinked} have kinks; use tanh or Centered",
            )
        terms = sorted({type(c).__name__ for _, c in dynamics.terms() if not c.analytic})
        if terms:
            return Support(False, f"Holomorphic needs analytic couplings, and {terms} are not; use Centered")
        return Support(True)

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        energy = _energy(free)
        v = nudge.cotangent(free.h)
        radius = self.betas(free, v)
        real = radius.dtype
        wide = torch.complex128 if real == torch.float64 else torch.complex64
        count = self.points // 2
        angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / self.points) + math.pi / self.points
        unit = torch.polar(torch.ones_like(angles), angles).to(dtype=wide, device=radius.device)
        beta = (unit[:, None] * radius.to(wide)).flatten()
        start, start_h = ({n: torch.cat([t] * count).to(wide) for n, t in part.items()} for part in (free.a, free.h))
        force = scaled({n: torch.cat([t] * count).to(wide) for n, t in v.items()}, -beta)
        problem = Relaxation(energy, cast(repeated(free.bindings, count), wide), force, origin=(start, start_h))
        active = self.active(v)
        solution = self.relax(problem, (start, start_h), free, displacement_from(start), active, record)
        weight = 2 * active.repeat(count) / (self.points * beta)
        gradients = self._cauchy(energy, solution, weight, free.bindings, count, wide)
        size = radius.shape[0]

        def fold(t: Tensor) -> Tensor:
            return t.view(count, size)

        statistics = Statistics(
            fold(solution.steps).amax(0),
            fold(solution.residual).amax(0),
            fold(solution.converged).all(0),
            beta=radius,
        )
        return Estimate(gradients, statistics, solution)

    @staticmethod
    def _cauchy(
        energy: Energy, solution: Solution, weight: Tensor, bindings: Bindings, count: int, wide: torch.dtype
    ) -> list[Tensor | None]:
        flat = [t.detach() for t in leaves(bindings)]
        flat = [t.requires_grad_() if t.is_floating_point() else t for t in flat]
        with torch.enable_grad():
            bound = cast(repeated(with_leaves(bindings, flat), count), wide)
            part = energy.coupling(solution.h, bound)
            for n in energy.names:
                if bound[f"node_{n}"].shared:
                    part = part + energy.activation(n).potential(solution.state[n], bound[f"node_{n}"])
            total = -(weight * part).real.sum()
        wanted = [t for t in flat if t.requires_grad]
        grads = iter(torch.autograd.grad(total, wanted, allow_unused=True))
        return [next(grads) if t.requires_grad else None for t in flat]
