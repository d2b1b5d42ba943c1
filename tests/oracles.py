"""Small networks with known answers, and the references that tests hold the library against.

Everything is float64 unless a test says otherwise. References here never call the estimators of the library: gradients
come from finite differences of tightly settled forward passes, or from exact linear algebra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toreq import Equilibrium
from toreq.core import Dynamics
from toreq.estimators import (
    Centered,
    Estimator,
    Holomorphic,
    Implicit,
    NonConservative,
    OneSided,
    Predictive,
    Unrolled,
)
from toreq.solvers import FixedPoint, Solver

TIGHT = FixedPoint(max_steps=1000, tolerance=1e-13, check_every=4)
EXACT = Implicit(tolerance=1e-13, max_steps=1000)

Grads = dict[str, Tensor]
Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Case:
    """One small network with an input that is settled easily, and what is known about it."""

    name: str
    dynamics: Dynamics
    x: Tensor
    smooth: bool = True
    readout: str | tuple[str, ...] | None = None
    solver: Solver = TIGHT

    def layer(self, estimator: Estimator | None = None, solver: Solver | None = None, **kwargs: Any) -> Equilibrium:
        """An equilibrium layer on this case's network, tightly settled unless told otherwise."""
        estimator = EXACT if estimator is None else estimator
        kwargs.setdefault("readout", self.readout)
        return Equilibrium(self.dynamics, solver or self.solver, estimator, **kwargs)


def precise(estimator: Estimator) -> Estimator:
    """The estimator with nudges small enough that only its systematic errors remain."""
    tight: dict[type[Estimator], dict[str, Any]] = {
        OneSided: {"beta": 1e-5, "tolerance": 1e-9},
        Centered: {"beta": 1e-4, "tolerance": 1e-10},
        Holomorphic: {"beta": 1e-2, "tolerance": 1e-11},
        NonConservative: {"beta": 1e-4, "tolerance": 1e-10},
        Predictive: {"beta": 1e-6, "tolerance": 1e-11},
        Implicit: {"tolerance": 1e-13},
        Unrolled: {"steps": 400},
    }
    settings = tight[type(estimator)]
    if not isinstance(estimator, Unrolled):
        settings = {**settings, "max_steps": 3000}
    return replace(estimator, **settings)


def quadratic(seed: int = 5) -> Loss:
    """A smooth loss with a different weight on each unit and example, for a tensor or a dictionary of them."""

    def loss(out: Any) -> Tensor:
        parts = out.values() if isinstance(out, dict) else [out]
        total = torch.zeros((), dtype=torch.float64)
        for i, t in enumerate(parts):
            g = torch.Generator().manual_seed(seed + i)
            target = torch.randn(t.shape, generator=g, dtype=torch.float64).to(t)
            weight = torch.rand(t.shape, generator=g, dtype=torch.float64).to(t) + 0.5
            total = total + (weight * (t - target).square()).sum().to(total)
        return total / 3

    return loss


