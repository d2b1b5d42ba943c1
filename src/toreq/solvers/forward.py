"""One pass in node order, for networks in which no node reads a later one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from toreq.core.couplings import Only
from toreq.core.prediction import PredictionEnergy
from toreq.core.state import State, added
from toreq.solvers.anderson import Anderson
from toreq.solvers.fixed_point import FixedPoint
from toreq.solvers.problem import Measure, Problem, Relaxation, relative
from toreq.solvers.solution import Solution, Step, Trace


class _ErrorCoordinates:
    """A nudged chain as a map of its states; their activations are the identity."""

    def __init__(self, problem: Relaxation, network: PredictionEnergy) -> None:
        self.problem, self.network = problem, network

    def activate(self, a: State, only: Only = None) -> State:
        return {n: t for n, t in a.items() if only is None or n in only}

    def field(self, h: State, only: Only = None) -> State:
        force, bindings = self.problem.static, self.problem.bindings
        if self.problem.extra is not None:
            force = added(force, self.problem.extra(h))
        out = self.network.forward_from(self.network.errors(h, bindings, force), bindings)
        return out if only is None else {n: out[n] for n in only}

    def colours(self) -> list[frozenset[str]]:
        return [frozenset(self.network.names)]

    def eliminable(self) -> frozenset[str]:
        return frozenset()

    def energy(self, a: State, h: State) -> Tensor | None:
        return self.problem.energy(a, h)

    def selected(self, index: Tensor) -> _ErrorCoordinates | None:
        part = self.problem.selected(index)
        return None if part is None else _ErrorCoordinates(part, self.network)


@dataclass(frozen=True, kw_only=True)
class Forward(FixedPoint):
    r"""The forward pass of a chain of predictions: one sweep, in which each level is computed once from settled ones.

    The sweep ends exactly at the equilibrium, so its residual is zero and nothing is iterated. Nudged phases of the
    whole energy, whose plain iteration does not contract on a chain, are solved in error coordinates: in every step

    .. math:: \epsilon_l = J_{l+1}(h_l)^\top\epsilon_{l+1} + F_l, \qquad h_l \leftarrow f_l(h_{l-1}) + \epsilon_l

    for forces F, the errors in one sweep down and the states in one sweep up, a map over which
    :class:`~toreq.solvers.Anderson` extrapolates. Other problems are relaxed as by :class:`~toreq.solvers.FixedPoint`:
    rings, and the linear problem of an adjoint, which ends after as many steps as there are levels.
    """

    def solve(
        self,
        problem: Problem,
        a: State,
        measure: Measure = relative,
        callback: Callable[[Step], None] | None = None,
        record: bool | str = False,
        h: State | None = None,
    ) -> Solution:
        if not isinstance(problem, Relaxation):
            return super().solve(problem, a, measure, callback, record, h)
        network = problem.dynamics
        if not isinstance(network, PredictionEnergy) or network.order is None or (problem.as_map and problem.extra):
            return super().solve(problem, a, measure, callback, record, h)
        if not problem.as_map:
            joint = Anderson(max_steps=self.max_steps, tolerance=self.tolerance, compaction=self.compaction)
            return joint.solve(_ErrorCoordinates(problem, network), a, measure, callback, record, h)
        state: State = {}
        for n in network.order:
            state.update(problem.field(state, frozenset([n])))
        state = {n: state[n] for n in network.names}
        first = state[network.names[0]]
        size, device = first.shape[0], first.device
        # an overflow must be seen: zero times infinity is nan
        last = state[network.order[-1]]
        residual = (0 * last.detach()).abs().flatten(1).amax(1)
        if callback is not None:
            callback(Step(1, state, state, residual))
        trace = self._trace(problem, a, state, residual, record) if record else None
        steps = torch.ones(size, dtype=torch.int64, device=device)
        return Solution(state, state, steps, residual, torch.isfinite(residual), trace)

    @staticmethod
    def _trace(problem: Problem, a: State, state: State, residual: Tensor, record: bool | str) -> Trace:
        """Before the sweep and after it."""
        start = relative({n: t - a[n] for n, t in state.items()}, a)
        energies = [problem.energy(s, s) for s in (a, state)]
        known = [e for e in energies if e is not None]
        states = [dict(a), dict(state)] if record == "states" else None
        return Trace(torch.stack([start, residual]), torch.stack(known) if known else None, states)
