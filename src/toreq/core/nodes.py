"""Nodes and their activations: every activation is the gradient of a convex potential."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toreq.core.functions import log_cosh, log_sum_exp, softmax, tanh
from toreq.core.state import Bound, per_example
from toreq.errors import ConfigError


class Activation(nn.Module, ABC):
    r"""An activation :math:`\sigma = \nabla\Phi` with :math:`\Phi` convex.

    ``analytic`` activations accept complex states (needed by the holomorphic estimator); ``smooth`` ones have a
    continuous derivative, so that a centered contrast has an error of second order in beta. Those with ``samples`` are
    one to one, unit by unit, and have :meth:`log_slope` and its gradient: a law of the activations can be sampled in
    their pre-activations.
    """

    analytic: bool = True
    smooth: bool = True
    samples: bool = False
    gain: float = 1.0
    """Slope at its steepest, where the activation has one slope for all."""
    unsampled: str = "it does not give log_slope and log_slope_gradient"
    """Why the activation cannot be sampled, where it cannot."""

    def bind(self) -> Bound:
        """The activation's own tensors, none unless it has parameters."""
        return Bound()

    @abstractmethod
    def forward(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        r""":math:`h = \sigma(a)`, ``(B, ...) -> (B, ...)``."""

    @abstractmethod
    def potential(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        r""":math:`\Phi(a)` per example, ``(B, ...) -> (B,)``."""

    @abstractmethod
    def derivative(self, a: Tensor, h: Tensor, w: Tensor, bound: Bound | None = None) -> Tensor:
        r""":math:`\sigma'(a)\,w` with ``h = sigma(a)`` given; symmetric in its action, since it is a Hessian."""

    def increment(self, a: Tensor, origin: Tensor, h: Tensor, bound: Bound | None = None) -> Tensor:
        r""":math:`\sigma(a) - \sigma(a_0)`, ``h = sigma(origin)`` given; small ones keep their digits."""
        return self(a, bound) - h

    def gradient(self, plus: Tensor, minus: Tensor, weight: Tensor, bound: Bound) -> dict[str, Tensor]:
        r"""Gradient of :math:`\sum_b w_b\,[\Phi_b(a^+) - \Phi_b(a^-)]` with respect to the activation's own tensors.

        Args:
            plus, minus: pre-activations ``(B, ...)``.
            weight: ``(B,)``.
            bound: what :meth:`bind` returned.
        """
        if not bound.shared:
            return {}
        with torch.enable_grad():
            leaf = bound.map(lambda t: t.detach().requires_grad_(), lambda t: t)
            total = (weight * (self.potential(plus.detach(), leaf) - self.potential(minus.detach(), leaf))).sum()
        grads = torch.autograd.grad(total, list(leaf.shared.values()), materialize_grads=True)
        return dict(zip(leaf.shared, grads, strict=True))

    def conjugate(self, a: Tensor, h: Tensor, bound: Bound | None = None) -> Tensor:
        r""":math:`\Phi^*(h) = \langle a, h\rangle - \Phi(a)` at ``h = sigma(a)``, per example ``(B,)``."""
        return (a * h).flatten(1).sum(1) - self.potential(a, bound)

    def log_slope(self, a: Tensor, h: Tensor) -> Tensor:
        r""":math:`\log\det\sigma'(a)` per example, ``(B,)``: how a volume of a measures as a volume of h."""
        raise self._refusal()

    def log_slope_gradient(self, a: Tensor, h: Tensor) -> Tensor:
        r""":math:`\nabla_a\log\det\sigma'(a)`, ``(B, ...)``, with ``h = sigma(a)`` given."""
        raise self._refusal()

    def _refusal(self) -> ConfigError:
        where = type(self).__name__
        return ConfigError(f"{where}: expected an activation that can be sampled, got {where}; {self.unsampled}")


class Identity(Activation):
    r""":math:`\sigma(a) = g a`, :math:`\Phi(a) = \tfrac g2\|a\|^2`, and so the node's own energy
    :math:`\Phi^*(h) = \tfrac1{2g}\|h\|^2`.

    With :math:`g = 1/(1 + \kappa)` and a :class:`~toreq.core.Drive` :math:`\kappa x` it is a visible node under a soft
    clamp of strength kappa: :math:`h = (f + \kappa x)/(1 + \kappa)`, that is
    :math:`E = \tfrac{1+\kappa}2\|h\|^2 - \kappa\langle h, x\rangle - K = \tfrac12\|h\|^2 +
    \tfrac\kappa2\|h - x\|^2 - K + \mathrm{const}`.

    Args:
        gain: slope g, above 0; 1 is the ordinary identity.
    """

    samples = True

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = _checked_gain("Identity", gain, "the identity")

    def forward(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        return a if self.gain == 1 else self.gain * a

    def potential(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        return 0.5 * self.gain * (a * a).flatten(1).sum(1)

    def derivative(self, a: Tensor, h: Tensor, w: Tensor, bound: Bound | None = None) -> Tensor:
        return w if self.gain == 1 else self.gain * w

    def increment(self, a: Tensor, origin: Tensor, h: Tensor, bound: Bound | None = None) -> Tensor:
        return self(a - origin)

    def log_slope(self, a: Tensor, h: Tensor) -> Tensor:
        return a.new_full((a.shape[0],), math.log(self.gain) * math.prod(a.shape[1:]))

    def log_slope_gradient(self, a: Tensor, h: Tensor) -> Tensor:
        return torch.zeros_like(a)


class Tanh(Activation):
    r""":math:`\sigma(a) = \tanh(g a)`, :math:`\Phi(a) = \tfrac1g\sum\log\cosh(g a)`.

    Args:
        gain: slope g at the origin, above 0. In a layered network a steeper upper layer makes the way up stronger than
            the way down at the same radius of the relaxation.
    """

    samples = True

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = _checked_gain("Tanh", gain, "the ordinary tanh")

    def forward(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        return tanh(a, self.gain)

    def potential(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        return log_cosh(self.gain * a).flatten(1).sum(1) / self.gain

    def derivative(self, a: Tensor, h: Tensor, w: Tensor, bound: Bound | None = None) -> Tensor:
        w = w * (1 - h * h)
        return w if self.gain == 1 else self.gain * w

    def increment(self, a: Tensor, origin: Tensor, h: Tensor, bound: Bound | None = None) -> Tensor:
        # tanh(x) - tanh(y) = tanh(x - y) (1 - tanh(x) tanh(y)): the fast tanh is exact to the rounding of 1 only
        return (self.gain * (a - origin)).tanh() * (1 - h * self(a))

    def log_slope(self, a: Tensor, h: Tensor) -> Tensor:
        # not by way of 1 - h^2, which rounds to 0 in the tails
        steepest = math.log(self.gain) * math.prod(a.shape[1:])
        return steepest - 2 * log_cosh(self.gain * a).flatten(1).sum(1)

    def log_slope_gradient(self, a: Tensor, h: Tensor) -> Tensor:
        return (-2 * self.gain) * h


class HardSigmoid(Activation):
    r""":math:`\sigma(a) = \mathrm{clip}(g a, 0, 1)`, with g = 1 the rate of Scellier and Bengio (2017).

    :math:`\Phi(a) = 0` below 0, :math:`g a^2/2` in [0, 1/g], :math:`a - 1/2g` above. With :math:`g = 1/(1 + \kappa)`
    and a :class:`~toreq.core.Drive` :math:`\kappa x` it is a visible node in [0, 1] under a soft clamp of strength
    kappa: :math:`h = \mathrm{clip}((f + \kappa x)/(1 + \kappa), 0, 1)`, that is
    :math:`E = \tfrac{1+\kappa}2\|h\|^2 - \kappa\langle h, x\rangle - K` on [0, 1], as for :class:`Identity`.

    Args:
        gain: slope g, above 0.
    """

    analytic = False
    smooth = False
    unsampled = "it is flat outside [0, 1], so that exp(-E) cannot be normalised over its pre-activations"

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = _checked_gain("HardSigmoid", gain, "the ordinary hard sigmoid")

    def forward(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        return (a if self.gain == 1 else self.gain * a).clamp(0, 1)

    def potential(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        h = self(a)
        return (h * (a - (0.5 / self.gain) * h)).flatten(1).sum(1)

    def derivative(self, a: Tensor, h: Tensor, w: Tensor, bound: Bound | None = None) -> Tensor:
        inside = (a > 0) & (self.gain * a < 1)
        return torch.where(inside, w if self.gain == 1 else self.gain * w, torch.zeros_like(w))


class ReLU(Activation):
    r""":math:`\sigma(a) = g\max(a, 0)`, :math:`\Phi(a) = \tfrac g2\|\max(a, 0)\|^2`.

    Args:
        gain: slope g above 0, as for :class:`Tanh`.
    """

    analytic = False
    smooth = False
    unsampled = "it is flat below 0, so that exp(-E) cannot be normalised over its pre-activations"

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = _checked_gain("ReLU", gain, "the ordinary relu")

    def forward(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        return a.relu() if self.gain == 1 else (self.gain * a).relu_()

    def potential(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        return 0.5 * self.gain * a.relu().square().flatten(1).sum(1)

    def derivative(self, a: Tensor, h: Tensor, w: Tensor, bound: Bound | None = None) -> Tensor:
        return torch.where(a > 0, w if self.gain == 1 else self.gain * w, torch.zeros_like(w))


class Softmax(Activation):
    r""":math:`\sigma(a) = \mathrm{softmax}(g a)` over the last axis, :math:`\Phi(a) = \tfrac1g\sum\log\sum\exp g a`.

    Args:
        gain: slope g, above 0; 1 is the ordinary softmax.
    """

    unsampled = "adding a constant to its pre-activations changes nothing: exp(-E) cannot be normalised over them"

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = _checked_gain("Softmax", gain, "the ordinary softmax")

    def _scaled(self, a: Tensor) -> Tensor:
        return a if self.gain == 1 else self.gain * a

    def forward(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        return softmax(self._scaled(a))

    def potential(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        return log_sum_exp(self._scaled(a)).reshape(len(a), -1).sum(1) / self.gain

    def derivative(self, a: Tensor, h: Tensor, w: Tensor, bound: Bound | None = None) -> Tensor:
        w = h * (w - (h * w).sum(-1, keepdim=True))
        return w if self.gain == 1 else self.gain * w

    def increment(self, a: Tensor, origin: Tensor, h: Tensor, bound: Bound | None = None) -> Tensor:
        # h exp(u - c) - h, where c keeps the sum at 1: no digits are lost where u is small
        u = self._scaled(a - origin)
        small = u.abs().amax(-1, keepdim=True) < 1
        u = u.clamp(-1, 1)
        exact = h * torch.expm1(u - torch.log1p((h * torch.expm1(u)).sum(-1, keepdim=True)))
        return torch.where(small, exact, self(a) - h)


class LayerNorm(Activation):
    r"""Layer norm over the last axis with one scalar gain and a bias vector.

    .. math:: \sigma(a) = g\,\frac{a - \bar a}{\sqrt{\mathrm{var}(a) + \epsilon}} + b, \qquad
              \Phi(a) = g D \sqrt{\mathrm{var}(a) + \epsilon} + \langle b, a\rangle

    A gain per feature would not be a gradient field; put it into an operator instead. The gain is kept positive
    (:math:`g = \exp(\text{log\_gain})`), without which :math:`\Phi` would not be convex.

    Args:
        features: size D of the last axis, at least 2.
        learnable: whether gain and bias are parameters.
        eps: added to the variance.
    """

    unsampled = "adding a constant to its pre-activations changes nothing: exp(-E) cannot be normalised over them"

    def __init__(self, features: int, learnable: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        if features < 2:
            raise ConfigError(f"LayerNorm: expected features >= 2, got {features}; a single feature has no variance")
        self.features = features
        self.eps = eps
        self.log_gain = nn.Parameter(torch.zeros(()), requires_grad=learnable)
        self.bias = nn.Parameter(torch.zeros(features), requires_grad=learnable)

    def bind(self) -> Bound:
        return Bound(shared={"gain": self.log_gain.exp(), "bias": self.bias})

    def _parts(self, a: Tensor) -> tuple[Tensor, Tensor]:
        centred = a - a.mean(-1, keepdim=True)
        # squares without abs keep the function analytic for complex states
        return centred, ((centred * centred).mean(-1, keepdim=True) + self.eps).sqrt()

    def forward(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        bound = self.bind() if bound is None else bound
        if not a.is_complex():
            gain = bound["gain"].expand(self.features)
            return nn.functional.layer_norm(a, (self.features,), gain, bound["bias"], self.eps)
        centred, std = self._parts(a)
        return centred * (bound["gain"] / std) + bound["bias"]

    def potential(self, a: Tensor, bound: Bound | None = None) -> Tensor:
        bound = self.bind() if bound is None else bound
        _, std = self._parts(a)
        return self.features * bound["gain"] * std.flatten(1).sum(1) + (a * bound["bias"]).flatten(1).sum(1)

    def derivative(self, a: Tensor, h: Tensor, w: Tensor, bound: Bound | None = None) -> Tensor:
        bound = self.bind() if bound is None else bound
        centred, std = self._parts(a)
        unit = centred / std
        w = w - w.mean(-1, keepdim=True)
        return (bound["gain"] / std) * (w - unit * (unit * w).mean(-1, keepdim=True))

    def gradient(self, plus: Tensor, minus: Tensor, weight: Tensor, bound: Bound) -> dict[str, Tensor]:
        # s+ - s- = (var+ - var-)/(s+ + s-), and var+ - var- = <c+ - c-, c+ + c->/D: nothing nearly equal is subtracted
        # but the states
        da = plus - minus
        (c, s), (d, t) = self._parts(plus), self._parts(minus)
        change = ((da - da.mean(-1, keepdim=True)) * (c + d)).mean(-1, keepdim=True) / (s + t)
        axes = tuple(range(da.dim() - 1))
        return {
            "gain": self.features * (weight * change.flatten(1).sum(1)).sum(),
            "bias": (da * per_example(weight, da)).sum(axes),
        }


@dataclass(frozen=True)
class Node:
    """A named group of units of one shape, with the activation they share.

    Args:
        name: unique in its network; letters, digits and underscores.
        shape: shape of one example's units, e.g. ``(512,)`` or ``(N, D)`` or ``(C, H, W)``.
        activation: the units' activation.

    Raises:
        ConfigError: for an empty or non-positive shape, or a name that is no identifier.
    """

    name: str
    shape: tuple[int, ...]
    activation: Activation

    def __init__(self, name: str, shape: int | Sequence[int], activation: Activation) -> None:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not name.isidentifier():
            raise ConfigError(f"Node: expected a name like 'hidden', got {name!r}; use letters, digits, underscores")
        if not shape or any(s < 1 for s in shape):
            raise ConfigError(f"Node {name!r}: expected a shape of positive sizes, got {shape}; e.g. (512,)")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "activation", activation)


def _checked_gain(where: str, gain: float, ordinary: str) -> float:
    if not 0 < gain < math.inf:
        raise ConfigError(f"{where}: expected gain > 0, got {gain}; 1 is {ordinary}")
    return gain


ACTIVATIONS: dict[str, type[Activation]] = {
    "identity": Identity,
    "tanh": Tanh,
    "hard_sigmoid": HardSigmoid,
    "relu": ReLU,
    "softmax": Softmax,
}


def activation(name: str) -> Activation:
    """An activation without parameters by its name: identity, tanh, hard_sigmoid, relu, softmax."""
    from toreq.errors import nearest

    if name not in ACTIVATIONS:
        raise ConfigError(
            f"activation: expected one of {sorted(ACTIVATIONS)}, got {name!r}; {nearest(name, list(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]()
