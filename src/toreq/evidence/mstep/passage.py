"""How much work a solver does until it holds a state of a given residual, measured from outside and alike for all."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toreq.core import Energy
from toreq.core.state import Bindings, State, added, detached, difference, repeated, stacked
from toreq.diagnostics.work import Metered, fine_sweep
from toreq.estimators import Centered
from toreq.estimators.base import FreePhase, LinearNudge
from toreq.estimators.pairs import twice
from toreq.evidence.mstep import nets
from toreq.solvers import Anderson, CoarseToFine, FixedPoint, Relaxation, Solver
from toreq.solvers.problem import Measure, pair_difference, relative
from toreq.systems.mstep import MultiScale

DAMPINGS = (0.35, 0.2, 0.6, 0.1, 0.8, 1.0, 0.05)
"""The likely ones first: what is found bounds the work that the others may spend."""
LENGTHS = (3, 5, 8)
OURS, PLAIN = "coarse to fine", ("plain", "Gauss-Seidel", "Anderson")


def columns(small: bool = False) -> dict[str, list[Solver]]:
    """What is compared, by name; each counts with the best of its settings.

    Args:
        small: one setting of each, without the ablations.
    """
    found: dict[str, list[Solver]] = {
        OURS: [CoarseToFine()],
        "plain": [FixedPoint(damping=d) for d in DAMPINGS],
        "Gauss-Seidel": [FixedPoint(damping=d, order="gauss_seidel") for d in DAMPINGS],
        "Anderson": [Anderson(damping=d, length=r) for d, r in itertools.product(DAMPINGS, LENGTHS)],
    }
    if small:
        return {name: solvers[:1] for name, solvers in found.items()}
    return {
        **found,
        "level by level": [CoarseToFine(joint=False)],
        "not accelerated": [CoarseToFine(accelerated=False)],
        "explicit springs": [CoarseToFine(implicit=False, damping=d) for d in DAMPINGS],
    }


@dataclass(frozen=True)
class Phase:
    """A relaxation to be timed.

    Args:
        problem: what is relaxed.
        start: the pair ``(a, h)`` where it starts.
        measure: of its residual.
        tolerance: at which an example has settled.
        unit: operations of a fine sweep of one example.
    """

    problem: Relaxation
    start: tuple[State, State]
    measure: Measure
    tolerance: float
    unit: float


@dataclass(frozen=True)
class Passage:
    """What it took.

    Args:
        work: mean over the examples, in fine sweeps; an example that did not settle counts what was done on it.
        settled: whether all examples settled.
        share: of the examples that settled, in [0, 1].
        seconds: of the processor in the solver's steps.
        curve: work so far and the geometric mean of the residuals, step by step.
    """

    work: float
    settled: bool
    share: float
    seconds: float
    curve: list[tuple[float, float | None]]


@torch.no_grad()
def passage(solver: Solver, phase: Phase, most: int, bound: float = math.inf) -> Passage | None:
    """Run a solver until every example has settled, or for ``most`` steps; None as soon as its work is sure to exceed
    ``bound``.

    After every step the residual of the plain map is taken, outside of the count, at the state that the step led to and
    at the one that the solver would return if it stopped there; the smaller counts.
    """
    problem = Metered(phase.problem)
    a, h = phase.start
    carry = solver.begin(problem, a, h)
    size = next(iter(a.values())).shape[0]
    work = torch.full((size,), math.nan)
    curve: list[tuple[float, float | None]] = []
    done, seconds = 0.0, 0.0
    for _ in range(most):
        old = a, h
        began = time.process_time()
        a, h, _ = solver.step(problem, a, h, carry)
        seconds += time.process_time() - began
        done = problem.meter.total / (size * phase.unit)
        ratio = _residual(phase, a, h)
        if solver.extrapolates():
            ratio = torch.fmin(ratio, _residual(phase, *solver.checked(carry, old, (a, h))))
        mean = float(ratio.clamp_min(torch.finfo(ratio.dtype).tiny).log().mean().exp())
        curve.append((done, mean if math.isfinite(mean) else None))
        work = torch.where(work.isnan() & (ratio <= phase.tolerance), done, work)
        if float(work.nan_to_num(done).mean()) > bound:
            return None
        if not bool(work.isnan().any()) or not bool(ratio.isfinite().any()):
            break
    share = 1 - float(work.isnan().double().mean())
    return Passage(float(work.nan_to_num(done).mean()), share == 1, share, seconds, curve)


def _residual(phase: Phase, a: State, h: State) -> Tensor:
    field = phase.problem.field(h)
    return phase.measure({n: f - a[n] for n, f in field.items()}, a).cpu()


def best(solvers: list[Solver], phase: Phase, most: int) -> tuple[Passage, Solver]:
    """The passage of least work among those that settle, and its solver; where none does, the work of ``most``
    steps."""
    found: tuple[Passage, Solver] | None = None
    for solver in solvers:
        taken = passage(solver, phase, most, math.inf if found is None else found[0].work)
        if taken is not None and taken.settled and (found is None or taken.work < found[0].work):
            found = taken, solver
    if found is not None:
        return found
    # counted, not run: what oscillates and what overflows count alike. A nudged phase's first evaluation is known
    taken = passage(solvers[0], phase, 2)
    assert taken is not None
    (first, _), (second, _) = taken.curve[0], taken.curve[-1]
    work = first + (most - 1) * (second - first if len(taken.curve) > 1 else first)
    return replace(taken, work=work, settled=False, seconds=math.nan, curve=[]), solvers[0]


@dataclass(frozen=True)
class Equilibria:
    """Free and nudged equilibria under one set of weights."""

    free: tuple[State, State]
    nudged: tuple[State, State]


class Phases:
    """The phases of a network on a batch, under its present weights.

    Args:
        net: read out at the finest level.
        x, y: the batch and its labels.
        earlier: equilibria under the weights before; the warm phases start there.
    """

    def __init__(self, net: MultiScale, x: Tensor, y: Tensor, earlier: Equilibria | None = None) -> None:
        self.net, self.earlier = net, earlier
        self.energy: Energy = nets.energy(net)
        with torch.no_grad():
            self.bindings: Bindings = detached(self.energy.bind(x))
            self.unit = fine_sweep(self.energy, self.bindings)
        solution = net.equilibrium.free_phase(self.bindings)
        self.free = solution.state, solution.h
        self.cotangent = self._cotangent(y)

    def _cotangent(self, y: Tensor) -> State:
        top = self.net.equilibrium.readout[0]
        with torch.enable_grad():
            h = self.free[1][top].detach().requires_grad_()
            (v,) = torch.autograd.grad(self.net.criterion(self.net.head(h), y), h)
        return {top: v}

    @torch.no_grad()
    def equilibria(self) -> Equilibria:
        """Both equilibria, by the shipped solver."""
        phase = self._nudged(None)
        a, h = phase.start
        solver = replace(self.net.equilibrium.solver, tolerance=phase.tolerance)
        solution = solver.solve(phase.problem, a, phase.measure, h=h)
        return Equilibria(self.free, (solution.state, solution.h))

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Phase]]:
        yield "cold free", self._free(self.energy.initial(self.bindings))
        yield "cold nudged", self._nudged(None)
        if self.earlier is not None:
            yield "warm free", self._free(self.earlier.free[0])
            yield "warm nudged", self._nudged(self.earlier)

    def _free(self, a: State) -> Phase:
        problem = Relaxation(self.energy, self.bindings, as_map=True)
        tolerance = self.net.equilibrium.solver.tolerance
        return Phase(problem, (a, problem.activate(a)), relative, tolerance, self.unit)

    def _nudged(self, earlier: Equilibria | None) -> Phase:
        """Both signs of the nudge as one batch; from the free equilibrium, or that plus the displacement before."""
        estimator = self.net.equilibrium.estimator
        assert isinstance(estimator, Centered)
        phase = FreePhase(self.energy, self.bindings, self.net.equilibrium.solver, *self.free)
        beta = estimator.betas(phase, self.cotangent)
        both = stacked(self.free[0], self.free[0]), stacked(self.free[1], self.free[1])
        force, _ = estimator.force(twice(LinearNudge(self.cotangent)), both[1], torch.cat([beta, -beta]))
        problem = Relaxation(self.energy, repeated(self.bindings, 2), force, origin=both)
        start = both
        if earlier is not None:
            before = stacked(earlier.free[0], earlier.free[0])
            a = added(both[0], difference(earlier.nudged[0], before))
            start = a, problem.activate(a)
        return Phase(problem, start, pair_difference, estimator.tolerance, self.unit)


def compared(phase: Phase, most: int, small: bool = False) -> dict[str, tuple[Passage, Solver]]:
    """Every column's best passage, and the solver that took it; ``small`` as of :func:`columns`."""
    return {name: best(solvers, phase, most) for name, solvers in columns(small).items()}
