"""What a solver relaxes, how it decides that an example has settled, and the loop that all solvers share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from toreq.core.couplings import Only
from toreq.core.energy import Dynamics, Energy
from toreq.core.state import Bindings, State, added, difference, dot, halves, norm, per_example
from toreq.errors import ConfigError
from toreq.options import check_types


@runtime_checkable
class Problem(Protocol):
    """A map ``a -> field(activate(a))`` whose fixed point is wanted."""

    def activate(self, a: State, only: Only = None) -> State: ...

    def field(self, h: State, only: Only = None) -> State: ...

    def colours(self) -> list[frozenset[str]]: ...

    def eliminable(self) -> frozenset[str]: ...

    def energy(self, a: State, h: State) -> Tensor | None: ...


class Relaxation:
    """A network bound to an input, with constant and state-dependent forces added to its field.

    Args:
        dynamics: the network.
        bindings: what ``dynamics.bind(x)`` returned.
        force: constant force per node, e.g. ``-beta * v``; joined with the drives once.
        extra: state-dependent force ``h -> {node: force}``.
        as_map: relax :meth:`~toreq.core.Dynamics.map` instead of the field (free phases and linear responses).
    """

    def __init__(
        self,
        dynamics: Dynamics,
        bindings: Bindings,
        force: State | None = None,
        extra: Callable[[State], State] | None = None,
        as_map: bool = False,
    ) -> None:
        self.dynamics, self.bindings, self.force, self.extra = dynamics, bindings, force, extra
        self._field = dynamics.map if as_map else dynamics.field
        self.static = dynamics.static(bindings)
        if force:
            self.static = added(self.static, force)

    def activate(self, a: State, only: Only = None) -> State:
        return self.dynamics.activate(a, self.bindings, only)

    def field(self, h: State, only: Only = None) -> State:
        f = self._field(h, self.bindings, self.static, only)
        if self.extra is not None:
            for n, t in self.extra(h).items():
                if n in f:
                    f[n] = f[n] + t
        return f

    def colours(self) -> list[frozenset[str]]:
        return self.dynamics.colours()

    def eliminable(self) -> frozenset[str]:
        # a force that depends on the state may couple any nodes
        return self.dynamics.eliminable() if self.extra is None else frozenset()

    def energy(self, a: State, h: State) -> Tensor | None:
        if not isinstance(self.dynamics, Energy):
            return None
        e = self.dynamics(a, self.bindings)
        for n, t in (self.force or {}).items():
            e = e - dot(t, h[n])
        return e


Measure = Callable[[State, State], Tensor]
"""``(residual, a) -> (B,)`` relative residual in [0, 1]."""


def _ratio(r: State, scale: State) -> Tensor:
    size = norm(r)
    return size / (size + norm(scale)).clamp_min(torch.finfo(size.dtype).tiny)


def relative(r: State, a: State) -> Tensor:
    r""":math:`\|r\| / (\|r\| + \|a\|)` per example."""
    return _ratio(r, a)


def pair_difference(r: State, a: State) -> Tensor:
    """The residual of the difference of two stacked phases, relative to that difference.

    What the two phases have in common cancels in a contrast, so only their difference needs to settle.
    """
    (r1, r2), (a1, a2) = halves(r), halves(a)
    ratio = _ratio(difference(r1, r2), difference(a1, a2))
    return torch.cat([ratio, ratio])


def displacement_from(start: State) -> Measure:
    """The residual relative to the distance from ``start``: for one nudged phase, relative to the response."""

    def measure(r: State, a: State) -> Tensor:
        return _ratio(r, difference(a, start))

    return measure


@dataclass(frozen=True)
class Trace:
    """A recorded relaxation: ``residual`` ``(T, B)``; ``energy`` ``(T, B)`` or None when there is none;
    ``states`` if asked."""

    residual: Tensor
    energy: Tensor | None
    states: list[State] | None = None


@dataclass(frozen=True)
class Solution:
    """The result of a relaxation.

    Args:
        state: pre-activations per node.
        h: activations per node.
        steps: field evaluations each example took, ``(B,)`` int64.
        residual: relative residual of the last iterate checked, ``(B,)``. A settled example's state is that iterate
            where the solver extrapolates, and one plain update further (a smaller residual) where it does not.
        converged: ``(B,)`` bool.
        trace: the recorded relaxation, if asked for.
    """

    state: State
    h: State
    steps: Tensor
    residual: Tensor
    converged: Tensor
    trace: Trace | None = None


@dataclass(frozen=True)
class Step:
    """What a callback sees after each step; ``residual`` is None at steps where it was not measured."""

    index: int
    state: State
    h: State
    residual: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Finds ``a = field(sigma(a))`` example by example.

    An example is frozen at the first check at which its own residual is below tolerance, so that its result does not
    depend on the rest of the batch.

    Args:
        max_steps: most field evaluations, at least 1.
        tolerance: relative residual at which an example has settled; 0 runs all steps.
        check_every: steps between two checks.

    Raises:
        ConfigError: for a value out of range.
    """

    max_steps: int = 100
    tolerance: float = 3e-4
    check_every: int = 1

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

    @abstractmethod
    def begin(self, problem: Problem, a: State, h: State) -> Any:
        """Whatever the solver carries from step to step."""

    @abstractmethod
    def step(self, problem: Problem, a: State, h: State, carry: Any) -> tuple[State, State, State]:
        """One step: the next ``a``, its ``h``, and the field at the old state (residual: field - a)."""

    def self_coupling(self) -> float:
        """Strength of the self-coupling that this solver adds to the equilibrium; 0 unless recurrent."""
        return 0.0

    def extrapolates(self) -> bool:
        """Whether a step may raise the residual, so that a settled example keeps the iterate that was checked."""
        return False

    def checked(self, carry: Any, old: tuple[State, State], new: tuple[State, State]) -> tuple[State, State]:
        """The ``(a, h)`` to which the last residual belongs; only asked of solvers that extrapolate."""
        return old

    def solve(
        self,
        problem: Problem,
        a: State,
        measure: Measure = relative,
        callback: Callable[[Step], None] | None = None,
        record: bool | str = False,
    ) -> Solution:
        """Relax from ``a``.

        Args:
            problem: what to relax.
            a: start, each node ``(B, ...)``.
            measure: how a residual is judged.
            callback: called after every step.
            record: keep a :class:`Trace`; ``"states"`` keeps every state too.
        """
        h = problem.activate(a)
        carry = self.begin(problem, a, h)
        size, device = next(iter(a.values())).shape[0], next(iter(a.values())).device
        done = torch.zeros(size, dtype=torch.bool, device=device)
        steps = torch.zeros(size, dtype=torch.int64, device=device)
        residual = torch.full((size,), math.inf, dtype=next(iter(a.values())).abs().dtype, device=device)
        final, final_h, any_done = a, h, False
        log: list[tuple[Tensor, Tensor | None, State | None]] = []
        for t in range(1, self.max_steps + 1):
            old, old_h = a, h
            a, h, field = self.step(problem, a, h, carry)
            check = t == self.max_steps or (self.tolerance > 0 and t % self.check_every == 0)
            ratio = None
            if check or record or callback:
                with torch.no_grad():
                    ratio = measure({n: f - old[n] for n, f in field.items()}, old)
            if record and ratio is not None:
                log.append((ratio, problem.energy(old, old_h), dict(old) if record == "states" else None))
            if callback is not None:
                callback(Step(t, a, h, ratio))
            if check and ratio is not None:
                # what an example that settles now keeps; those settled earlier keep what they had
                kept, kept_h = self.checked(carry, (old, old_h), (a, h)) if self.extrapolates() else (a, h)
                final, final_h = _where(done, (final, final_h), (kept, kept_h)) if any_done else (kept, kept_h)
                residual = torch.where(done, residual, ratio)
                steps = torch.where(done, steps, t)
                done = done | (ratio <= self.tolerance)
                # an example that overflowed cannot settle any more, but must not stop the others
                finished = (done | ~torch.isfinite(ratio)).all()
                all_finished, any_done, all_done = torch.stack([finished, done.any(), done.all()]).tolist()
                if all_finished or t == self.max_steps:
                    if not all_done and self.extrapolates():
                        final, final_h = _where(done, (final, final_h), (a, h))
                    break
        trace = None
        if log:
            energies = [e for _, e, _ in log if e is not None]
            states = [s for _, _, s in log if s is not None]
            trace = Trace(
                torch.stack([r for r, _, _ in log]),
                torch.stack(energies) if energies else None,
                states or None,
            )
        return Solution(final, final_h, steps, residual, done, trace)


def _where(done: Tensor, a: tuple[State, State], b: tuple[State, State]) -> tuple[State, State]:
    first, second = (
        {n: torch.where(per_example(done, x), x, new[n]) for n, x in old.items()} for old, new in zip(a, b, strict=True)
    )
    return first, second


def require(where: str, name: str, value: object, ok: bool, expected: str, remedy: str) -> None:
    """Raise a :class:`ConfigError` in the project's form unless ``ok``."""
    if not ok:
        raise ConfigError(f"{where}: expected {name} {expected}, got {value!r}; {remedy}")
