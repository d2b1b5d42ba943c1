r"""How sharply the energy of a Langevin chain curves, and with it the largest step that is stable."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from toreq.core.energy import Energy
from toreq.core.nodes import Identity
from toreq.core.state import State, stacked, take
from toreq.errors import ConfigError, DivergenceError
from toreq.solvers.problem import Relaxation

PROBED = 8
"""Examples of a batch on which the curvature is measured."""
PRODUCTS = 12
"""Most products with the Hessian at one point."""


def check_step(
    problem: Relaxation,
    a: State,
    temperature: float,
    step_size: float | None,
    preconditioned: bool = False,
    noisy: Collection[str] | None = None,
) -> float:
    r"""The stable limit :math:`2/\lambda_{\max}` of Langevin steps, and a refusal of those above it.

    Args:
        problem: an energy that Langevin can sample.
        a: start of the chain.
        temperature: the highest one of the chain.
        step_size: the step asked for, if any.
        preconditioned: steps are in units of the nodes' slopes, and so are the curvatures.
        noisy: nodes that are sampled, all when None. What the others do where they settle only lowers the curvature.

    Returns:
        the limit; infinite where nothing curves upwards, or where the state has overflowed already.

    Raises:
        ConfigError: for a step at or above the limit.
        DivergenceError: where the couplings are linear and the energy falls in some direction of the identity nodes.
    """
    assert isinstance(problem.dynamics, Energy)
    energy, every = problem.dynamics, frozenset(a if noisy is None else noisy)
    unbounded = frozenset(n for n in a if isinstance(energy.activation(n), Identity))
    # with linear couplings between identity nodes the Hessian is the same everywhere
    uniform = energy.linear and unbounded == frozenset(a)
    problem, points = _probed(problem, [a] if uniform else [a, {n: torch.zeros_like(t) for n, t in a.items()}])
    units = {n: energy.activation(n).gain ** -0.5 if preconditioned else 1.0 for n in a}
    found = [_ritz(problem, point, temperature, every, units) for point in points]
    if energy.linear and unbounded & every:
        _check_confined(
            found[0] if uniform and unbounded == every else _ritz(problem, points[0], temperature, unbounded, units),
            unbounded,
        )
    largest = max(float(values[:, -1].max()) for values in found)
    if not largest > 0 or not math.isfinite(largest):
        return math.inf
    limit = 2 / largest
    if step_size is not None and step_size >= limit:
        raise ConfigError(
            f"Langevin: expected a step_size below {limit:.4g}, which is 2 over the largest curvature of the energy, "
            f"{largest:.4g}, got {step_size}; take at most half of it, e.g. {0.5 * limit:.2g}"
        )
    return limit


def _check_confined(curvatures: Tensor, unbounded: frozenset[str]) -> None:
    least = float(curvatures[:, 0].min())
    if least <= 0:
        raise DivergenceError(
            f"Langevin: expected an energy that grows in every direction of the identity nodes {sorted(unbounded)}, "
            f"got a curvature of {least:.3g}: the chain would run away; control the couplings' norm, clamp the nodes "
            "to an input (Identity(gain=1/(1 + kappa))), or use Tanh"
        )


def _probed(problem: Relaxation, points: list[State]) -> tuple[Relaxation, list[State]]:
    """The first examples at all points as one batch, where the problem can be cut; else everything, point by point."""
    first = next(iter(points[0].values()))
    index = torch.arange(min(PROBED, first.shape[0]), device=first.device)
    part = problem.selected(index.repeat(len(points)))
    return (problem, points) if part is None else (part, [stacked(*(take(point, index) for point in points))])


def gradient(problem: Relaxation, a: State, temperature: float, nodes: Collection[str]) -> State:
    r""":math:`\nabla U = \sigma'(a)(a - f) - \tau\nabla\log\det\sigma'(a)` of each of the nodes."""
    h = problem.activate(a)
    f = problem.field(h)
    out: State = {}
    for n, t in a.items():
        if n not in nodes:
            continue
        sigma = problem.dynamics.activation(n)
        pull = sigma.derivative(t, h[n], t - f[n], problem.bindings[f"node_{n}"])
        out[n] = torch.sub(pull, sigma.log_slope_gradient(t, h[n]), alpha=temperature)
    return out


def _ritz(problem: Relaxation, a: State, temperature: float, nodes: frozenset[str], units: dict[str, float]) -> Tensor:
    """Extreme eigenvalues of the Hessian of U on ``nodes``, whose coordinates are ``units`` long, ascending per
    example, by Lanczos' method ``(B, k)``."""
    moved = {n: t for n, t in a.items() if n in nodes}
    shapes = {n: t.shape for n, t in moved.items()}
    flat = torch.cat([t.flatten(1) for t in moved.values()], 1)
    # central differences are exact on quadratic energies, but for rounding: the step balances it on others
    eps = torch.finfo(flat.dtype).eps ** (1 / 3) * (1 + float(flat.norm(dim=1).mean()))

    def product(v: Tensor) -> Tensor:
        sides = []
        for sign in (1, -1):
            parts = v.split([math.prod(s[1:]) for s in shapes.values()], 1)
            shift = {n: p.reshape(shapes[n]) * units[n] for n, p in zip(shapes, parts, strict=True)}
            point = {n: torch.add(t, shift[n], alpha=sign * eps) if n in shift else t for n, t in a.items()}
            g = gradient(problem, point, temperature, nodes)
            sides.append(torch.cat([g[n].flatten(1) * units[n] for n in shapes], 1))
        return (sides[0] - sides[1]) / (2 * eps)

    generator = torch.Generator(flat.device).manual_seed(0)
    start = torch.randn(flat.shape, generator=generator, dtype=flat.dtype, device=flat.device)
    return lanczos(product, start, min(PRODUCTS, flat.shape[1]))


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Ritz values of a symmetric map from ``start`` ``(B, n)``, ascending per example: ``(B, steps)`` float64.

    Where an invariant subspace is found early, the values left over repeat one that lies inside the spectrum.
    """
    size, n = start.shape[0], min(steps, start.shape[1])
    # all inner products, not the tridiagonal ones alone: products by differences leave the Krylov space a little
    projected = torch.zeros(size, n, n, dtype=torch.float64, device=start.device)
    q = start / start.norm(dim=1, keepdim=True)
    basis = start.new_empty(size, 0, start.shape[1])
    for j in range(n):
        basis = torch.cat([basis, q[:, None]], 1)
        w = product(q)
        inner = (basis @ w[:, :, None])[:, :, 0]
        projected[:, : j + 1, j] = projected[:, j, : j + 1] = inner.double()
        projected[:, j, j] = torch.where(q.any(1), projected[:, j, j], projected[:, 0, 0])
        before = w.norm(dim=1)
        for _ in range(2):
            w = w - ((basis @ w[:, :, None]).mT @ basis)[:, 0]
        left = w.norm(dim=1)
        small = torch.finfo(w.dtype).eps ** 0.5 * before
        q = torch.where((left > small)[:, None], w / left[:, None], torch.zeros_like(w))
    if not bool(torch.isfinite(projected).all()):
        return torch.full_like(projected[:, 0], torch.nan)
    return torch.linalg.eigvalsh(projected)
