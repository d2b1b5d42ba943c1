"""One pass in node order, for networks in which no node reads a later one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from toreq.core.prediction import PredictionEnergy
from toreq.core.state import State
from toreq.solvers.anderson import Anderson
from toreq.solvers.fixed_point import FixedPoint
from toreq.solvers.problem import Measure, Problem, Relaxation, relative
from toreq.solvers.solution import Solution, Step, Trace


@dataclass(frozen=True, kw_only=True)
class Forward(FixedPoint):
    """The forward pass of a chain of predictions: one sweep, in which each level is computed once from settled ones.

    The sweep ends exactly at the equilibrium, so its residual is zero and nothing is iterated. Other problems are
    relaxed: nudged phases of the whole energy, whose plain iteration does not contract on a chain, by
    :class:`~toreq.solvers.Anderson` over ten iterates; rings, and the linear problem of an adjoint, which ends after as
    many steps as there are levels, as by :class:`~toreq.solvers.FixedPoint`.
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
        network = problem.dynamics if isinstance(problem, Relaxation) and problem.extra is None else None
        if not isinstance(network, PredictionEnergy) or network.order is None:
            return super().solve(problem, a, measure, callback, record, h)
        assert isinstance(problem, Relaxation)
        if not problem.as_map:
            joint = Anderson(length=10, max_steps=self.max_steps, tolerance=self.tolerance, compaction=self.compaction)
            return joint.solve(problem, a, measure, callback, record, h)
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
