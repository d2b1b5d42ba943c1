"""Pairs of nudged phases, +beta stacked on -beta, with beta halved where they are not each other's mirror image."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toreq.core.state import State, difference, halves, norm, selected, stacked, take
from toreq.estimators.base import Contrastive, CostNudge, FreePhase, LinearNudge, Nudge, Statistics
from toreq.solvers.solution import Solution


@dataclass(frozen=True)
class Pair:
    """Two nudged phases of B examples: a solution of 2B, and what belongs to each example, ``(B,)``."""

    solution: Solution
    beta: Tensor
    asym: Tensor
    response: Tensor
    active: Tensor
    halvings: int

    def statistics(self) -> Statistics:
        """The pair's statistics; steps, residual and convergence are the worse of the two phases."""
        steps, residual, converged = self.solution.steps, self.solution.residual, self.solution.converged
        size = self.beta.shape[0]
        return Statistics(
            torch.maximum(steps[:size], steps[size:]),
            torch.maximum(residual[:size], residual[size:]),
            converged[:size] & converged[size:],
            self.asym,
            self.beta,
            self.response,
            self.halvings,
        )


@dataclass(frozen=True, kw_only=True)
class Paired(Contrastive):
    """Estimators that run both signs of the nudge together."""

    @abstractmethod
    def pair(self, free: FreePhase, nudge: Nudge, beta: Tensor, active: Tensor, record: bool) -> Solution:
        """Both nudged phases of every example, as one batch of 2B."""

    def calibrated(self, free: FreePhase, nudge: Nudge, record: bool) -> Pair:
        """The pair, run again at half of beta for the examples whose asymmetry is above the limit."""
        v = nudge.cotangent(free.h)
        beta, active = self.betas(free, v), self.active(v)
        solution = self.pair(free, nudge, beta, active, record)
        asym, odd = asymmetry(solution.h, free.h)
        halvings = 0
        while halvings < self.max_halvings and nudge.constant:
            worst = (active & (asym > self.asym_limit)).nonzero().flatten()
            if worst.numel() == 0:
                break
            halvings += 1
            trial = beta[worst] / 2
            part = replace(free, bindings=selected(free.bindings, worst), a=take(free.a, worst), h=take(free.h, worst))
            again = self.pair(part, LinearNudge(take(v, worst)), trial, active[worst], False)
            lower, change = asymmetry(again.h, part.h)
            better = lower < asym[worst]
            solution = _merged(solution, again, worst, better)
            beta = beta.index_copy(0, worst, torch.where(better, trial, beta[worst]))
            asym = asym.index_copy(0, worst, torch.where(better, lower, asym[worst]))
            odd = odd.index_copy(0, worst, torch.where(better, change, odd[worst]))
            if not bool(better.any()):
                break
        size = norm(free.h)
        response = 0.5 * odd / size.clamp_min(torch.finfo(size.dtype).tiny)
        return Pair(solution, beta, asym, response, active, halvings)


def asymmetry(h: State, h0: State) -> tuple[Tensor, Tensor]:
    r""":math:`\|h^+ + h^- - 2h^0\|/\|h^+ - h^-\|` per example of a stacked state, 0 without a response; and
    :math:`\|h^+ - h^-\|`."""
    plus, minus = halves(h)
    # differences first: the sum of h+ and h- would lose the digits of a small response
    up, down = difference(plus, h0), difference(minus, h0)
    even, odd = norm({n: t + down[n] for n, t in up.items()}), norm(difference(up, down))
    return torch.where(odd > 0, even / odd.clamp_min(torch.finfo(odd.dtype).tiny), torch.zeros_like(odd)), odd


def relative_response(dh: State, h0: State) -> Tensor:
    r""":math:`\|\delta h\|/\|h^0\|` per example."""
    size = norm(h0)
    return norm(dh) / size.clamp_min(torch.finfo(size.dtype).tiny)


def twice(nudge: Nudge) -> Nudge:
    """The nudge of B examples for a stacked batch of 2B."""
    if isinstance(nudge, LinearNudge):
        return LinearNudge(stacked(nudge.v, nudge.v))
    assert isinstance(nudge, CostNudge)
    return _TwiceCost(nudge)


class _TwiceCost(Nudge):
    """A cost on a stacked batch: the cost only knows the B examples, so it is asked for each half."""

    constant = False

    def __init__(self, inner: CostNudge) -> None:
        self.inner = inner

    def cotangent(self, h: State) -> State:
        first, second = halves(h)
        return stacked(self.inner.cotangent(first), self.inner.cotangent(second))


def _merged(old: Solution, new: Solution, index: Tensor, better: Tensor) -> Solution:
    """The old solution with the examples ``index[better]`` replaced, and all of ``index`` charged for their steps."""
    size, part = old.steps.shape[0] // 2, index.shape[0]
    kept = better.nonzero().flatten()
    source, target = torch.cat([kept, kept + part]), torch.cat([index[kept], index[kept] + size])

    def put(a: Tensor, b: Tensor) -> Tensor:
        return a.index_copy(0, target, b[source])

    return Solution(
        {n: put(t, new.state[n]) for n, t in old.state.items()},
        {n: put(t, new.h[n]) for n, t in old.h.items()},
        old.steps.index_add(0, torch.cat([index, index + size]), new.steps),
        put(old.residual, new.residual),
        put(old.converged, new.converged),
        old.trace,
    )
