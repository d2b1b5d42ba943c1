"""Couplings: the terms of K, each with its field dK/dh in closed form and its weight gradient from local states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toreq.core.functions import log_cosh, tanh
from toreq.core.operators import Operator
from toreq.core.pickling import Picklable
from toreq.core.state import Bound, State, difference, dot, joined, mean, per_example
from toreq.errors import ConfigError

Only = frozenset[str] | None
"""Names of the nodes whose field is wanted; None for all."""


class Coupling(Picklable, ABC):
    r"""One term :math:`K(h; x)` of an energy, per example.

    A subclass needs :meth:`value`; :meth:`field` and :meth:`gradient` then follow by autograd, and are overridden where
    a closed form is faster. ``analytic`` says whether complex states are accepted, ``self_reading``
    whether a node's field depends on that node itself, ``linear`` whether the field is a linear function of the state
    (all are safe as they are).

    Args:
        nodes: names of the nodes it joins.
    """

    analytic: bool = False
    self_reading: bool = True
    linear: bool = False
    nodes: tuple[str, ...]

    def __init__(self, nodes: Sequence[str]) -> None:
        super().__init__()
        self.nodes = tuple(dict.fromkeys(nodes))

    def bind(self, x: Any) -> Bound:
        """Everything that depends on weights and input only, computed once per relaxation."""
        return Bound()

    def rounded(self, bound: Bound) -> Bound:
        """The same with the operator's weights rounded to bfloat16, where it has some and can multiply by them."""
        op = getattr(self, "op", None)
        return Bound(op.rounded(bound.shared), bound.batched) if isinstance(op, Operator) else bound

    @abstractmethod
    def value(self, h: State, bound: Bound) -> Tensor:
        """K per example, ``(B,)``."""

    def field(self, h: State, bound: Bound) -> State:
        r""":math:`\partial K/\partial h_i` for each of :attr:`nodes`."""
        track = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = {n: h[n] if track and h[n].requires_grad else h[n].detach().requires_grad_() for n in self.nodes}
            total = self.value({**h, **inputs}, bound).sum()
            grads = torch.autograd.grad(total, list(inputs.values()), create_graph=track, materialize_grads=True)
        return dict(zip(self.nodes, grads, strict=True))

    def stiffness(self, bound: Bound) -> State:
        r"""Strengths s >= 0 (scalars) of pulls :math:`-s h_i` that a solver may treat implicitly, by node; any splits
        the field correctly, the right ones make it fast."""
        return {}

    def add_field(self, acc: State, h: State, bound: Bound, only: Only = None) -> None:
        """Add this term's field to ``acc``, a mutable accumulator of new tensors (the tensors are never written to)."""
        for name, f in self.field(h, bound).items():
            if only is None or name in only:
                acc[name] = acc[name] + f if name in acc else f

    def gradient(self, plus: State, minus: State, weight: Tensor, bound: Bound) -> dict[str, Tensor]:
        r"""Gradient of :math:`\sum_b w_b\,[K_b(h^+) - K_b(h^-)]` with respect to the bound tensors.

        Only the states of :attr:`nodes` enter, which is what makes the learning rule local.

        Args:
            plus, minus: states ``(B, ...)``.
            weight: ``(B,)``.
            bound: what :meth:`bind` returned.
        """
        with torch.enable_grad():
            leaf = bound.map(_leaf, _leaf)
            total = (weight * (self.value(plus, leaf) - self.value(minus, leaf))).sum()
        return _grads(total, leaf)


def _leaf(t: Tensor) -> Tensor:
    t = t.detach()
    return t.requires_grad_() if t.is_floating_point() or t.is_complex() else t


def _grads(total: Tensor, leaf: Bound) -> dict[str, Tensor]:
    wanted = {k: t for group in (leaf.shared, leaf.batched) for k, t in group.items() if t.requires_grad}
    if not wanted or not total.requires_grad:
        return {}
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {k: g for k, g in zip(wanted, grads, strict=True) if g is not None}


