"""What every gradient estimator shares: nudges, the size of beta, and the statistics of the nudged phase."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from toreq.core.energy import Dynamics, Energy
from toreq.core.state import Bindings, State, norm, scaled
from toreq.options import check_types
from toreq.solvers.base import Solver, require
from toreq.solvers.problem import Measure, Problem, only_active
from toreq.solvers.solution import Solution

Cost = Callable[[State], Tensor]
"""Maps the read-out state to a cost per example, ``(B,)``."""


@dataclass(frozen=True)
class Support:
    """Whether an estimator can be used with a network, and if not, why."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Statistics:
    """What one phase did, example by example; all tensors ``(B,)`` and detached.

    ``asym`` (:math:`\\|h^+ + h^- - 2h^0\\|/\\|h^+ - h^-\\|`), ``beta``, ``response``
    (:math:`\\|h^+ - h^-\\|/2\\|h^0\\|`) and ``halvings`` belong to nudged phases and are None elsewhere.
    """

    steps: Tensor
    residual: Tensor
    converged: Tensor
    asym: Tensor | None = None
    beta: Tensor | None = None
    response: Tensor | None = None
    halvings: int = 0

    @staticmethod
    def of(solution: Solution) -> Statistics:
        """The statistics of a solution."""
        return Statistics(solution.steps.detach(), solution.residual.detach(), solution.converged.detach())


class Nudge(ABC):
    """The force that pulls a network towards lower cost."""

    constant: bool

    @abstractmethod
    def cotangent(self, h: State) -> State:
        r""":math:`v = \partial C/\partial h` at ``h``; nodes that C does not read are missing."""


class LinearNudge(Nudge):
    """A linear cost :math:`C(h) = \\langle v, h\\rangle`, v being what backward received."""

    constant = True

    def __init__(self, v: State) -> None:
        self.v = v

    def cotangent(self, h: State) -> State:
        return self.v


class CostNudge(Nudge):
    """A cost evaluated at the moving state, as in the papers' nudged phases."""

    constant = False

    def __init__(self, cost: Cost, readout: tuple[str, ...]) -> None:
        self.cost, self.readout = cost, readout

    def cotangent(self, h: State) -> State:
        size = next(iter(h.values())).shape[0]
        with torch.enable_grad():
            out = {n: h[n].detach().requires_grad_() for n in self.readout}
            c = self.cost(out)
            if c.shape != (size,):
                raise ValueError(
                    f"CostNudge: expected one cost per example, shape {(size,)}, got {tuple(c.shape)}; "
                    "do not reduce over the batch"
                )
            grads = torch.autograd.grad(c.sum(), list(out.values()), materialize_grads=True)
        return dict(zip(out, grads, strict=True))


@dataclass(frozen=True)
class FreePhase:
    """A settled free phase: what an estimator starts from. All tensors are detached."""

    dynamics: Dynamics
    bindings: Bindings
    solver: Solver
    a: State
    h: State

    def contrasted(self) -> Bindings:
        """The bindings for a contrast: rounded as in the relaxation where the field is linear, since there only
        differences and means of states are multiplied."""
        linear = isinstance(self.dynamics, Energy) and self.dynamics.linear
        if self.solver.precision == "full" or not linear or next(iter(self.a.values())).dtype != torch.float32:
            return self.bindings
        return self.dynamics.rounded(self.bindings)


@dataclass(frozen=True)
class Estimate:
    """Gradients for each bound tensor (None where there is none), the phase's statistics, and its solution."""

    gradients: list[Tensor | None]
    statistics: Statistics
    solution: Solution


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """Turns a cost's cotangent at equilibrium into gradients of the bound tensors."""

    name: ClassVar[str]
    unrolls: ClassVar[bool] = False

    @abstractmethod
    def supports(self, dynamics: Dynamics) -> Support:
        """Whether gradients are right for this network, or why not."""

    def accepts(self, solver: Solver) -> Support:
        """Whether gradients are right after a free phase of this solver, or why not."""
        if solver.sampling():
            kind = type(self).__name__
            reason = f"{kind} reads one equilibrium, and {type(solver).__name__} samples a law: a contrast of means"
            return Support(False, f"{reason} is not the mean of contrasts; use Thermal, or Langevin(mode='annealed')")
        return Support(True)

    @abstractmethod
    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        """Run what the estimator needs and return the gradients of the cost."""


NudgeMode = Literal["relative", "absolute", "cost"]


