"""One nudged phase of a prediction-error energy, in error coordinates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from toreq.core.couplings import Only
from toreq.core.energy import Dynamics, Energy
from toreq.core.residual import Linearised, Residual, forward_order
from toreq.core.state import Bindings, State, added, chosen, difference, norm, per_example, scaled, stacked
from toreq.errors import DivergenceError
from toreq.estimators.base import Contrastive, Estimate, FreePhase, Nudge, Statistics, Support
from toreq.estimators.pairs import relative_response
from toreq.solvers.base import require
from toreq.solvers.fixed_point import FixedPoint
from toreq.solvers.problem import Relaxation, only_active, relative
from toreq.solvers.solution import Solution, Trace

DIVERGED = 0.1
"""Relative residual of a state above which the gradient formula, which takes h = f(h), has no meaning."""

Gradients = dict[str, dict[str, Tensor]]


class _Levels:
    """The blocks of a prediction-error energy bound to a batch."""

    def __init__(self, energy: Energy, bindings: Bindings) -> None:
        self.energy, self.bindings, self.names = energy, bindings, energy.names
        self.terms = {c.node: (name, c) for name, c in energy.terms() if isinstance(c, Residual)}
        self.order = forward_order([c for _, c in self.terms.values()])

    def linearised(self, h: State) -> dict[str, Linearised]:
        return {n: c.linearised(h, self.bindings[name]) for n, (name, c) in self.terms.items()}


@dataclass
class _Found:
    """Errors at given states: the gradient they give, the predictions there, and how well they have settled."""

    eps: State
    predicted: State
    gradients: Gradients
    residual: Tensor
    steps: Tensor


class _Adjoint:
    r"""The errors alone, :math:`\epsilon\leftarrow J^\top\epsilon - \beta v`, the blocks linearised at given states."""

    def __init__(self, levels: _Levels, at: dict[str, Linearised], force: State) -> None:
        self.levels, self.at, self.force = levels, at, force
        self.readers: dict[str, list[str]] = {n: [] for n in levels.names}
        for n, (_, c) in levels.terms.items():
            if c.source is not None:
                self.readers[c.source].append(n)

    def activate(self, a: State, only: Only = None) -> State:
        return {n: t for n, t in a.items() if only is None or n in only}

    def field(self, h: State, only: Only = None) -> State:
        out: State = {}
        for n in self.levels.names if only is None else only:
            total = self.force[n] if n in self.force else torch.zeros_like(h[n])
            for reader in self.readers[n]:
                message, _ = self.at[reader].back(h[reader], message=True, gradient=False)
                assert message is not None
                total = total + message
            out[n] = total
        return out

    def colours(self) -> list[frozenset[str]]:
        # errors travel against the predictions
        return [frozenset([n]) for n in reversed(self.levels.names)]

    def eliminable(self) -> frozenset[str]:
        return frozenset()

    def energy(self, a: State, h: State) -> Tensor | None:
        return None


class _Synchronous:
    r"""Errors and states together: :math:`\epsilon \leftarrow J(h)^\top\epsilon - \beta v,\ h \leftarrow f(h) +
    \epsilon`."""

    def __init__(self, levels: _Levels, force: State) -> None:
        self.levels, self.force = levels, force

    def activate(self, a: State, only: Only = None) -> State:
        return {n: t for n, t in a.items() if only is None or n in only}

    def field(self, h: State, only: Only = None) -> State:
        state, eps = _part(h, "h"), _part(h, "eps")
        at = self.levels.linearised(state)
        field = _Adjoint(self.levels, at, self.force).field(eps)
        out = {f"eps_{n}": t for n, t in field.items()} | {f"h_{n}": at[n].out + eps[n] for n in self.levels.names}
        return out if only is None else {n: t for n, t in out.items() if n in only}

    def colours(self) -> list[frozenset[str]]:
        return [frozenset(f"{kind}_{n}" for kind in ("eps", "h") for n in self.levels.names)]

    def eliminable(self) -> frozenset[str]:
        return frozenset()

    def energy(self, a: State, h: State) -> Tensor | None:
        return None


def _part(state: State, kind: str) -> State:
    return {n.removeprefix(f"{kind}_"): t for n, t in state.items() if n.startswith(f"{kind}_")}


def _joint(eps: State, h: State) -> State:
    return {f"eps_{n}": t for n, t in eps.items()} | {f"h_{n}": t for n, t in h.items()}


def _both_relative(r: State, a: State) -> Tensor:
    """Each equation's residual relative to its own variable, the larger of the two."""
    return torch.maximum(relative(_part(r, "eps"), _part(a, "eps")), relative(_part(r, "h"), _part(a, "h")))


