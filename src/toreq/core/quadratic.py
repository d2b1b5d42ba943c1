"""Couplings that are quadratic in their nodes: springs between two nodes, and a node's pull on itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toreq.core.couplings import Coupling
from toreq.core.operators import Operator
from toreq.core.state import Bound, State, difference, dot, mean, per_example
from toreq.errors import ConfigError


class Spring(Coupling):
    r"""A spring between two nodes: :math:`K = -\tfrac\lambda2\|h_a - A h_b\|^2`.

    Field: :math:`-\lambda(h_a - A h_b)` on a and :math:`\lambda A^\top(h_a - A h_b)` on b.

    Args:
        a, b: names of two different nodes.
        op: operator from the shape of b to that of a.
        strength: :math:`\lambda > 0`.
        learnable: learn :math:`\log\lambda`.
    """

    analytic = True
    linear = True

    def __init__(self, a: str, b: str, op: Operator, strength: float = 1.0, learnable: bool = False) -> None:
        super().__init__([a, b])
        if a == b or not strength > 0:
            raise ConfigError(f"Spring: expected two nodes and strength > 0, got {a!r}, {b!r}, {strength}; check both")
        self.a, self.b, self.op = a, b, op
        self.log_strength = nn.Parameter(torch.tensor(strength).log(), requires_grad=learnable)

    def bind(self, x: Any) -> Bound:
        return Bound(shared={**self.op.tensors(), "strength": self.log_strength.exp()})

    def _stretch(self, h: State, bound: Bound) -> Tensor:
        return h[self.a] - self.op(h[self.b], {k: v for k, v in bound.shared.items() if k != "strength"})

    def value(self, h: State, bound: Bound) -> Tensor:
        e = self._stretch(h, bound)
        return -0.5 * bound["strength"] * dot(e, e)

    def field(self, h: State, bound: Bound) -> State:
        pull = bound["strength"] * self._stretch(h, bound)
        tensors = {k: v for k, v in bound.shared.items() if k != "strength"}
        return {self.a: -pull, self.b: self.op.adjoint(pull, tensors)}

    def gradient(self, plus: State, minus: State, weight: Tensor, bound: Bound) -> dict[str, Tensor]:
        d, m = difference(plus, minus), mean(plus, minus)
        de, me = self._stretch(d, bound), self._stretch(m, bound)
        wde = de * per_example(weight, de)
        grads = {"strength": -dot(wde, me).sum()}
        tensors = {k: v for k, v in bound.shared.items() if k != "strength"}
        if tensors:
            wme = me * per_example(weight, me)
            pulls = bound["strength"] * torch.cat([wde, wme])
            grads |= self.op.gradient(pulls, torch.cat([m[self.b], d[self.b]]), tensors)
        return grads

    def stiffness(self, bound: Bound) -> State:
        # the middle of the spectrum of A^T A: what is left of it then converges fastest
        middle = 0.0 if self.op.gram is None else sum(self.op.gram) / 2
        return {self.a: bound["strength"], self.b: middle * bound["strength"]}


class SelfCoupling(Coupling):
    r"""A uniform self-coupling :math:`K = \tfrac{s}2\|h\|^2`, field :math:`s h`.

    Args:
        node: the node's name.
        strength: s; what a recurrent torus adds to an energy.
    """

    analytic = True
    linear = True

    def __init__(self, node: str, strength: float) -> None:
        super().__init__([node])
        self.node, self.strength = node, strength

    def value(self, h: State, bound: Bound) -> Tensor:
        return 0.5 * self.strength * dot(h[self.node], h[self.node])

    def field(self, h: State, bound: Bound) -> State:
        return {self.node: self.strength * h[self.node]}
