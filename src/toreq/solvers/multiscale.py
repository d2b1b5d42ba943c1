"""Coarse-to-fine settling of networks whose nodes lie on levels of different resolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from toreq.core.state import State
from toreq.solvers.anderson import Anderson, _flatten, _History, _unflatten
from toreq.solvers.base import require
from toreq.solvers.problem import Joint, Layered, Measure, Problem, relative
from toreq.solvers.solution import Solution, Step
from toreq.solvers.springs import Chain, chains, settle_chain

Blocks = list[frozenset[str]]


@dataclass
class _Plan(_History):
    """What Anderson carries, the order of the sweep, and the state that the latest sweep led to."""

    blocks: list[Blocks] | None = None  # by level, the coarsest first
    chains: list[Chain] | None = None  # nodes that springs join, updated together after the blocks
    stiffness: State | None = None
    swept: tuple[State, State] | None = None


@dataclass(frozen=True, kw_only=True)
class CoarseToFine(Anderson):
    r"""Block sweeps over the levels of a pyramid from coarse to fine, with springs treated implicitly.

    One step updates the coarsest level first and the finest last (on each level one colour of its nodes after the
    other), every update reading what the step has moved already. A node that springs pull by :math:`-s h` is updated to
    the solution of

    .. math:: a + s\,\sigma(a) = f(h) + s h

    instead of f, so that springs of any strength are stable without damping. With ``joint`` the nodes that springs join
    are updated on all levels at once, to the solution of :math:`a + S\,\sigma(a) = f(h) + S h` with the springs' whole
    curvature S: how fast a step contracts then hardly depends on their strength. The step as a whole is the map that
    Anderson's method extrapolates; nodes that can be recomputed from all others are left out of it, as in
    :class:`~toreq.solvers.Anderson`. The equilibrium is that of any other solver. Without levels and springs this is
    the ordinary block sweep.

    Args:
        accelerated: extrapolate over the sweep; else take the sweeps as they are.
        implicit: treat springs implicitly; else as any other coupling, which needs damping where they are stiff.
        joint: solve replicating springs on all levels at once.
        rounds: most linearisations of that solve per step, at least 1.
        nested: sweeps of the levels l to L, for every l from the coarsest to the second finest, before a free phase's
            first step; 0 for none.
        coarse_sweeps: sweeps of each coarser level before the next finer one is visited, at least 1.
        level_damping: mixing in (0, 1] per level, the finest first; the last value stands for all coarser ones.
    """

    length: int = 5
    accelerated: bool = True
    implicit: bool = True
    joint: bool = True
    rounds: int = 3
    nested: int = 0
    coarse_sweeps: int = 1
    level_damping: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("rounds", 1), ("coarse_sweeps", 1), ("nested", 0)):
            value = getattr(self, name)
            require("CoarseToFine", name, value, value >= least, f"an integer >= {least}", f"try {least or 1}")
        given = self.level_damping
        ok = isinstance(given, tuple) and len(given) > 0 and all(0 < d <= 1 for d in given)
        require("CoarseToFine", "level_damping", given, ok, "numbers in (0, 1]", "use (1.0,)")

    def begin(self, problem: Problem, a: State, h: State) -> _Plan:
        history = super().begin(problem, a, h)
        plan = _Plan(**{f.name: getattr(history, f.name) for f in fields(history)})
        layered = isinstance(problem, Layered)
        levels = problem.levels() if layered else [frozenset(a)]
        plan.stiffness = problem.stiffness() if layered and self.implicit else {}
        plan.chains = chains(problem) if self.implicit and self.joint and isinstance(problem, Joint) else []
        joined = frozenset(n for c in plan.chains for n in c.nodes)
        groups = [plan.eliminated, *(c - plan.eliminated - joined for c in problem.colours())]
        plan.blocks = [[g & level for g in groups if g & level] for level in reversed(levels)]
        return plan

    def checked(self, carry: Any, old: tuple[State, State], new: tuple[State, State]) -> tuple[State, State]:
        # the residual was measured inside the sweep: what the sweep led to is nearer than what it began at
        assert carry.swept is not None
        return carry.swept

    def solve(
        self,
        problem: Problem,
        a: State,
        measure: Measure = relative,
        callback: Callable[[Step], None] | None = None,
        record: bool | str = False,
        h: State | None = None,
    ) -> Solution:
        # activations that are known belong to a state that has settled already
        if self.nested and h is None:
            a = self._nested(problem, a)
        return super().solve(problem, a, measure, callback, record, h)

    def _nested(self, problem: Problem, a: State) -> State:
        levels = problem.levels() if isinstance(problem, Layered) else []
        for first in range(len(levels) - 1, 0, -1):
            assert isinstance(problem, Layered)
            part = problem.restricted(frozenset().union(*levels[first:]))
            if part is None:
                return a
            b = {n: a[n] for n in a if any(n in level for level in levels[first:])}
            h = part.activate(b)
            plan = self.begin(part, b, h)
            for _ in range(self.nested):
                b, h, _ = self._swept(part, b, h, plan)
            a = {**a, **b}
        return a

    def step(self, problem: Problem, a: State, h: State, carry: Any) -> tuple[State, State, State]:
        y, hy, residual = self._swept(problem, a, h, carry)
        carry.swept = (y, hy)
        if not self.accelerated:
            return y, hy, residual
        before = {n: t for n, t in a.items() if n in carry.moved}
        x, f = _flatten(before, carry.last), _flatten({n: y[n] for n in before}, carry.last)
        new = _unflatten(self._extrapolated(f - x, f, carry), before, carry.last)
        moved = problem.activate(new)
        return {n: new.get(n, y[n]) for n in a}, {n: moved.get(n, hy[n]) for n in a}, residual

    def _swept(self, problem: Problem, a: State, h: State, carry: _Plan) -> tuple[State, State, State]:
        """One sweep: the state it leads to, its activations, and each moved node's residual when it was visited."""
        a, h, residual = dict(a), dict(h), {}
        if carry.eliminated:
            first = problem.field(h, carry.eliminated)
            a.update(first)
            h.update(problem.activate(first))
        self._sweep_levels(problem, a, h, residual, carry)
        for chain in carry.chains or []:
            assert isinstance(problem, Joint)
            field = problem.field(h, frozenset(chain.nodes))
            residual.update({n: f - a[n] for n, f in field.items()})
            part, part_h = {n: a[n] for n in chain.nodes}, {n: h[n] for n in chain.nodes}
            new, new_h = settle_chain(problem, chain, part, part_h, field, self.rounds)
            if self.damping != 1:
                new = {n: torch.lerp(a[n], t, self.damping) for n, t in new.items()}
                new_h = problem.activate(new)
            a.update(new)
            h.update(new_h)
        return a, h, residual

    def _sweep_levels(self, problem: Problem, a: State, h: State, residual: State, carry: _Plan) -> None:
        """Updates what is not in a chain, level by level, in ``a`` and ``h``."""
        assert carry.blocks is not None
        finest = len(carry.blocks) - 1
        for i, blocks in enumerate(carry.blocks):
            damping = self.damping * self.level_damping[min(finest - i, len(self.level_damping) - 1)]
            if all(block <= carry.eliminated for block in blocks):
                continue
            for sweep in range(1 if i == finest else self.coarse_sweeps):
                for block in blocks:
                    if block <= carry.eliminated and sweep == 0:
                        continue
                    field = problem.field(h, block)
                    if not block <= carry.eliminated:
                        residual.update({n: f - a[n] for n, f in field.items() if n not in residual})
                        field = self._update(problem, a, h, field, damping, carry)
                    a.update(field)
                    h.update(problem.activate(field))

    @staticmethod
    def _update(problem: Problem, a: State, h: State, field: State, damping: float, carry: _Plan) -> State:
        stiff = {n: s for n, s in (carry.stiffness or {}).items() if n in field}
        if stiff:
            assert isinstance(problem, Layered)
            field = problem.resolved({n: f + stiff[n] * h[n] if n in stiff else f for n, f in field.items()}, stiff)
        return field if damping == 1 else {n: torch.lerp(a[n], f, damping) for n, f in field.items()}