def gradients(layer: nn.Module, x: Tensor, loss: Loss) -> Grads:
    """Gradients of ``loss(layer(x))`` for every trainable parameter and for the input (``"x"``)."""
    for p in layer.parameters():
        p.grad = None
    leaf = x.detach().clone()
    leaf = leaf.requires_grad_() if leaf.is_floating_point() else leaf
    loss(layer(leaf)).backward()
    named = [(n, p) for n, p in layer.named_parameters() if p.requires_grad]
    out = {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in named}
    if leaf.requires_grad:
        out["x"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach().clone()
    return out


@contextmanager
def shifted(t: Tensor, by: Tensor) -> Iterator[None]:
    """``t`` moved in place for the length of the context, and restored to the same bits after it."""
    kept = t.detach().clone()
    with torch.no_grad():
        t.copy_(kept + by)
    try:
        yield
    finally:
        with torch.no_grad():
            t.copy_(kept)


def directional(layer: nn.Module, x: Tensor, loss: Loss, t: Tensor, direction: Tensor, eps: float = 1e-5) -> float:
    """Central finite difference of the loss along ``direction`` in the parameter (or input) ``t``."""
    values = []
    for sign in (1, -1):
        with shifted(t, sign * eps * direction), torch.no_grad():
            values.append(float(loss(layer(x))))
    return (values[0] - values[1]) / (2 * eps)


def assert_finite_differences(
    layer: nn.Module, x: Tensor, loss: Loss, grads: Grads, rtol: float = 1e-5, directions: int = 1
) -> None:
    """Each gradient's inner product with random directions equals a central finite difference of the loss."""
    g = torch.Generator().manual_seed(11)
    targets: dict[str, Tensor] = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    if "x" in grads:
        targets["x"] = x
    # the loss's own gradient sets what is small: a direction nearly orthogonal to it carries no digits
    assert any(float(v.norm()) > 1e-3 for v in grads.values()), "oracle: expected a loss that depends on something"
    for name, t in targets.items():
        for _ in range(directions):
            d = torch.randn(t.shape, generator=g, dtype=t.dtype)
            d = d / d.norm()
            d = (d + grads[name] / grads[name].norm().clamp_min(1e-300)) / 2
            found = float((grads[name] * d).sum())
            wanted = directional(layer, x, loss, t, d)
            assert abs(found - wanted) <= rtol * abs(wanted) + 1e-8, f"{name}: {found} against {wanted}"


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors, computed in float64."""
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|`` in float64."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))


def assert_close(found: Grads, wanted: Grads, rtol: float, small: float = 1e-6) -> None:
    """Every gradient within ``rtol`` in norm; those below ``small`` of the largest within that absolutely."""
    assert set(found) == set(wanted)
    largest = max(float(g.norm()) for g in wanted.values())
    assert largest > 0, "oracle: expected a loss that depends on something"
    for name, w in wanted.items():
        error = float((found[name].double() - w.double()).norm())
        bound = rtol * max(float(w.double().norm()), small * largest)
        assert error <= bound, f"{name}: error {error:.3e} above {bound:.3e} (norm {float(w.norm()):.3e})"


def assert_aligned(found: Grads, wanted: Grads, least: float = 0.999, ratio: float = 0.05) -> None:
    """Every gradient's cosine at least ``least`` and its length within ``ratio``, as claim B1 asks."""
    assert set(found) == set(wanted)
    largest = max(float(g.double().norm()) for g in wanted.values())
    for name, w in wanted.items():
        size = float(w.double().norm())
        if size < 1e-6 * largest:
            assert float((found[name].double() - w.double()).norm()) < 1e-5 * largest, name
            continue
        assert cosine(found[name], w) >= least, f"{name}: cosine {cosine(found[name], w):.5f}"
        length = float(found[name].double().norm()) / size
        assert abs(length - 1) <= ratio, f"{name}: length {length:.4f} of the true gradient"


def autograd_field(value: Callable[[dict[str, Tensor]], Tensor], h: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of a scalar function of a state, node by node, by autograd."""
    leaf = {n: t.detach().clone().requires_grad_() for n, t in h.items()}
    grads = torch.autograd.grad(value(leaf).sum(), list(leaf.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaf.items(), grads, strict=True)}


def fitted_order(betas: list[float], errors: list[float]) -> float:
    """Slope of log error against log beta by least squares."""
    b, e = torch.tensor(betas).double().log(), torch.tensor(errors).double().log()
    b = b - b.mean()
    return float((b * (e - e.mean())).sum() / (b * b).sum())


def residual_of(dynamics: Dynamics, x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Relative residual per example recomputed from scratch: ``|f(sigma(a)) - a| / (|f(sigma(a)) - a| + |a|)``."""
    with torch.no_grad():
        bindings = dynamics.bind(x)
        f = dynamics.map(dynamics.activate(state, bindings), bindings)
        r = torch.cat([(f[n] - a).flatten(1) for n, a in state.items()], 1).norm(dim=1)
        size = torch.cat([a.flatten(1) for a in state.values()], 1).norm(dim=1)
    return r / (r + size)
