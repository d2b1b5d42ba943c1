"""What all solvers share: settings, solutions, and relaxing in mixed precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from toreq.core.energy import Dynamics
from toreq.core.state import State
from toreq.errors import ConfigError
from toreq.options import check_types
from toreq.solvers.loop import Loop
from toreq.solvers.problem import Compilable, Measure, Problem, Roundable, relative
from toreq.solvers.solution import Solution, Step, Trace

COARSE = 4e-3
"""Relative residual to which couplings rounded to bfloat16 can settle: their rounding error is about 2^-9."""


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Finds ``a = field(sigma(a))`` example by example.

    An example is frozen at the first check at which its own residual is below tolerance, so that its result does not
    depend on the rest of the batch.

    Args:
        max_steps: most field evaluations, at least 1.
        tolerance: relative residual at which an example has settled; 0 runs all steps.
        check_every: steps between two checks.
        precision: ``"mixed"`` multiplies by couplings rounded to bfloat16, first from the start and then from a state
            at which the field has been computed in full, so that the equilibrium is the one of the unrounded
            couplings; float32 energies only (others are relaxed in full).
        compile: run fields and activations through ``torch.compile``; pays for large states only, and the first batches
            of every shape wait for the compiler. Settled examples then stay in the batch, whose shape is compiled.
        compaction: share of settled examples at which the others go on without them; 0 never drops any, nor does a
            solver without :meth:`select`.

        by_node: judge every node by itself and take the worst, where pre-activations differ in size by orders of
            magnitude; by default all nodes are one vector.

    Raises:
        ConfigError: for a value out of range.
    """

    max_steps: int = 100
    tolerance: float = 3e-4
    check_every: int = 1
    precision: Literal["full", "mixed", "rounded"] = "full"
    compaction: float = 0.5
    compile: bool = False
    by_node: bool = False

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_types(
            where, {f.name: getattr(self, f.name) for f in fields(self)}, {f.name: str(f.type) for f in fields(self)}
        )
        require(where, "max_steps", self.max_steps, self.max_steps >= 1, "an integer >= 1", "use for example 100")
        require(where, "tolerance", self.tolerance, 0 <= self.tolerance < 1, "in [0, 1)", "use for example 1e-4")
        require(
            where,
            "check_every",
            self.check_every,
            self.check_every >= 1,
            "an integer >= 1",
            "use for example 2",
        )
        kinds = ("full", "mixed", "rounded")
        require(where, "precision", self.precision, self.precision in kinds, f"one of {kinds}", "choose one")
        require(where, "compaction", self.compaction, 0 <= self.compaction <= 1, "in [0, 1]", "try 0.5")

    @abstractmethod
    def begin(self, problem: Problem, a: State, h: State) -> Any:
        """Whatever the solver carries from step to step."""

    @abstractmethod
    def step(self, problem: Problem, a: State, h: State, carry: Any) -> tuple[State, State, State]:
        """One step: the next ``a``, its ``h``, and the residual: the field at the old state minus that state, on the
        nodes that the solver moves (not on those that it recomputes from them)."""

    def self_coupling(self) -> float:
        """Strength of the self-coupling that this solver adds to the equilibrium; 0 unless recurrent."""
        return 0.0

    def sampling(self) -> bool:
        """Whether it samples a law, so that a solution is a mean over samples and not an equilibrium."""
        return False

    def nudged(self) -> Solver:
        """The solver of the nudged phases that follow its free phase."""
        return self

    def refusal(self, dynamics: Dynamics) -> str:
        """Why it cannot relax a network; empty where it can."""
        return ""

    def extrapolates(self) -> bool:
        """Whether a step may raise the residual, so that a settled example keeps the iterate that was checked."""
        return False

    def checked(self, carry: Any, old: tuple[State, State], new: tuple[State, State]) -> tuple[State, State]:
        """The ``(a, h)`` to which the last residual belongs; only asked of solvers that extrapolate."""
        return old

    def select(self, carry: Any, index: Tensor) -> Any:
        """What is carried, for the examples ``index`` only."""
        # optional for a solver of one's own: the loop asks for it only where `drops` says so
        raise NotImplementedError(
            f"{type(self).__name__}.select: expected a solver that can drop settled examples, got one that cannot; "
            "define select(carry, index)"
        )

    def drops(self) -> bool:
        """Whether settled examples may leave the batch: wanted, possible, and not at the price of compiling anew."""
        return self.compaction > 0 and not self.compile and type(self).select is not Solver.select

    def solve(
        self,
        problem: Problem,
        a: State,
        measure: Measure = relative,
        callback: Callable[[Step], None] | None = None,
        record: bool | str = False,
        h: State | None = None,
    ) -> Solution:
        """Relax from ``a``.

        Args:
            problem: what to relax.
            a: start, each node ``(B, ...)``.
            measure: how a residual is judged.
            callback: called after every step.
            record: keep a :class:`Trace`; ``"states"`` keeps every state too.
            h: activations of the start, if they are known.
        """
        if self.compile and isinstance(problem, Compilable):
            problem = problem.compiled()
        low = problem.rounded() if self.precision != "full" and isinstance(problem, Roundable) else None
        if low is not None and self.precision == "mixed":
            if self.max_steps == 1:
                return Loop(self, problem, a, measure, h).run(callback, record)
            return self._solve_mixed(problem, low, a, measure, callback, record, h)
        return Loop(self, low or problem, a, measure, h).run(callback, record)

    def _solve_mixed(
        self,
        problem: Problem,
        low: Problem,
        a: State,
        measure: Measure,
        callback: Callable[[Step], None] | None,
        record: bool | str,
        h: State | None,
    ) -> Solution:
        """Rounded couplings first; then one field in full precision, from which rounding touches the rest only."""
        assert isinstance(problem, Roundable)
        if getattr(problem, "linear", False):
            # measured from an origin already: the origin carries the digits
            return Loop(self, low, a, measure, h).run(callback, record)
        # one step at least is left for the field in full precision
        first = replace(self, tolerance=max(self.tolerance, COARSE), max_steps=self.max_steps - 1)
        coarse = Loop(first, low, a, measure, h).run(callback, record)
        rest = self.max_steps - int(coarse.steps.max())
        fine = problem.around(problem.field(coarse.h), coarse.h)
        shifted = None if callback is None else _shifted(callback, int(coarse.steps.max()))
        last = Loop(replace(self, max_steps=rest), fine, coarse.state, measure, coarse.h).run(shifted, record)
        return replace(last, steps=coarse.steps + last.steps, trace=_joined(coarse.trace, last.trace))


def _shifted(callback: Callable[[Step], None], by: int) -> Callable[[Step], None]:
    return lambda step: callback(replace(step, index=step.index + by))


def _joined(first: Trace | None, second: Trace | None) -> Trace | None:
    if first is None or second is None:
        return first or second
    energy = None
    if first.energy is not None and second.energy is not None:
        energy = torch.cat([first.energy, second.energy])
    states = None if first.states is None or second.states is None else first.states + second.states
    return Trace(torch.cat([first.residual, second.residual]), energy, states)


def require(where: str, name: str, value: object, ok: bool, expected: str, remedy: str) -> None:
    """Raise a :class:`ConfigError` in the project's form unless ``ok``."""
    if not ok:
        raise ConfigError(f"{where}: expected {name} {expected}, got {value!r}; {remedy}")