@dataclass(frozen=True, kw_only=True)
class Predictive(Contrastive):
    r"""One nudged phase of :math:`E = \tfrac12\sum_l\|h_l - f_l(h_{l-1}; x)\|^2` (cf. Rao and Ballard 1999;
    Whittington and Bogacz 2017).

    .. math:: \epsilon \leftarrow J(h)^\top\epsilon - \beta v, \qquad h \leftarrow f(h) + \epsilon, \qquad
              \partial_\theta C \approx -\tfrac1\beta\sum_l\epsilon_l^\top\partial_\theta f_l(h_{l-1})

    At the free equilibrium E and its gradient vanish, so one phase gives the gradient for any block. The errors are
    variables of their own, so a tiny beta loses no digits; as :math:`\beta\to0` this is the adjoint recursion done by
    local error nodes. With ``schedule="sweep"`` errors settle at the present states (on a chain by one sweep against
    the order of the forward pass), then the states move by them, and so on until both equations hold to ``tolerance``,
    each relative to its own variable. Where the errors are smaller than ``tolerance`` times the state that is so at
    once, and the states are left where they are. ``"synchronous"`` updates all error and state nodes together, damped
    like the free phase: on a chain of L levels it ends after at most 2L steps.

    Args:
        beta: aimed size of the errors relative to the state with ``nudge="relative"``; there rounded to a power of two,
            so that multiplying and dividing by it is exact.
        two_sided: take the mean of a phase at +beta and one at -beta: the error is then :math:`O(\beta^2)`.
        schedule: ``"sweep"`` or ``"synchronous"``.
    """

    name: ClassVar[str] = "predictive"
    beta: float = 1e-6
    tolerance: float = 1e-4
    two_sided: bool = False
    schedule: Literal["sweep", "synchronous"] = "sweep"

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
        schedules = ("sweep", "synchronous")
        require("Predictive", "schedule", self.schedule, self.schedule in schedules, f"one of {schedules}", "choose")

    def supports(self, dynamics: Dynamics) -> Support:
        if isinstance(dynamics, Energy) and dynamics.predictive:
            return Support(True)
        return Support(
            False,
            "Predictive needs a pure prediction-error energy, in which every node is predicted by one Residual and "
            "nothing else; use Centered, or build the network of Residual couplings",
        )

    def reach(self, free: FreePhase, v: State) -> Tensor:
        # the errors themselves are about to be computed, and are then brought to the aimed size
        return norm(v)

    def betas(self, free: FreePhase, v: State) -> Tensor:
        beta = super().betas(free, v)
        return beta if self.nudge != "relative" else torch.exp2(torch.floor(torch.log2(beta)))

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        energy = free.dynamics
        assert isinstance(energy, Energy)
        v = nudge.cotangent(free.h)
        beta, active = self.betas(free, v), self.active(v)
        levels = _Levels(energy, free.bindings)
        solution, grads, beta = self._phase(levels, free, v, beta, active, record)
        if self.two_sided:
            other, more, _ = self._phase(levels, free, v, -beta, active, record)
            grads = {name: {k: 0.5 * (g + more[name][k]) for k, g in part.items()} for name, part in grads.items()}
            solution = _pair(solution, other)
        return self._estimate(free, beta, solution, grads)

    @staticmethod
    def _estimate(free: FreePhase, beta: Tensor, solution: Solution, grads: Gradients) -> Estimate:
        flat = [
            grads.get(name, {}).get(k)
            for name, b in free.bindings.items()
            for group in (b.shared, b.batched)
            for k in group
        ]
        size = beta.shape[0]
        # the errors are what moves the states
        eps = {n: t[:size] for n, t in _part(solution.h, "eps").items()}
        response = relative_response(eps, free.h)
        folded = Statistics(
            solution.steps.view(-1, size).amax(0),
            solution.residual.view(-1, size).amax(0),
            solution.converged.view(-1, size).all(0),
            beta=beta,
            response=response,
        )
        return Estimate(flat, folded, solution)

    def _phase(
        self, levels: _Levels, free: FreePhase, v: State, beta: Tensor, active: Tensor, record: bool
    ) -> tuple[Solution, Gradients, Tensor]:
        force = scaled(v, -beta)
        if self.schedule == "synchronous":
            return self._synchronous(levels, free, force, beta, active, record)
        return self._alternating(levels, free, force, beta, active, record)

    def _synchronous(
        self, levels: _Levels, free: FreePhase, force: State, beta: Tensor, active: Tensor, record: bool
    ) -> tuple[Solution, Gradients, Tensor]:
        start = _joint({n: torch.zeros_like(t) for n, t in free.h.items()}, free.h)
        damping = getattr(free.solver, "damping", 1.0)
        jacobi = FixedPoint(damping=damping, max_steps=free.solver.max_steps)
        problem = _Synchronous(levels, force)
        solution = self.relax(problem, (start, start), replace(free, solver=jacobi), _both_relative, active, record)
        at = levels.linearised(_part(solution.h, "h"))
        return solution, _gradients(levels, at, _part(solution.h, "eps"), beta), beta

    def _alternating(
        self, levels: _Levels, free: FreePhase, force: State, beta: Tensor, active: Tensor, record: bool
    ) -> tuple[Solution, Gradients, Tensor]:
        most = self.max_steps or free.solver.max_steps
        h, turn, log = free.h, 1, []
        found = self._errors(levels, free, h, force, active, None, beta)
        self._watch(levels, found, h)
        if self.nudge == "relative":
            # what the read-out gets may have grown on its way down; at given states errors are linear in beta
            factor = self._shrink(found.eps, h)
            force, beta = scaled(force, factor), beta * factor
            found = replace(found, eps=scaled(found.eps, factor))
        # a free state is its own prediction, so that what it still owes is the errors
        owed, steps = found.eps, found.steps
        done = torch.zeros_like(active)
        while True:
            # an example that no nudge reaches owes nothing
            residual = torch.maximum(found.residual, torch.where(active, relative(owed, h), 0.0))
            log.append(residual)
            done = done | (residual <= self.tolerance) if self.tolerance > 0 else done
            if turn == most or bool(done.all() | ~torch.isfinite(residual).all()):
                break
            h = self._states(free, h, found.eps, done)
            found = self._errors(levels, free, h, force, active, found.eps, beta)
            owed = difference(added(found.predicted, found.eps), h)
            steps = steps + torch.where(done, 0, 1 + found.steps)
            turn += 1
        joint = _joint(found.eps, h)
        trace = Trace(torch.stack(log), None) if record else None
        solution = Solution(joint, joint, steps, residual, residual <= self.tolerance, trace)
        return solution, found.gradients, beta

    def _shrink(self, eps: State, h: State) -> Tensor:
        """The power of two, at most 1, that brings the errors down to the aimed size."""
        factor = torch.exp2(torch.floor(torch.log2(self.beta * norm(h) / norm(eps))))
        return torch.where(torch.isfinite(factor), factor, torch.ones_like(factor)).clamp_max(1)

    def _errors(
        self,
        levels: _Levels,
        free: FreePhase,
        h: State,
        force: State,
        active: Tensor,
        before: State | None,
        beta: Tensor,
    ) -> _Found:
        if levels.order is not None:
            return _swept(levels, h, force, beta, keep=before is not None)
        at = levels.linearised(h)
        zero = {n: torch.zeros_like(t) for n, t in h.items()}
        start = {**zero, **force} if before is None else before
        solver = replace(free.solver, tolerance=self.tolerance, max_steps=self.max_steps or free.solver.max_steps)
        measure = relative if bool(active.all()) else only_active(relative, active)
        found = solver.solve(_Adjoint(levels, at, force), start, measure, h=start)
        predicted = {n: term.out for n, term in at.items()}
        return _Found(found.h, predicted, _gradients(levels, at, found.h, beta), found.residual, found.steps)

    def _states(self, free: FreePhase, h: State, eps: State, done: Tensor) -> State:
        """The states moved by the errors; those of examples that are done stay."""
        problem = Relaxation(free.dynamics, free.bindings, eps, as_map=True)
        # below the solver's own tolerance, or the free phase's remaining residual would be taken for a response
        solver = replace(free.solver, tolerance=min(self.tolerance, free.solver.tolerance))
        moved = solver.solve(problem, h, h=h).h
        return chosen(done, h, moved)

    @staticmethod
    def _watch(levels: _Levels, found: _Found, h: State) -> None:
        """A loop that has run away is an error, not a gradient."""
        if levels.order is not None:
            return
        free = relative(difference(found.predicted, h), h)
        bad = ~(torch.maximum(free, found.residual) <= DIVERGED)
        if 2 * int(bad.sum()) > bad.shape[0]:
            raise DivergenceError(
                f"Predictive: expected a loop that settles, got {int(bad.sum())} of {bad.shape[0]} examples whose "
                f"states or errors still change by more than {DIVERGED:.0%} after their last step; the blocks do not "
                "contract: lower their scale, bound their norm, damp the solver or give it more steps"
            )