class Drive(Coupling):
    r"""The input's pull on one node: :math:`K = \langle h, d\rangle`, field :math:`d = \mathrm{module}(x)`.

    Args:
        node: name of the driven node.
        module: maps ``x`` to ``(B, *node_shape)``; any module, evaluated once per relaxation with ordinary autograd.
    """

    analytic = True
    linear = True
    self_reading = False

    def __init__(self, node: str, module: nn.Module) -> None:
        super().__init__([node])
        self.node = node
        self.module = module

    def bind(self, x: Any) -> Bound:
        return Bound(batched={"drive": self.module(x)})

    def value(self, h: State, bound: Bound) -> Tensor:
        return dot(h[self.node], bound["drive"])

    def field(self, h: State, bound: Bound) -> State:
        return {self.node: bound["drive"]}

    def gradient(self, plus: State, minus: State, weight: Tensor, bound: Bound) -> dict[str, Tensor]:
        d = plus[self.node] - minus[self.node]
        return {"drive": d * per_example(weight, d)}


def flat(gate: nn.Module) -> bool:
    """Whether a gate says that it has no slope, neither in its input nor in parameters."""
    return bool(getattr(gate, "flat", False))


def _op_bound(op: Operator, x: Any = None, module: nn.Module | None = None) -> Bound:
    return Bound(shared=op.tensors(), batched={"drive": module(x)} if module is not None and x is not None else {})


class Bilinear(Coupling):
    r"""Two nodes joined by one operator: :math:`K = \langle h_{post}, A h_{pre}\rangle`.

    Field: :math:`A h_{pre}` on ``post`` and :math:`A^\top h_{post}` on ``pre``.

    Args:
        op: operator from the shape of ``pre`` to that of ``post``; what of it depends on the input is computed once per
            relaxation.
        pre, post: two different nodes (for one node with itself see :class:`Lateral`).
    """

    analytic = True
    linear = True
    self_reading = False

    def __init__(self, op: Operator, pre: str, post: str) -> None:
        super().__init__([pre, post])
        if pre == post:
            raise ConfigError(f"Bilinear: expected two different nodes, got {pre!r} twice; use Lateral(op, {pre!r})")
        self.op, self.pre, self.post = op, pre, post

    def bind(self, x: Any) -> Bound:
        return Bound(self.op.tensors(), self.op.inputs(x))

    def value(self, h: State, bound: Bound) -> Tensor:
        return dot(h[self.post], self.op(h[self.pre], _tensors(bound)))

    def field(self, h: State, bound: Bound) -> State:
        acc: State = {}
        self.add_field(acc, h, bound)
        return acc

    def add_field(self, acc: State, h: State, bound: Bound, only: Only = None) -> None:
        tensors = _tensors(bound)
        if only is None or self.post in only:
            acc[self.post] = self.op.add(acc.get(self.post), h[self.pre], tensors)
        if only is None or self.pre in only:
            acc[self.pre] = self.op.add_adjoint(acc.get(self.pre), h[self.post], tensors)

    def gradient(self, plus: State, minus: State, weight: Tensor, bound: Bound) -> dict[str, Tensor]:
        # <p+, A q+> - <p-, A q-> = <dp, A mq> + <mp, A dq>: differences are formed before products, so that a small
        # nudge loses no digits
        d, m = difference(plus, minus), mean(plus, minus)
        dp = d[self.post] * per_example(weight, d[self.post])
        mp = m[self.post] * per_example(weight, m[self.post])
        return _doubled(self.op, joined([dp, mp]), joined([m[self.pre], d[self.pre]]), bound)


def _tensors(bound: Bound) -> dict[str, Tensor]:
    """What an operator is to be called with."""
    return {**bound.shared, **bound.batched} if bound.batched else bound.shared


