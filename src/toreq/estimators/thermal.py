"""Contrasts of laws: Equilibrium Propagation at a temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from toreq.core.energy import Dynamics, Energy
from toreq.core.state import State, added, difference, halves, norm, repeated, scaled, stacked
from toreq.errors import ConfigError
from toreq.estimators.base import Contrastive, Estimate, Estimator, FreePhase, Nudge, Statistics, Support
from toreq.estimators.pairs import relative_response
from toreq.options import check_types
from toreq.solvers.base import Solver, require
from toreq.solvers.langevin import Langevin, unsampled
from toreq.solvers.problem import Relaxation, relative
from toreq.solvers.solution import Solution


@dataclass(frozen=True)
class ThermalStatistics(Statistics):
    r"""Statistics of two nudged chains; ``residual`` is the relative distance of the response's means over the samples'
    two halves, and ``temperature_gradient`` :math:`\partial\langle C\rangle/\partial\tau` ``(B,)`` if asked for."""

    temperature_gradient: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Thermal(Estimator):
    r"""The contrast of two nudged laws (Scellier and Bengio 2017, in their stochastic framework).

    .. math:: \partial_\theta\langle C\rangle \approx \tfrac1{2\beta}\big[\langle\partial_\theta E\rangle_{\beta} -
              \langle\partial_\theta E\rangle_{-\beta}\big], \qquad
              \langle\cdot\rangle_{\pm\beta} \text{ under } \exp(-(E \pm \beta C)/\tau)

    with :math:`C = \langle v, h\rangle`, whose mean is the cost of the mean read-out to first order; the mean of the
    energy's gradients is not the gradient at the mean state. Since :math:`\partial_\beta\langle G\rangle_\beta =
    -\tfrac1\tau\mathrm{Cov}(G, C)` for every G, this is :math:`-\tfrac1\tau\mathrm{Cov}(\partial_\theta E, C)`, with an
    error of second order in beta, the bias of the chain's step, and that of sampling. Both chains start at the free
    chain's last state, run as one batch of 2B, and get the same noise: what they have in common then cancels sample by
    sample, and the standard deviation stays bounded as beta falls, where it grows like :math:`1/\beta` with noise of
    their own. Needs a layer whose solver is :class:`~toreq.solvers.Langevin` with ``mode="sample"``.

    Args:
        beta: the nudge's size, above 0; 0.05 when None. With ``nudge="relative"`` (default) what the force of each
            example alone moves is that share of the size of its activations, :math:`\beta_b\|g v_b\| = \beta\|h_b\|`,
            g being the nodes' slopes; with ``"absolute"`` the force is :math:`\mp\beta v` with v as received.
        nudge: ``"relative"`` or ``"absolute"``.
        burn_in: steps of the nudged chains before their first sample; those of the free chain when None.
        samples: of each nudged chain; as many as the free chain's when None.
        temperature_gradient: also estimate :math:`\partial\langle C\rangle/\partial\tau =
            -\tfrac1\tau\,\partial_\beta\langle E\rangle_\beta` per example, for
            ``last.nudged.temperature_gradient``: with the loss of a batch as C its sum is the loss's derivative, by
            which a temperature can be learnt.
        common: give both chains the same noise; without, only to see what that saves.
    """

    name: ClassVar[str] = "thermal"
    usual: ClassVar[float] = 0.05
    beta: float | None = None
    nudge: Literal["relative", "absolute"] = "relative"
    burn_in: int | None = None
    samples: int | None = None
    temperature_gradient: bool = False
    common: bool = True

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        check_types("Thermal", values, {f.name: str(f.type) for f in fields(self)})
        ok = self.beta is None or 0 < self.beta < math.inf
        require("Thermal", "beta", self.beta, ok, "None or > 0", "try 0.05")
        modes = ("relative", "absolute")
        remedy = "a cost of the moving state has another mean than that of the mean state"
        require("Thermal", "nudge", self.nudge, self.nudge in modes, f"one of {modes}", remedy)
        ok = self.burn_in is None or self.burn_in >= 0
        require("Thermal", "burn_in", self.burn_in, ok, "None or >= 0", "leave it None")
        ok = self.samples is None or self.samples >= 2
        require("Thermal", "samples", self.samples, ok, "None or >= 2", "leave it None")

    def supports(self, dynamics: Dynamics) -> Support:
        reason = unsampled(dynamics)
        return Support(False, f"Thermal contrasts laws: {reason}") if reason else Support(True)

    def accepts(self, solver: Solver) -> Support:
        if isinstance(solver, Langevin) and solver.sampling():
            return Support(True)
        found = f"{type(solver).__name__}" + (f"(mode={solver.mode!r})" if isinstance(solver, Langevin) else "")
        return Support(
            False, f"Thermal contrasts laws, which {found} does not sample; use Langevin(mode='sample'), or Centered"
        )

    def betas(self, free: FreePhase, v: State) -> Tensor:
        """Beta of each example, ``(B,)``, always above 0."""
        first = next(iter(free.a.values()))
        size = self.usual if self.beta is None else self.beta
        if self.nudge == "absolute":
            return torch.full((first.shape[0],), size, dtype=first.dtype, device=first.device)
        # the size of a sample: the mean over a symmetric law is small, its response is not
        moved = {n: free.dynamics.activation(n).gain * t for n, t in v.items()}
        beta = size * norm(free.dynamics.activate(free.a, free.bindings)) / norm(moved)
        return torch.where(torch.isfinite(beta) & (beta > 0), beta, torch.ones_like(beta))

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        support = self.accepts(free.solver)
        if not support:
            raise ConfigError(f"Thermal: expected a solver that samples a law; {support.reason}")
        v = nudge.cotangent(free.h)
        beta, active = self.betas(free, v), Contrastive.active(v)
        found = _Contrast(free, beta, active, self._chain(free.solver), self.temperature_gradient)
        found.run(scaled(v, beta))
        return Estimate(found.gradients, found.statistics(), found.solution())

    def _chain(self, solver: Solver) -> Langevin:
        assert isinstance(solver, Langevin)
        burn_in = solver.burn_in if self.burn_in is None else self.burn_in
        samples = solver.samples if self.samples is None else self.samples
        return replace(
            solver,
            burn_in=burn_in,
            samples=samples,
            max_steps=max(solver.max_steps, burn_in + samples * solver.thin),
            # the free chain has reached the law's own temperature
            schedule="constant",
            start_temperature=None,
            copies=2 * solver.copies if self.common else solver.copies,
        )


class _Contrast:
    """Two nudged chains under way: what their samples so far have given."""

    def __init__(self, free: FreePhase, beta: Tensor, active: Tensor, chain: Langevin, energies: bool) -> None:
        assert isinstance(free.dynamics, Energy)
        self.free, self.energy, self.chain, self.energies = free, free.dynamics, chain, energies
        self.beta, self.active = beta, active
        self.bindings, self.both = free.contrasted(), repeated(free.bindings, 2)
        self.weight = 0.5 * active / (beta * chain.samples)
        self.gradients: list[Tensor | None] = []
        self.means: list[State] = [{}, {}]  # of the stacked activations, over the samples' halves
        self.apart = torch.zeros_like(beta)
        self.last: State = {}

    def run(self, push: State) -> None:
        """Run the chains under the forces -push and +push."""
        force = stacked({n: -t for n, t in push.items()}, push)
        problem = Relaxation(self.energy, self.both, force)
        start = stacked(self.free.a, self.free.a)
        first = self.chain.samples // 2
        for k, (a, h) in enumerate(self.chain.sample(problem, start, stable=True)):
            self._add(a, h)
            late = int(k >= first)
            share = 1 / (self.chain.samples - first if late else first)
            self.means[late] = added(self.means[late], {n: share * t for n, t in h.items()})
            self.last = a

    def _add(self, a: State, h: State) -> None:
        (a1, a2), (h1, h2) = halves(a), halves(h)
        new = self.energy.contrast((a1, h1), (a2, h2), self.weight, self.bindings)
        old = self.gradients or [None] * len(new)
        self.gradients = [n if o is None else o if n is None else o + n for o, n in zip(old, new, strict=True)]
        if self.energies:
            e = self.energy(a, self.both)
            self.apart += e[: self.beta.shape[0]] - e[self.beta.shape[0] :]

    def _responses(self) -> tuple[State, State]:
        first, second = (difference(*halves(m)) for m in self.means)
        return first, second

    def statistics(self) -> ThermalStatistics:
        first, second = self._responses()
        mean = {n: 0.5 * (t + second[n]) for n, t in first.items()}
        residual = relative(difference(first, second), mean)
        steps = torch.full_like(self.active, self.chain.steps, dtype=torch.int64)
        gradient = None
        if self.energies:
            gradient = -self.weight * self.apart / self.chain.temperature
        return ThermalStatistics(
            steps,
            residual,
            torch.isfinite(residual),
            beta=self.beta,
            response=relative_response({n: 0.5 * t for n, t in mean.items()}, self.free.h),
            temperature_gradient=gradient,
        )

    def solution(self) -> Solution:
        """The chains' last state, and the means of their activations."""
        first = self.chain.samples // 2
        shares = first / self.chain.samples, 1 - first / self.chain.samples
        h = {n: shares[0] * t + shares[1] * self.means[1][n] for n, t in self.means[0].items()}
        s = self.statistics()
        return Solution(self.last, h, s.steps.repeat(2), s.residual.repeat(2), s.converged.repeat(2))
