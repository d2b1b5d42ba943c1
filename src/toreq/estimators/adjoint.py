"""The adjoint problem: in general by vector-Jacobian products, in closed form where couplings are linear, and for a
pyramid in the form in which springs can be treated implicitly."""

from __future__ import annotations

import torch
from torch import Tensor

from toreq.core import Energy, LayerNorm, Operator
from toreq.core.couplings import Only
from toreq.core.spectral import field_products
from toreq.core.state import State, added
from toreq.estimators.base import FreePhase
from toreq.solvers.problem import Relaxation


class Adjoint:
    r"""The linear problem :math:`w = v + J^\top u,\ u = \sigma'(a_0)\,w`, in the form solvers relax."""

    def __init__(self, free: FreePhase, v: State) -> None:
        self.free, self.v = free, v
        self.transpose, _ = field_products(free.dynamics, free.h, free.bindings)

    def activate(self, a: State, only: Only = None) -> State:
        wanted = {n: t for n, t in a.items() if only is None or n in only}
        return self.free.dynamics.derivative(self.free.a, self.free.h, wanted, self.free.bindings)

    def field(self, h: State, only: Only = None) -> State:
        w = added(self.transpose(h), self.v)
        return {n: t for n, t in w.items() if only is None or n in only}

    def colours(self) -> list[frozenset[str]]:
        # every product costs a whole sweep, so block order would not pay
        return [frozenset(self.free.dynamics.names)]

    def eliminable(self) -> frozenset[str]:
        return frozenset()

    def energy(self, a: State, h: State) -> Tensor | None:
        return None


class LinearAdjoint(Adjoint):
    """The same where every coupling is linear: J then is the couplings themselves, and symmetric, so that no autograd
    is needed and block order pays as it does for the network."""

    def __init__(self, free: FreePhase, v: State, energy: Energy) -> None:
        self.free, self.v, self.dynamics = free, v, energy
        self.terms = energy.moving(free.bindings)

    def field(self, h: State, only: Only = None) -> State:
        return Energy.accumulate(self.terms, h, self.v, only)

    def colours(self) -> list[frozenset[str]]:
        return self.dynamics.colours()

    def eliminable(self) -> frozenset[str]:
        return self.dynamics.eliminable()


class SpringAdjoint(Adjoint):
    r"""The same for a network with levels: springs pull on u as they pull on h, and :math:`u = \sigma' w` is linear, so
    that :math:`w + s\,\sigma' w = z` has a closed form."""

    def __init__(self, free: FreePhase, v: State) -> None:
        super().__init__(free, v)
        self.relaxation = Relaxation(free.dynamics, free.bindings)

    def levels(self) -> list[frozenset[str]]:
        return [frozenset(self.free.dynamics.names)]

    def stiffness(self) -> State:
        return self.relaxation.stiffness()

    def joints(self) -> list[tuple[str, str, Operator, Tensor]]:
        return self.relaxation.joints()

    def restricted(self, names: frozenset[str]) -> None:
        return None

    def resolved(self, z: State, stiffness: State) -> State:
        return {n: self._solved(n, t, stiffness[n]) if n in stiffness else t for n, t in z.items()}

    def _solved(self, n: str, z: Tensor, s: Tensor) -> Tensor:
        activation = self.free.dynamics.activation(n)
        if not isinstance(activation, LayerNorm):
            return z / (1 + s * self.activate({n: torch.ones_like(z)})[n])
        # of three parts, the derivative gives none of the mean, almost none of the token's own direction, and the
        # slope times the rest
        w = self.relaxation.slopes({n: self.free.a[n]}, {n: self.free.h[n]})[n]
        centred = self.free.a[n] - self.free.a[n].mean(-1, keepdim=True)
        squares = (centred * centred).mean(-1, keepdim=True)
        mean = z.mean(-1, keepdim=True)
        along = centred * ((z * centred).mean(-1, keepdim=True) / squares.clamp_min(torch.finfo(z.dtype).tiny))
        radial = w * activation.eps / (squares + activation.eps)
        return mean + along / (1 + s * radial) + (z - mean - along) / (1 + s * w)

    def slopes(self, a: State, h: State) -> State:
        return self.relaxation.slopes({n: self.free.a[n] for n in a}, {n: self.free.h[n] for n in a})


def adjoint(free: FreePhase, v: State) -> Adjoint:
    """The adjoint problem of a free phase for the cotangent ``v``."""
    if len(free.dynamics.levels()) > 1:
        return SpringAdjoint(free, v)
    if isinstance(free.dynamics, Energy) and free.dynamics.linear:
        return LinearAdjoint(free, v, free.dynamics)
    return Adjoint(free, v)