def _doubled(op: Operator, w: Tensor, u: Tensor, bound: Bound) -> dict[str, Tensor]:
    """The operator's gradient for two batches in one; what depends on the input gets the sum over both."""
    if not bound.batched:
        return op.gradient(w, u, bound.shared)
    both = bound.map(lambda t: t, lambda t: joined([t] * 2))
    size = w.shape[0] // 2
    grads = op.gradient(w, u, _tensors(both))
    return {k: g[:size] + g[size:] if k in both.batched else g for k, g in grads.items()}


class Lateral(Coupling):
    r"""A node coupled to itself: :math:`K = \tfrac12\langle g * h, A(g * h)\rangle`, A symmetric.

    Field: :math:`g * A(g * h)`. Without a gate g = 1. A gate is a function of the input alone and is learned by
    contrast like any drive (a gate on the damping would not move the equilibrium and so would have zero gradient).

    Args:
        op: a symmetric operator on the node's shape.
        node: the node's name.
        gate: module mapping ``x`` to g of shape ``(B, *node_shape)``, usually ending in a sigmoid; one with a true
            attribute ``flat`` opens and closes without a slope, and no gradient is computed for it.
    """

    analytic = True
    linear = True

    def __init__(self, op: Operator, node: str, gate: nn.Module | None = None) -> None:
        super().__init__([node])
        if not op.symmetric:
            raise ConfigError(f"Lateral: expected a symmetric operator, got {op}; pass symmetric=True to it")
        self.op, self.node, self.gate = op, node, gate

    def bind(self, x: Any) -> Bound:
        return Bound(self.op.tensors(), {} if self.gate is None else {"gate": self.gate(x)})

    def _gated(self, h: State, bound: Bound) -> Tensor:
        u = h[self.node]
        return u if self.gate is None else bound["gate"] * u

    def value(self, h: State, bound: Bound) -> Tensor:
        u = self._gated(h, bound)
        return 0.5 * dot(u, self.op(u, bound.shared))

    def field(self, h: State, bound: Bound) -> State:
        f = self.op(self._gated(h, bound), bound.shared)
        return {self.node: f if self.gate is None else bound["gate"] * f}

    def add_field(self, acc: State, h: State, bound: Bound, only: Only = None) -> None:
        if only is not None and self.node not in only:
            return
        if self.gate is None:
            acc[self.node] = self.op.add(acc.get(self.node), h[self.node], bound.shared)
        else:
            super().add_field(acc, h, bound, only)

    def gradient(self, plus: State, minus: State, weight: Tensor, bound: Bound) -> dict[str, Tensor]:
        d, m = plus[self.node] - minus[self.node], torch.lerp(plus[self.node], minus[self.node], 0.5)
        wd = d * per_example(weight, d)
        if self.gate is None:
            return self.op.gradient(wd, m, bound.shared)
        g = bound["gate"]
        grads = self.op.gradient(g * wd, g * m, bound.shared)
        if not flat(self.gate):
            # d/dg of 1/2 <gh, A gh> is h * A(gh); its contrast, again differences first
            grads["gate"] = wd * self.op(g * m, bound.shared) + m * self.op(g * wd, bound.shared)
        return grads


