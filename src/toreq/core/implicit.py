r"""Activations under a stiff pull: the pre-activation that solves :math:`a + s\,\sigma(a) = z`.

A spring adds :math:`-s h_i` to the field of its own node. Taken at the last iterate it overshoots as soon as s exceeds
1; taken at the next one it is this equation, which has one solution for every s >= 0, since the left side is monotone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from toreq.core.nodes import Activation, HardSigmoid, Identity, LayerNorm, ReLU, Tanh
from toreq.core.state import Bound
from toreq.errors import ConfigError

NEWTON_STEPS = 12
"""Newton steps of the two equations that have no closed form; they settle to float64 for s up to 1e4."""


def _identity(f: Activation, z: Tensor, s: Tensor, bound: Bound | None) -> Tensor:
    assert isinstance(f, Identity)
    return z / (1 + s * f.gain)


def _relu(f: Activation, z: Tensor, s: Tensor, bound: Bound | None) -> Tensor:
    assert isinstance(f, ReLU)
    return torch.where(z > 0, z / (1 + s * f.gain), z)


def _hard_sigmoid(f: Activation, z: Tensor, s: Tensor, bound: Bound | None) -> Tensor:
    assert isinstance(f, HardSigmoid)
    # three straight pieces: below 0, on the slope, and beyond 1 where the pull is s
    return torch.maximum(torch.minimum(z, z / (1 + s * f.gain)), z - s)


def _tanh(f: Activation, z: Tensor, s: Tensor, bound: Bound | None) -> Tensor:
    assert isinstance(f, Tanh)
    g = f.gain
    if z.is_complex():
        a = torch.complex(_tanh(f, z.real, s, bound), torch.zeros_like(z.real))
        for _ in range(6):  # from the real solution: what is left is as small as the nudge
            h = (g * a).tanh()
            a = a - (a + s * h - z) / (1 + s * g * (1 - h * h))
        return a
    # odd, and for z > 0 the left side is concave: every Newton step from below lands below, so that the iteration
    # rises to the solution from any lower bound, without a line search
    size = z.abs()
    a = torch.maximum(size - s, size / (1 + s * g))
    for _ in range(NEWTON_STEPS):
        h = (g * a).tanh()
        step = (size - a - s * h) / (1 + s * g * (1 - h * h))
        a = a + step
        # convergence is quadratic: what is left is about the square of the step
        if bool((step.abs() <= 0.1 * torch.finfo(a.dtype).eps ** 0.5 * a).all()):
            break
    return a.copysign(z)


def _layer_norm(f: Activation, z: Tensor, s: Tensor, bound: Bound | None) -> Tensor:
    assert isinstance(f, LayerNorm)
    bound = f.bind() if bound is None else bound
    z = z - s * bound["bias"]
    mean = z.mean(-1, keepdim=True)
    centred = z - mean
    # the mean stays, the direction stays, and the size G shrinks to r with r + s g r / sqrt(r^2 + eps) = G: by s g,
    # apart from eps
    squares = (centred * centred).mean(-1, keepdim=True)
    pull = s * bound["gain"]
    ratio = _complex_shrunk(squares, pull, f.eps) if z.is_complex() else _shrunk(squares, pull, f.eps)
    return mean + centred * ratio


def _shrunk(squares: Tensor, pull: Tensor, eps: float) -> Tensor:
    """r / G; concave in r, so that Newton's steps rise to the solution as for tanh."""
    # above 0, where the root has no derivative
    size = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
    r = torch.maximum(size - pull, size / (1 + pull / eps**0.5))
    for _ in range(NEWTON_STEPS):
        t = (r * r + eps).sqrt()
        step = (size - r - pull * r / t) / (1 + pull * eps / t**3)
        r = r + step
        if bool((step.abs() <= 0.1 * torch.finfo(r.dtype).eps ** 0.5 * r).all()):
            break
    return r / size


def _complex_shrunk(squares: Tensor, pull: Tensor, eps: float) -> Tensor:
    ratio = _shrunk(squares.real, pull.real if pull.is_complex() else pull, eps).to(squares.dtype)
    for _ in range(6):
        t = (squares * ratio * ratio + eps).sqrt()
        ratio = ratio - (ratio + pull * ratio / t - 1) / (1 + pull * eps / t**3)
    return ratio


_SOLVED: dict[type[Activation], Callable[[Activation, Tensor, Tensor, Bound | None], Tensor]] = {
    Identity: _identity,
    ReLU: _relu,
    HardSigmoid: _hard_sigmoid,
    Tanh: _tanh,
    LayerNorm: _layer_norm,
}


def implicit_available(f: Activation) -> bool:
    """Whether :func:`solve_implicit` knows this activation."""
    return type(f) in _SOLVED


def solve_implicit(f: Activation, z: Tensor, s: Tensor, bound: Bound | None = None) -> Tensor:
    r"""The solution a of :math:`a + s\,\sigma(a) = z`.

    Piecewise linear activations in closed form. With tanh by Newton's method from a lower bound, from which it rises
    monotonically. Under layer norm the mean and the direction of the centred part stay, and its size shrinks by s times
    the gain (apart from the norm's epsilon, for which Newton's method solves one number a token).

    Args:
        f: identity, relu, hard_sigmoid, tanh or layer norm.
        z: right side ``(B, ...)``.
        s: strength, a scalar tensor >= 0.
        bound: what ``f.bind()`` returned.

    Raises:
        ConfigError: for another activation.
    """
    if type(f) not in _SOLVED:
        raise ConfigError(
            f"solve_implicit: expected one of {sorted(k.__name__ for k in _SOLVED)}, got {type(f).__name__}; put the "
            "spring on another node, or use CoarseToFine(implicit=False) with damping"
        )
    # a strength is real also where the bindings have been cast to complex
    return _SOLVED[type(f)](f, z, s.real if s.is_complex() else s, bound)


def slope(f: Activation, a: Tensor, h: Tensor, bound: Bound | None = None) -> Tensor:
    r"""A slope w >= 0 per unit with :math:`\sigma(a + d) \approx \sigma(a) + w d`, for the activations above.

    The tangent's, except under layer norm: the gain over each token's deviation (a tangent is no number per unit
    there), which is right across the token's own direction.

    Args:
        f: the activation.
        a, h: where, and ``f(a)``; ``(B, ...)``.
        bound: what ``f.bind()`` returned.

    Returns:
        of the shape of ``a``, or with a last axis of 1.
    """
    if isinstance(f, LayerNorm):
        bound = f.bind() if bound is None else bound
        centred = a - a.mean(-1, keepdim=True)
        return bound["gain"] / ((centred * centred).mean(-1, keepdim=True) + f.eps).sqrt()
    if isinstance(f, Tanh):
        return torch.addcmul(h.new_full((), f.gain), h, h, value=-f.gain)
    return f.derivative(a, h, torch.ones_like(h), bound)