def _swept(levels: _Levels, h: State, force: State, beta: Tensor, keep: bool) -> _Found:
    """Errors of a chain at given states, and what they give, in one sweep against the forward order; predictions only
    if they are to be kept."""
    assert levels.order is not None
    # in units of -beta, a power of two, so that the way back is exact: what travels then are the adjoint's numbers, and
    # the gradient needs no other pass
    pending = scaled(force, -1 / beta)
    eps, predicted, grads = {}, {}, {}
    for n in reversed(levels.order):
        name, c = levels.terms[n]
        cotangent = pending.pop(n) if n in pending else torch.zeros_like(h[n])
        at = c.linearised(h, levels.bindings[name])
        message, grads[name] = at.back(cotangent, message=True, gradient=True)
        eps[n] = cotangent * per_example(-beta, cotangent)
        if keep:
            predicted[n] = at.out
        if message is not None:
            assert c.source is not None
            pending[c.source] = pending[c.source] + message if c.source in pending else message
    residual = torch.zeros_like(beta)
    return _Found({n: eps[n] for n in levels.names}, predicted, grads, residual, torch.ones_like(beta).long())


def _gradients(levels: _Levels, at: dict[str, Linearised], eps: State, beta: Tensor) -> Gradients:
    r""":math:`-\tfrac1\beta\,\epsilon_l^\top\partial_\theta f_l`, block by block, from the error of the level that it
    predicts and the state of the level that it reads."""
    cotangent = scaled(eps, -1 / beta)
    return {name: at[n].back(cotangent[n], message=False, gradient=True)[1] for n, (name, _) in levels.terms.items()}


def _pair(first: Solution, second: Solution) -> Solution:
    """The phase at +beta stacked on the one at -beta."""
    trace = None
    if first.trace is not None and second.trace is not None:
        short = min(first.trace.residual.shape[0], second.trace.residual.shape[0])
        trace = Trace(torch.cat([first.trace.residual[:short], second.trace.residual[:short]], 1), None)
    both = stacked(first.h, second.h)
    steps = torch.cat([first.steps, second.steps])
    residual = torch.cat([first.residual, second.residual])
    return Solution(both, both, steps, residual, torch.cat([first.converged, second.converged]), trace)
