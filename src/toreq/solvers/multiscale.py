"""Coarse-to-fine settling of networks whose nodes lie on levels of different resolution."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from toreq.core.state import State
from toreq.solvers.anderson import Anderson, _flatten, _History, _unflatten
from toreq.solvers.base import require
from toreq.solvers.problem import Layered, Problem

Blocks = list[frozenset[str]]


@dataclass
class _Plan(_History):
    """What Anderson carries, the order of the sweep, and the state that the latest sweep led to."""

    blocks: list[Blocks] | None = None  # by level, the coarsest first
    stiffness: State | None = None
    swept: tuple[State, State] | None = None


@dataclass(frozen=True, kw_only=True)
class CoarseToFine(Anderson):
    r"""Block sweeps over the levels of a pyramid from coarse to fine, with springs treated implicitly.

    One step updates the coarsest level first and the finest last (on each level one colour of its nodes after the
    other), every update reading what the step has moved already. A node that springs pull by :math:`-s h` is updated to
    the solution of

    .. math:: a + s\,\sigma(a) = f(h) + s h

    instead of f, so that springs of any strength are stable without damping. The step as a whole is the map that
    Anderson's method extrapolates; nodes that can be recomputed from all others are left out of it, as in
    :class:`~toreq.solvers.Anderson`. The equilibrium is that of any other solver. Without levels or springs this is the
    ordinary block sweep.

    Args:
        accelerated: extrapolate over the sweep; else take the sweeps as they are.
        implicit: treat springs implicitly.
        coarse_sweeps: sweeps of each coarser level before the next finer one is visited, at least 1.
        level_damping: mixing in (0, 1] per level, the finest first; the last value stands for all coarser ones.
    """

    accelerated: bool = True
    implicit: bool = True
    coarse_sweeps: int = 1
    level_damping: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.coarse_sweeps
        require("CoarseToFine", "coarse_sweeps", count, count >= 1, "an integer >= 1", "try 1")
        given = self.level_damping
        ok = isinstance(given, tuple) and len(given) > 0 and all(0 < d <= 1 for d in given)
        require("CoarseToFine", "level_damping", given, ok, "numbers in (0, 1]", "use (1.0,)")

    def begin(self, problem: Problem, a: State, h: State) -> _Plan:
        history = super().begin(problem, a, h)
        layered = isinstance(problem, Layered)
        levels = problem.levels() if layered else [frozenset(a)]
        groups = [history.eliminated, *(c - history.eliminated for c in problem.colours())]
        blocks = [[g & level for g in groups if g & level] for level in reversed(levels)]
        stiffness = problem.stiffness() if layered and self.implicit else {}
        return _Plan(**{f.name: getattr(history, f.name) for f in fields(history)}, blocks=blocks, stiffness=stiffness)

    def checked(self, carry: Any, old: tuple[State, State], new: tuple[State, State]) -> tuple[State, State]:
        # the residual was measured inside the sweep: what the sweep led to is nearer than what it began at
        assert carry.swept is not None
        return carry.swept

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
        assert carry.blocks is not None
        a, h, residual = dict(a), dict(h), {}
        if carry.eliminated:
            first = problem.field(h, carry.eliminated)
            a.update(first)
            h.update(problem.activate(first))
        count = len(carry.blocks)
        for i, blocks in enumerate(carry.blocks):
            damping = self.damping * self.level_damping[min(count - 1 - i, len(self.level_damping) - 1)]
            for sweep in range(1 if i == count - 1 else self.coarse_sweeps):
                for block in blocks:
                    free = block <= carry.eliminated
                    if free and sweep == 0:
                        continue
                    field = problem.field(h, block)
                    if not free:
                        for n in block - residual.keys():
                            residual[n] = field[n] - a[n]
                        field = self._update(problem, a, h, field, damping, carry)
                    a.update(field)
                    h.update(problem.activate(field))
        return a, h, residual

    @staticmethod
    def _update(problem: Problem, a: State, h: State, field: State, damping: float, carry: _Plan) -> State:
        stiff = {n: s for n, s in (carry.stiffness or {}).items() if n in field}
        if stiff:
            assert isinstance(problem, Layered)
            field = problem.resolved({n: f + stiff[n] * h[n] if n in stiff else f for n, f in field.items()}, stiff)
        return field if damping == 1 else {n: torch.lerp(a[n], f, damping) for n, f in field.items()}