@dataclass(frozen=True, kw_only=True)
class Contrastive(Estimator):
    r"""Estimators that compare nudged equilibria.

    Args:
        beta: the nudge's size, above 0; ``usual`` when None, or with ``nudge="relative"`` the network's own
            ``response`` if it has one. With ``nudge="relative"`` (default) it is the aimed response
            :math:`\|h^+ - h^-\|/2\|h^0\|` of each example, and the nudge is scaled to give about that; with
            ``"absolute"``
            the force is :math:`\mp\beta v` with v as received (a mean-reduced loss puts 1/B into v); with ``"cost"``
            the force is :math:`\mp\beta\,\partial C/\partial h` of a cost per example at the moving state, for
            :meth:`toreq.Equilibrium.loss`.
        tolerance: relative residual of the nudged phase, measured against the response itself.
        max_steps: most steps of the nudged phase; the solver's own limit when None.
        asym_limit: asymmetry above which an example's beta is halved.
        max_halvings: how often; 0 keeps beta whatever the asymmetry.
    """

    usual: ClassVar[float] = 0.01
    beta: float | None = None
    nudge: NudgeMode = "relative"
    tolerance: float = 1e-3
    max_steps: int | None = None
    asym_limit: float = 0.1
    max_halvings: int = 2

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_types(
            where, {f.name: getattr(self, f.name) for f in fields(self)}, {f.name: str(f.type) for f in fields(self)}
        )
        high = 0.5 if self.nudge == "relative" else 1e6
        require(
            where,
            "beta",
            self.beta,
            self.beta is None or 0 < self.beta <= high,
            f"in (0, {high}] with nudge={self.nudge!r}",
            "try 0.01",
        )
        modes = ("relative", "absolute", "cost")
        require(where, "nudge", self.nudge, self.nudge in modes, f"one of {modes}", "choose one")
        require(where, "tolerance", self.tolerance, 0 <= self.tolerance < 1, "in [0, 1)", "try 1e-3")
        steps_ok = self.max_steps is None or self.max_steps >= 1
        require(where, "max_steps", self.max_steps, steps_ok, "None or >= 1", "leave it None")
        require(where, "asym_limit", self.asym_limit, self.asym_limit > 0, "> 0", "try 0.1")
        require(where, "max_halvings", self.max_halvings, self.max_halvings >= 0, ">= 0", "try 2")

    def supports(self, dynamics: Dynamics) -> Support:
        if not isinstance(dynamics, Energy):
            return Support(
                False,
                f"{type(self).__name__} contrasts an energy, and {type(dynamics).__name__} has none; use "
                f"NonConservative, "
                "Implicit or Unrolled",
            )
        return Support(True)

    def aim(self, dynamics: Dynamics) -> float:
        """The relative response that is aimed at."""
        return self.beta if self.beta is not None else dynamics.response or self.usual

    def reach(self, free: FreePhase, v: State) -> Tensor:
        """About how far the state moves per unit of nudge, ``(B,)``."""
        return free.dynamics.response_size(free.a, free.h, v, free.bindings)

    def betas(self, free: FreePhase, v: State) -> Tensor:
        """Beta of each example, ``(B,)``, always above 0."""
        first = next(iter(free.a.values()))
        if self.nudge != "relative":
            size = self.usual if self.beta is None else self.beta
            return torch.full((first.shape[0],), size, dtype=first.dtype, device=first.device)
        direct = self.reach(free, v)
        # where no unit can respond at once (all saturated) the cotangent itself sets the scale
        direct = torch.where(direct > 0, direct, norm(v))
        beta = self.aim(free.dynamics) * norm(free.h) / direct
        return torch.where(torch.isfinite(beta) & (beta > 0), beta, torch.ones_like(beta))

    @staticmethod
    def active(v: State) -> Tensor:
        """Examples with a cotangent, ``(B,)``; one that is not finite counts, so that it is noticed."""
        return ~(norm(v) == 0)

    def relax(
        self,
        problem: Problem,
        start: tuple[State, State],
        free: FreePhase,
        measure: Measure,
        active: Tensor,
        record: bool,
    ) -> Solution:
        """The nudged phase: the free phase's solver with this estimator's tolerance.

        Args:
            problem: the nudged relaxation.
            start: pre-activations and activations where it starts.
            free: the free phase.
            measure: how a residual is judged.
            active: examples with a cotangent at all, ``(B,)`` or a multiple; the others have settled by definition,
                since relative to no response there is only rounding noise to measure.
            record: keep the trace.
        """
        a, h = start
        times = next(iter(a.values())).shape[0] // max(active.shape[0], 1)
        steps = free.solver.max_steps if self.max_steps is None else self.max_steps
        solver = replace(free.solver, tolerance=self.tolerance, max_steps=steps)
        if not bool(active.all()):
            measure = only_active(measure, active.repeat(times))
        return solver.solve(problem, a, measure, record=record, h=h)

    @staticmethod
    def force(nudge: Nudge, h: State, signed_beta: Tensor) -> tuple[State | None, Callable[[State], State] | None]:
        """The nudge as a constant force or as a function of the state, whichever it is."""
        if nudge.constant:
            return scaled(nudge.cotangent(h), -signed_beta), None
        return None, lambda state: scaled(nudge.cotangent(state), -signed_beta)
