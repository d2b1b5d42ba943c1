"""What a solver relaxes, and how it is judged whether an example has settled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from toreq.core.couplings import Only
from toreq.core.energy import Dynamics, Energy
from toreq.core.implicit import slope, solve_implicit
from toreq.core.operators import Operator
from toreq.core.quadratic import Spring
from toreq.core.resampling import Replicate
from toreq.core.state import Bindings, State, added, difference, dot, halves, norm, per_example, selected, take


@runtime_checkable
class Problem(Protocol):
    """A map ``a -> field(activate(a))`` whose fixed point is wanted."""

    def activate(self, a: State, only: Only = None) -> State: ...

    def field(self, h: State, only: Only = None) -> State: ...

    def colours(self) -> list[frozenset[str]]: ...

    def eliminable(self) -> frozenset[str]: ...

    def energy(self, a: State, h: State) -> Tensor | None: ...


@runtime_checkable
class Reducible(Protocol):
    """A problem that can go on with some of its examples only."""

    def selected(self, index: Tensor) -> Problem | None: ...


@runtime_checkable
class Compilable(Protocol):
    """A problem whose field can be compiled."""

    def compiled(self) -> Problem: ...


@runtime_checkable
class Roundable(Protocol):
    """A problem that can be relaxed in few digits first."""

    def rounded(self) -> Problem | None: ...

    def around(self, f: State, h: State) -> Problem: ...


@runtime_checkable
class Layered(Problem, Protocol):
    """A problem whose nodes lie on levels from fine to coarse, and pull on themselves with known strengths."""

    def levels(self) -> list[frozenset[str]]: ...

    def stiffness(self) -> State: ...

    def resolved(self, z: State, stiffness: State) -> State:
        r"""Per node the a of :math:`a + s\,\sigma(a) = z`; z itself for a node without a strength."""
        ...

    def restricted(self, names: frozenset[str]) -> Problem | None:
        """The same without all other nodes and what joins them; None where that is not known."""
        ...


@runtime_checkable
class Joint(Layered, Protocol):
    """A layered problem that knows which springs replicate a node onto a finer one."""

    def joints(self) -> list[tuple[str, str, Operator, Tensor]]:
        """Finer node, coarser node, the operator from the coarser to the finer, and the strength."""
        ...

    def slopes(self, a: State, h: State) -> State:
        """Per node the slopes of its activation, see :func:`toreq.core.implicit.slope`."""
        ...


class Relaxation:
    r"""A network bound to an input, with constant and state-dependent forces added to its field.

    With an ``origin`` :math:`(f_0, h_0)` the field is :math:`f_0 + [f(h) - f(h_0)]`: the same network with a constant
    force that makes :math:`f_0` the field at :math:`h_0`. A nudged phase takes the free equilibrium as found,
    :math:`(a_0, h_0)`, for its origin, so that the free phase's remaining residual is part of both phases instead of
    something that they settle first. Where all couplings are linear, only :math:`h - h_0` is multiplied by them: a
    small response then keeps its digits, in float32 and even with couplings rounded to bfloat16.

    Args:
        dynamics: the network.
        bindings: what ``dynamics.bind(x)`` returned.
        force: constant force per node, e.g. ``-beta * v``; joined with the drives once.
        extra: state-dependent force ``h -> {node: force}``.
        as_map: relax :meth:`~toreq.core.Dynamics.map` instead of the field (free phases and linear responses).
        origin: the pair :math:`(f_0, h_0)`.
        coarse: round the couplings to bfloat16, where they can be.
        compiled: run field and activations through ``torch.compile`` (energies of real states only).
    """

    def __init__(
        self,
        dynamics: Dynamics,
        bindings: Bindings,
        force: State | None = None,
        extra: Callable[[State], State] | None = None,
        as_map: bool = False,
        origin: tuple[State, State] | None = None,
        coarse: bool = False,
        compiled: bool = False,
    ) -> None:
        self.dynamics, self.bindings, self.force, self.extra, self.as_map = dynamics, bindings, force, extra, as_map
        self.origin, self.coarse, self.compiles = origin, coarse, compiled
        self.linear = origin is not None and isinstance(dynamics, Energy) and dynamics.linear
        self._used = dynamics.rounded(bindings) if coarse else bindings
        self._nodes = frozenset(dynamics.names)
        # a prediction-error energy has a cheaper map than its field
        self._terms = None
        if isinstance(dynamics, Energy) and not (as_map and dynamics.predictive):
            self._terms = dynamics.moving(self._used)
        if origin is None:
            self.static = dynamics.static(bindings)
        elif self.linear:
            self.static = origin[0]
        else:
            self.static = dynamics.static(bindings)
            self.static = added(self.static, difference(origin[0], self._evaluate(origin[1], None)))
        if force:
            self.static = added(self.static, force)

    def activate(self, a: State, only: Only = None) -> State:
        if self.compiles:
            return _kernels()[1](self.dynamics, a, self.bindings, only)
        return self.dynamics.activate(a, self.bindings, only)

    def field(self, h: State, only: Only = None) -> State:
        if self.linear:
            assert self.origin is not None
            h0 = self.origin[1]
            if all(t is h0[n] for n, t in h.items()):  # nothing has moved yet: no product needed
                f = {n: t for n, t in self.static.items() if only is None or n in only}
            else:
                f = self._evaluate(_Moved(h, h0), only)
        else:
            f = self._evaluate(h, only)
        if self.extra is not None:
            for n, t in self.extra(h).items():
                if n in f:
                    f[n] = f[n] + t
        return f

    def _evaluate(self, h: State, only: Only) -> State:
        if self._terms is not None:
            accumulate = _kernels()[0] if self.compiles else Energy.accumulate
            return accumulate(self._terms, h, self.static, only)
        evaluate = self.dynamics.map if self.as_map else self.dynamics.field
        return evaluate(h, self._used, self.static, only)

    def colours(self) -> list[frozenset[str]]:
        return self._inside(self.dynamics.colours())

    def eliminable(self) -> frozenset[str]:
        # a force that depends on the state may couple any nodes
        return self.dynamics.eliminable() & self._nodes if self.extra is None else frozenset()

    def _inside(self, groups: list[frozenset[str]]) -> list[frozenset[str]]:
        return [g & self._nodes for g in groups if g & self._nodes]

    def levels(self) -> list[frozenset[str]]:
        return self._inside(self.dynamics.levels())

    def stiffness(self) -> State:
        if self._terms is None:
            return {}
        out: State = {}
        for c, bound in self._terms:
            out = added(out, c.stiffness(bound))
        return out

    def resolved(self, z: State, stiffness: State) -> State:
        own = self.dynamics
        return {
            n: solve_implicit(own.activation(n), t, stiffness[n], self.bindings[f"node_{n}"]) if n in stiffness else t
            for n, t in z.items()
        }

    def joints(self) -> list[tuple[str, str, Operator, Tensor]]:
        return [
            (c.a, c.b, c.op, bound["strength"])
            for c, bound in self._terms or []
            if isinstance(c, Spring) and isinstance(c.op, Replicate)
        ]

    def slopes(self, a: State, h: State) -> State:
        own = self.dynamics
        return {n: slope(own.activation(n), t, h[n], self.bindings[f"node_{n}"]) for n, t in a.items()}

    def restricted(self, names: frozenset[str]) -> Relaxation | None:
        """The same relaxation of these nodes, without the couplings to others; None for a map that has no terms."""
        if self._terms is None or self.extra is not None or self.origin is not None:
            return None
        return self._part(names)

    def _part(self, names: frozenset[str]) -> Relaxation:
        if self._terms is None or names >= self._nodes:
            return self
        part = object.__new__(Relaxation)
        part.__dict__.update(self.__dict__)
        part._nodes = self._nodes & names
        part._terms = [(c, bound) for c, bound in self._terms if part._nodes.issuperset(c.nodes)]
        part.static = {n: t for n, t in self.static.items() if n in part._nodes}
        return part

    def energy(self, a: State, h: State) -> Tensor | None:
        if not isinstance(self.dynamics, Energy):
            return None
        e = self.dynamics(a, self.bindings)
        for n, t in (self.force or {}).items():
            e = e - dot(t, h[n])
        return e

    def selected(self, index: Tensor) -> Relaxation | None:
        """The same relaxation of the examples ``index``; None with a force that knows its whole batch."""
        if self.extra is not None:
            return None
        origin = None if self.origin is None else (take(self.origin[0], index), take(self.origin[1], index))
        part = object.__new__(Relaxation)
        part.__dict__.update(self.__dict__)
        part.bindings, part._used = selected(self.bindings, index), selected(self._used, index)
        part.force = None if self.force is None else take(self.force, index)
        part.static, part.origin = take(self.static, index), origin
        if self._terms is not None:
            assert isinstance(self.dynamics, Energy)
            part._terms = [
                (c, bound) for c, bound in self.dynamics.moving(part._used) if self._nodes.issuperset(c.nodes)
            ]
        return part

    def rounded(self) -> Relaxation | None:
        """The same relaxation with couplings rounded to bfloat16; None where nothing can be rounded."""
        first = next(iter(self.static.values()), None)
        if first is None or first.dtype != torch.float32 or not isinstance(self.dynamics, Energy) or self.coarse:
            return None
        if self.origin is not None and not self.linear:
            return None  # the rounding of f(h) - f(h0) would drown a small response
        own = (self.force, self.extra, self.as_map, self.origin)
        return Relaxation(self.dynamics, self.bindings, *own, True, self.compiles)._part(self._nodes)

    def compiled(self) -> Relaxation:
        """The same relaxation through ``torch.compile``; as it is where there is nothing to compile."""
        first = next(iter(self.static.values()), None)
        if self._terms is None or first is None or first.is_complex():
            return self
        part = object.__new__(Relaxation)
        part.__dict__.update(self.__dict__)
        part.compiles = True
        return part

    def around(self, f: State, h: State) -> Relaxation:
        """The same relaxation, computed from its field ``f`` at ``h``: rounding then only touches what moves on."""
        if not (isinstance(self.dynamics, Energy) and self.dynamics.linear):
            return self
        # f holds the forces already: the constant ones stay in it, those that turn are added anew
        f = f if self.extra is None else added(f, {n: -t for n, t in self.extra(h).items()})
        own = (None, self.extra, self.as_map, (f, h))
        return Relaxation(self.dynamics, self.bindings, *own, coarse=True, compiled=self.compiles)._part(self._nodes)


@functools.cache
def _kernels() -> tuple[Callable[..., State], Callable[..., State]]:
    """The compiled sum of couplings and the compiled activations; torch keeps one version per network and shape."""
    return torch.compile(Energy.accumulate, dynamic=False), torch.compile(Dynamics.activate, dynamic=False)


class _Moved(dict[str, Tensor]):
    """``h - h0``, node by node, formed for the nodes that are read."""

    def __init__(self, h: State, h0: State) -> None:
        super().__init__()
        self.h, self.h0 = h, h0

    def __missing__(self, name: str) -> Tensor:
        out = self[name] = self.h[name] - self.h0[name]
        return out


Measure = Callable[[State, State], Tensor]
"""``(residual, a) -> (B,)`` relative residual in [0, 1]; one that holds tensors of a batch has ``selected(index)``."""


def reduced(measure: Measure, index: Tensor) -> Measure:
    """The measure for the examples ``index``."""
    select = getattr(measure, "selected", None)
    return measure if select is None else select(index)


def _ratio(r: State, scale: State) -> Tensor:
    return _share(norm(r), norm(scale))


def _share(size: Tensor, scale: Tensor) -> Tensor:
    # 0 * scale: a state that has overflowed is nan, not settled because anything is small beside it
    return size / (size + scale).clamp_min(torch.finfo(size.dtype).tiny) + 0 * scale


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


class displacement_from:
    """The residual relative to the distance from ``start``: for one nudged phase, relative to the response."""

    def __init__(self, start: State) -> None:
        self.start = start

    def __call__(self, r: State, a: State) -> Tensor:
        return _ratio(r, difference(a, self.start))

    def selected(self, index: Tensor) -> Measure:
        return displacement_from(take(self.start, index))


class only_active:
    """A measure under which the examples without a cotangent have settled by definition.

    Relative to no response there is only rounding noise to measure.
    """

    def __init__(self, measure: Measure, active: Tensor) -> None:
        self.measure, self.active = measure, active

    def __call__(self, r: State, a: State) -> Tensor:
        ratio = self.measure(r, a)
        return torch.where(self.active, ratio, torch.zeros_like(ratio))

    def selected(self, index: Tensor) -> Measure:
        return only_active(reduced(self.measure, index), self.active.index_select(0, index))


class each_node:
    """A measure of every node by itself, the largest of which counts: no node is settled because others are large.

    A node whose residual is rounding has settled, also where it does not respond to a nudge at all.
    """

    def __init__(self, measure: Measure) -> None:
        self.measure = measure

    def __call__(self, r: State, a: State) -> Tensor:
        return torch.stack([self._of(r[n], a[n], n) for n in r]).amax(0)

    def _of(self, r: Tensor, a: Tensor, n: str) -> Tensor:
        size, scale = norm({n: r}), norm({n: a})
        # before the measure, which may put two phases together: both settle at once
        rounding = size <= 4 * torch.finfo(size.dtype).eps * scale
        return self.measure({n: torch.where(per_example(rounding, r), torch.zeros_like(r), r)}, {n: a})

    def selected(self, index: Tensor) -> Measure:
        return each_node(reduced(self.measure, index))
