"""The loop that all solvers share: steps, checks, and examples that leave the batch when they have settled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toreq.core.state import State, chosen_pair, rows, take
from toreq.solvers.problem import Measure, Problem, Reducible, each_node, reduced
from toreq.solvers.solution import Solution, Step, Trace

if TYPE_CHECKING:
    from toreq.solvers.base import Solver


WORTH_COMPACTING = 2**19
"""Numbers in a state below which copying what moves on costs more than it saves."""


class Loop:
    """One relaxation under way.

    An example is frozen at the first check at which its own residual is below tolerance, so that its result does not
    depend on the rest of the batch. When enough examples are frozen the others go on in a smaller batch.

    Args:
        solver: its steps and settings.
        problem: what to relax.
        a: start, each node ``(B, ...)``.
        measure: how a residual is judged.
        h: activations of the start, if known.
    """

    def __init__(self, solver: Solver, problem: Problem, a: State, measure: Measure, h: State | None = None) -> None:
        self.solver, self.problem = solver, problem
        self.measure = each_node(measure) if solver.by_node else measure
        self.a, self.h = a, problem.activate(a) if h is None else h
        self.carry = solver.begin(problem, a, self.h)
        first = next(iter(a.values()))
        size, device = first.shape[0], first.device
        # of the working batch; `rows` says which examples these are, None for all
        self.rows: Tensor | None = None
        self.done = torch.zeros(size, dtype=torch.bool, device=device)
        self.settled = 0
        self.steps = torch.zeros(size, dtype=torch.int64, device=device)
        self.residual = torch.full((size,), torch.inf, dtype=first.abs().dtype, device=device)
        self.kept: tuple[State, State] = (a, self.h)  # of the examples that are done; anything for the others
        # of the full batch: what left it, in the order of leaving
        self.parts: list[_Part] = []

    def run(self, callback: Callable[[Step], None] | None, record: bool | str) -> Solution:
        """Step until every example has settled or overflowed, or the steps are used up."""
        solver = self.solver
        log: list[tuple[Tensor, Tensor | None, State | None]] = []
        watched = bool(record) or callback is not None
        for t in range(1, solver.max_steps + 1):
            old, old_h = self.a, self.h
            self.a, self.h, residual = solver.step(self.problem, old, old_h, self.carry)
            check = t == solver.max_steps or (solver.tolerance > 0 and t % solver.check_every == 0)
            if not (check or watched):
                continue
            with torch.no_grad():
                ratio = self.measure(residual, {n: old[n] for n in residual})
            if record:
                energy = self.problem.energy(old, old_h)
                log.append((ratio, energy, dict(old) if record == "states" else None))
            if callback is not None:
                callback(Step(t, self.a, self.h, ratio))
            if check and self._check(t, ratio, (old, old_h)):
                break
            if check and not watched:
                self._compact()
        return self._solution(_trace(log))

    def _check(self, t: int, ratio: Tensor, old: tuple[State, State]) -> bool:
        """Freeze what has settled; whether the loop ends here."""
        solver, before = self.solver, self.settled
        # without a tolerance all steps are run, also by an example whose residual happens to be zero
        settled = ratio <= solver.tolerance if solver.tolerance > 0 else torch.zeros_like(self.done)
        if before:
            settled |= self.done
        # one number tells whether all are finite, in one transfer with the count
        count, total = torch.stack([settled.sum().to(ratio.dtype), ratio.sum()]).tolist()
        self.settled, finite = int(count), math.isfinite(total)
        size = ratio.shape[0]
        last = t == solver.max_steps
        if self.settled == before and not last and finite:
            return False
        self.residual = torch.where(self.done, self.residual, ratio) if before else ratio
        self.steps = self.steps.where(self.done, t) if before else torch.full_like(self.steps, t)
        new = (self.a, self.h)
        if self.settled > before:
            kept = solver.checked(self.carry, old, new) if solver.extrapolates() else new
            self.kept = chosen_pair(self.done, self.kept, kept) if before else kept
        self.done = settled
        ends = last or self.settled == size
        if not ends and not finite:
            # an example that overflowed cannot settle any more, but must not stop the others
            ends = bool((self.done | ~torch.isfinite(ratio)).all())
        if ends and self.settled < size:
            self.kept = chosen_pair(self.done, self.kept, new) if self.settled else new
        return ends

    def _compact(self) -> None:
        wanted = max(1, self.solver.compaction * self.done.shape[0])
        if not self.solver.drops() or self.settled < wanted or not isinstance(self.problem, Reducible):
            return
        if sum(t.numel() for t in self.a.values()) < WORTH_COMPACTING:
            return
        moving = (~self.done).nonzero().flatten()
        problem = self.problem.selected(moving)
        if problem is None:
            return
        self._leave(self.done.nonzero().flatten())
        self.rows = moving if self.rows is None else self.rows[moving]
        self.problem, self.measure = problem, reduced(self.measure, moving)
        self.carry = self.solver.select(self.carry, moving)
        self.a, self.h = take(self.a, moving), take(self.h, moving)
        self.done, self.residual, self.steps = self.done[moving], self.residual[moving], self.steps[moving]
        self.settled = 0

    def _leave(self, index: Tensor | None) -> None:
        """Put aside these examples of the working batch (None: all)."""
        figures = (self.steps, self.residual, self.done)
        if index is None:
            self.parts.append(_Part(self.rows, *self.kept, *figures))
            return
        where = index if self.rows is None else self.rows[index]
        state, h = take(self.kept[0], index), take(self.kept[1], index)
        self.parts.append(_Part(where, state, h, *(t[index] for t in figures)))

    def _solution(self, trace: Trace | None) -> Solution:
        if self.rows is None:
            return Solution(*self.kept, self.steps, self.residual, self.done, trace)
        self._leave(None)
        order = torch.cat([p.rows for p in self.parts if p.rows is not None])
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)

        def joined(parts: list[Tensor]) -> Tensor:
            return rows(torch.cat(parts), back)

        return Solution(
            {n: joined([p.state[n] for p in self.parts]) for n in self.a},
            {n: joined([p.h[n] for p in self.parts]) for n in self.a},
            joined([p.steps for p in self.parts]),
            joined([p.residual for p in self.parts]),
            joined([p.converged for p in self.parts]),
            trace,
        )


@dataclass(frozen=True)
class _Part:
    """Examples that left the batch together, with their rows in the full batch."""

    rows: Tensor | None
    state: State
    h: State
    steps: Tensor
    residual: Tensor
    converged: Tensor


def _trace(log: list[tuple[Tensor, Tensor | None, State | None]]) -> Trace | None:
    if not log:
        return None
    energies = [e for _, e, _ in log if e is not None]
    states = [s for _, _, s in log if s is not None]
    residual = torch.stack([r for r, _, _ in log])
    return Trace(residual, torch.stack(energies) if energies else None, states or None)
