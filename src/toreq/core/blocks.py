r"""Blocks with adjoints in closed form: maps :math:`f(h)` that know :math:`J^\top c` and their own weight gradients.

A block is composed of maps. Each runs forward, keeping what its adjoint needs, and pulls a cotangent back by the
formulas stated with it; autograd is not involved. With ``feedback="learned"`` the way back uses matrices B of its own
in place of the transposed weights, which receive the weights' own local update (Kolen and Pollack 1994): under equal,
decoupled decay the difference of the two only shrinks, by the same factor in each step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from toreq.core.pickling import Picklable
from toreq.core.state import Bound
from toreq.errors import ConfigError, nearest

Gradients = dict[str, Tensor]

INPUT = "<x>"
"""Key of the injected input among bound tensors."""


class Map(Picklable, ABC):
    r"""A map :math:`f(h)` of a batch, with its adjoint.

    ``learned`` names each weight that has a matrix of its own on the way back, with the name of that matrix.
    """

    names: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.prefix = ""
        self.learned: dict[str, str] = {}

    def maps(self) -> Iterator[Map]:
        """This map and those inside it."""
        return (m for m in self.modules() if isinstance(m, Map))

    def label(self) -> None:
        """Give each map inside a prefix of its own, so that their tensors fit into one dictionary."""
        for name, module in self.named_modules():
            if isinstance(module, Map):
                module.prefix = f"{name}." if name else ""

    def tensors(self) -> dict[str, Tensor]:
        """The effective tensors of all maps inside, by prefixed name; parametrizations are evaluated here, once."""
        out: dict[str, Tensor] = {}
        for m in self.maps():
            for n in (*m.names, *m.learned.values()):
                t = getattr(m, n)
                if t is not None:
                    out[m.prefix + n] = t
        return out

    def forward(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        """:math:`f(h; x)` as an ordinary module."""
        return self.run(h, Bound(self.tensors(), {} if x is None else {INPUT: x}))[0]

    @abstractmethod
    def run(self, h: Tensor, t: Bound) -> tuple[Tensor, Any]:
        """:math:`f(h)` and whatever :meth:`pull` needs of it."""

    @abstractmethod
    def pull(self, c: Tensor, saved: Any, t: Bound, grads: Gradients | None) -> Tensor:
        r""":math:`J^\top c`; the gradient of :math:`\langle c, f\rangle` in the bound tensors is added to ``grads``."""

    def _add(self, grads: Gradients | None, name: str, g: Tensor) -> None:
        if grads is None:
            return
        for key in (name, *([self.learned[name]] if name in self.learned else [])):
            key = self.prefix + key
            grads[key] = grads[key] + g if key in grads else g

    def _back(self, t: Bound, name: str) -> Tensor:
        """What stands for the weight on the way back."""
        return t[self.prefix + self.learned.get(name, name)]

    def _own_way_back(self, feedback: str, *names: str) -> None:
        if feedback not in ("exact", "learned"):
            raise ConfigError(
                f"{type(self).__name__}: expected feedback 'exact' or 'learned', got {feedback!r}; choose one"
            )
        for n in names if feedback == "learned" else ():
            # drawn like the weight itself: on the way back it plays the same part
            self.learned[n] = f"{n}_back"
            self.register_parameter(self.learned[n], nn.Parameter(_fresh(getattr(self, n))))


def _fresh(weight: Tensor) -> Tensor:
    return torch.randn_like(weight) * weight.detach().std()


def _fan_in(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(math.prod(shape[1:])))


class Given(Map):
    """The argument itself: the prediction of a first level from a drive."""

    def run(self, h: Tensor, t: Bound) -> tuple[Tensor, None]:
        return h, None

    def pull(self, c: Tensor, saved: None, t: Bound, grads: Gradients | None) -> Tensor:
        return c


class Linear(Map):
    r""":math:`W h + b` over the last axis; :math:`J^\top c = W^\top c` (or :math:`B c`),
    :math:`\partial W = c\,h^\top`.

    Args:
        features, out: sizes of the last axis before and after.
        gain: the initial deviation is this over the square root of ``features``.
        feedback: ``"exact"``, or ``"learned"`` for a way back of its own.
    """

    names = ("weight", "bias")

    def __init__(self, features: int, out: int, gain: float = 1.0, feedback: str = "exact") -> None:
        super().__init__()
        self.weight = _fan_in(out, features)
        self.bias = nn.Parameter(torch.zeros(out))
        with torch.no_grad():
            self.weight.mul_(gain)
        self._own_way_back(feedback, "weight")

    def run(self, h: Tensor, t: Bound) -> tuple[Tensor, Tensor]:
        return nn.functional.linear(h, t[self.prefix + "weight"], t[self.prefix + "bias"]), h

    def pull(self, c: Tensor, saved: Tensor, t: Bound, grads: Gradients | None) -> Tensor:
        if grads is not None:
            flat = c.flatten(0, -2)
            self._add(grads, "weight", flat.T @ saved.flatten(0, -2))
            self._add(grads, "bias", flat.sum(0))
        return c @ self._back(t, "weight")


class Convolution(Map):
    r"""A convolution :math:`W * h + b`; :math:`J^\top c` is the transposed convolution.

    Args:
        channels, out: numbers of channels before and after.
        kernel, stride, padding: as for ``nn.Conv2d``.
        gain: the initial deviation is this over the square root of fan-in.
        feedback: ``"exact"``, or ``"learned"`` for a way back of its own.
    """

    names = ("weight", "bias")

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        gain: float = 1.0,
        feedback: str = "exact",
    ) -> None:
        super().__init__()
        self.weight = _fan_in(out, channels, kernel, kernel)
        self.bias = nn.Parameter(torch.zeros(out))
        with torch.no_grad():
            self.weight.mul_(gain)
        self.stride, self.padding = stride, padding
        self._own_way_back(feedback, "weight")

    def run(self, h: Tensor, t: Bound) -> tuple[Tensor, Tensor]:
        weight, bias = t[self.prefix + "weight"], t[self.prefix + "bias"]
        return nn.functional.conv2d(h, weight, bias, self.stride, self.padding), h

    def pull(self, c: Tensor, saved: Tensor, t: Bound, grads: Gradients | None) -> Tensor:
        back = self._back(t, "weight")
        if grads is not None:
            # the bias by the same kernel: sums of many terms that nearly cancel then round as autograd's do
            _, weight, bias = torch.ops.aten.convolution_backward(
                c, saved, back, [back.shape[0]],
                [self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0], 1, [False, True, True],
            )  # fmt: skip
            self._add(grads, "weight", weight)
            self._add(grads, "bias", bias)
        return conv2d_input(saved.shape, back, c, self.stride, self.padding)


class Norm(Map):
    r"""Layer norm over the last axis, :math:`g * u + b` with :math:`u = (h - \bar h)/s`.

    .. math:: J^\top c = \tfrac1s\left[d - \bar d - u\,\overline{d u}\right], \qquad d = g * c

    Args:
        features: size D of the last axis, at least 2.
        eps: added to the variance.
    """

    names = ("weight", "bias")

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        if features < 2:
            raise ConfigError(f"Norm: expected features >= 2, got {features}; a single feature has no variance")
        self.features, self.eps = features, eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def run(self, h: Tensor, t: Bound) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, mean, inverse = torch.native_layer_norm(
            h, [self.features], t[self.prefix + "weight"], t[self.prefix + "bias"], self.eps
        )
        return out, ((h - mean) * inverse, inverse)

    def pull(self, c: Tensor, saved: tuple[Tensor, Tensor], t: Bound, grads: Gradients | None) -> Tensor:
        u, inverse = saved
        if grads is not None:
            axes = tuple(range(c.dim() - 1))
            self._add(grads, "weight", (c * u).sum(axes))
            self._add(grads, "bias", c.sum(axes))
        d = c * t[self.prefix + "weight"]
        return inverse * (d - d.mean(-1, keepdim=True) - u * (d * u).mean(-1, keepdim=True))


def _tanh_back(c: Tensor, a: Tensor, h: Tensor) -> Tensor:
    return c - c * h * h


def _relu_back(c: Tensor, a: Tensor, h: Tensor) -> Tensor:
    # c where a > 0, in one kernel
    return torch.ops.aten.threshold_backward(c, a, 0)


def _gelu_back(c: Tensor, a: Tensor, h: Tensor) -> Tensor:
    # c times Phi(a) + a phi(a), in one kernel
    return torch.ops.aten.gelu_backward(c, a)


NONLINEARITIES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "tanh": (torch.tanh, _tanh_back),
    "relu": (torch.relu, _relu_back),
    "gelu": (nn.functional.gelu, _gelu_back),
}
r"""Name -> :math:`\sigma(a)` and :math:`c * \sigma'(a)` as a function of c, a and :math:`\sigma(a)`."""


class Pointwise(Map):
    r""":math:`\sigma(h)` unit by unit; :math:`J^\top c = \sigma'(h) * c`.

    Args:
        nonlinearity: ``"tanh"``, ``"relu"`` or ``"gelu"``.
    """

    def __init__(self, nonlinearity: str) -> None:
        super().__init__()
        if nonlinearity not in NONLINEARITIES:
            raise ConfigError(
                f"Pointwise: expected a nonlinearity, got {nonlinearity!r}; {nearest(nonlinearity, NONLINEARITIES)}"
            )
        self.nonlinearity = nonlinearity

    def run(self, h: Tensor, t: Bound) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out = NONLINEARITIES[self.nonlinearity][0](h)
        return out, (h, out)

    def pull(self, c: Tensor, saved: tuple[Tensor, Tensor], t: Bound, grads: Gradients | None) -> Tensor:
        return NONLINEARITIES[self.nonlinearity][1](c, *saved)


class SelfAttention(Map):
    r"""Softmax attention with free queries, keys and values: :math:`P v\,W_o^\top + b_o`,
    :math:`P = \mathrm{softmax}(q k^\top/\sqrt d)` per head.

    With :math:`e = W_o^\top c` split into heads: :math:`\partial v = P^\top e`, :math:`\partial s = P * (e v^\top -
    \langle P, e v^\top\rangle_{row})`, :math:`\partial q = \partial s\,k/\sqrt d`, :math:`\partial k =
    \partial s^\top q/\sqrt d`; these three leave through the transposed input matrices.

    Args:
        features, heads: D and the number of heads, which divides D.
        gain: deviation of the output matrix times the square root of D.
        feedback: ``"exact"``, or ``"learned"`` for a way back of their own for the four matrices.
    """

    names = ("inner", "inner_bias", "outer", "outer_bias")

    def __init__(self, features: int, heads: int, gain: float = 1.0, feedback: str = "exact") -> None:
        super().__init__()
        if heads < 1 or features % heads:
            raise ConfigError(f"SelfAttention: expected heads that divide {features}, got {heads}; e.g. 4 for 96")
        self.features, self.heads, self.scale = features, heads, 1 / math.sqrt(features // heads)
        self.inner, self.outer = _fan_in(3 * features, features), _fan_in(features, features)
        self.inner_bias = nn.Parameter(torch.zeros(3 * features))
        self.outer_bias = nn.Parameter(torch.zeros(features))
        with torch.no_grad():
            self.outer.mul_(gain)
        self._own_way_back(feedback, "inner", "outer")

    def run(self, h: Tensor, t: Bound) -> tuple[Tensor, tuple[Tensor, ...]]:
        p = self.prefix
        z = nn.functional.linear(h, t[p + "inner"], t[p + "inner_bias"])
        q, k, v = z.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        o = (weights @ v).transpose(1, 2).flatten(2)
        return nn.functional.linear(o, t[p + "outer"], t[p + "outer_bias"]), (h, q, k, v, weights, o)

    def pull(self, c: Tensor, saved: tuple[Tensor, ...], t: Bound, grads: Gradients | None) -> Tensor:
        h, q, k, v, weights, o = saved
        e = (c @ self._back(t, "outer")).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        through = e @ v.transpose(-1, -2)
        score = weights * (through - (weights * through).sum(-1, keepdim=True)) * self.scale
        parts = torch.stack([score @ k, score.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ e])
        z = parts.permute(1, 3, 0, 2, 4).flatten(2)
        if grads is not None:
            flat, inner = c.flatten(0, 1), z.flatten(0, 1)
            self._add(grads, "outer", flat.T @ o.flatten(0, 1))
            self._add(grads, "outer_bias", flat.sum(0))
            self._add(grads, "inner", inner.T @ h.flatten(0, 1))
            self._add(grads, "inner_bias", inner.sum(0))
        return z @ self._back(t, "inner")


class Stack(Map):
    r"""Maps one after the other; their adjoints in reverse order.

    Args:
        maps: at least one.
    """

    def __init__(self, *maps: Map) -> None:
        super().__init__()
        self.parts = nn.ModuleList(maps)
        self.label()

    def run(self, h: Tensor, t: Bound) -> tuple[Tensor, list[Any]]:
        kept = []
        for m in self.parts:
            assert isinstance(m, Map)
            h, saved = m.run(h, t)
            kept.append(saved)
        return h, kept

    def pull(self, c: Tensor, saved: list[Any], t: Bound, grads: Gradients | None) -> Tensor:
        for m, s in zip(reversed(self.parts), reversed(saved), strict=True):
            assert isinstance(m, Map)
            c = m.pull(c, s, t, grads)
        return c


class Branch(Map):
    r""":math:`f(h; x) = s\,h + \rho\,g(h) + x`; :math:`J^\top c = s\,c + \rho\,J_g^\top c`.

    Args:
        inner: g, with an output of its input's shape if ``skip``.
        scale: :math:`\rho`.
        skip: s is 1 if True, 0 otherwise.
        inject: add the injected input x; the last term is left out otherwise.
    """

    def __init__(self, inner: Map, scale: float = 1.0, skip: bool = True, inject: bool = False) -> None:
        super().__init__()
        self.inner, self.scale, self.skip, self.inject = inner, scale, skip, inject
        self.label()

    def run(self, h: Tensor, t: Bound) -> tuple[Tensor, Any]:
        g, saved = self.inner.run(h, t)
        if self.skip:
            out = torch.add(h, g, alpha=self.scale)
        else:
            out = g if self.scale == 1 else g * self.scale
        return (out + t[INPUT] if self.inject else out), saved

    def pull(self, c: Tensor, saved: Any, t: Bound, grads: Gradients | None) -> Tensor:
        if self.inject and grads is not None:
            grads[INPUT] = grads[INPUT] + c if INPUT in grads else c
        back = self.inner.pull(c if self.scale == 1 else c * self.scale, saved, t, grads)
        return back + c if self.skip else back


def alignment(module: nn.Module) -> dict[str, Tensor]:
    r"""Angle in degrees between each learned way back and the transposed weight it stands for, 0 to 180; the angle
    of two random matrices is near 90.

    Args:
        module: any module with maps inside; maps with exact feedback are left out.
    """
    found: dict[str, Tensor] = {}
    for name, m in module.named_modules():
        for weight, back in m.learned.items() if isinstance(m, Map) else ():
            a, b = (getattr(m, n).detach().flatten() for n in (weight, back))
            cosine = torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(torch.finfo(a.dtype).tiny)
            found[f"{name}.{weight}"] = torch.rad2deg(cosine.clamp(-1, 1).acos())
    return found