class Potential(Coupling):
    r"""The tied feed-forward block: :math:`K = \sum\phi(A h + c)`, field :math:`A^\top\phi'(A h + c)`.

    Args:
        op: operator from the node's shape to the hidden shape.
        node: the node's name.
        phi: ``"log_cosh"`` (:math:`\phi' = \tanh`), ``"softplus"`` (logistic) or ``"relu2"``
            (:math:`\tfrac12\max(z,0)^2`, :math:`\phi' = \max(z, 0)`, with a kink).
        bias: learn a bias c over the hidden operator's last axis.
        drive: module mapping ``x`` to a further, input-dependent part of c, ``(B, *hidden_shape)``.
    """

    def __init__(
        self,
        op: Operator,
        node: str,
        phi: str = "log_cosh",
        bias: bool = True,
        drive: nn.Module | None = None,
    ) -> None:
        super().__init__([node])
        if phi not in PHI:
            raise ConfigError(f"Potential: expected phi in {sorted(PHI)}, got {phi!r}; use one of them")
        self.op, self.node, self.phi, self.drive = op, node, phi, drive
        self.analytic = phi != "relu2"
        self.bias = nn.Parameter(torch.zeros(op.out_shape)) if bias else None

    def bind(self, x: Any) -> Bound:
        bound = _op_bound(self.op, x, self.drive)
        bound.batched.update(self.op.inputs(x))
        if self.bias is not None:
            bound.shared["bias"] = self.bias
        return bound

    def _z(self, h: Tensor, bound: Bound) -> Tensor:
        return self._shifted(self.op(h, _tensors(bound)), bound)

    def _shifted(self, z: Tensor, bound: Bound) -> Tensor:
        if self.bias is not None:
            z = z + bound["bias"]
        return z if self.drive is None else z + bound["drive"]

    def value(self, h: State, bound: Bound) -> Tensor:
        return PHI[self.phi][0](self._z(h[self.node], bound)).flatten(1).sum(1)

    def field(self, h: State, bound: Bound) -> State:
        return {self.node: self.op.adjoint(PHI[self.phi][1](self._z(h[self.node], bound)), _tensors(bound))}

    def gradient(self, plus: State, minus: State, weight: Tensor, bound: Bound) -> dict[str, Tensor]:
        # as for Bilinear, and phi'(z+) - phi'(z-) from z+ - z- = A(h+ - h-) too
        size = weight.shape[0]
        u, du = minus[self.node], plus[self.node] - minus[self.node]
        both = bound.map(lambda t: t, lambda t: joined([t] * 2))
        tensors = {k: v for k, v in _tensors(both).items() if k not in ("bias", "drive")}
        z, dz = self.op(joined([u, du]), tensors).split(size)
        z = self._shifted(z, bound)
        slope, rise = PHI[self.phi][1:]
        p, q = slope(z + dz), slope(z)
        dp, mp = rise(dz, p, q), torch.lerp(q, p, 0.5)
        dp, mp = dp * per_example(weight, dp), mp * per_example(weight, mp)
        mu = torch.lerp(u, plus[self.node], 0.5)
        grads = self.op.gradient(joined([dp, mp]), joined([mu, du]), tensors)
        grads = {k: g[:size] + g[size:] if k in both.batched else g for k, g in grads.items()}
        if self.bias is not None:
            grads["bias"] = dp.sum_to_size(self.bias.shape)
        if self.drive is not None:
            grads["drive"] = dp
        return grads


_Map = Callable[[Tensor], Tensor]


def _softplus(z: Tensor) -> Tensor:
    return torch.log1p(z.exp()) if z.is_complex() else nn.functional.softplus(z)


def _logistic(z: Tensor) -> Tensor:
    return 1 / (1 + (-z).exp()) if z.is_complex() else z.sigmoid()


def _half_relu_squared(z: Tensor) -> Tensor:
    return 0.5 * z.relu().square()


def _tanh_rise(dz: Tensor, p: Tensor, q: Tensor) -> Tensor:
    # tanh(x) - tanh(y) = tanh(x - y) (1 - tanh(x) tanh(y)); not by the fast tanh, exact to the rounding of 1 only
    return dz.tanh() * (1 - p * q)


def _logistic_rise(dz: Tensor, p: Tensor, q: Tensor) -> Tensor:
    # the same for (1 + tanh(z / 2)) / 2
    return (0.5 * dz).tanh() * (p + q - 2 * p * q)


def _relu_rise(dz: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return torch.where((p > 0) & (q > 0), dz, p - q)


PHI: dict[str, tuple[_Map, _Map, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "log_cosh": (log_cosh, tanh, _tanh_rise),
    "softplus": (_softplus, _logistic, _logistic_rise),
    "relu2": (_half_relu_squared, torch.relu, _relu_rise),
}
"""Potentials phi, their derivatives, and :math:`\\phi'(x) - \\phi'(y)` from x - y and the derivatives."""
