"""Weights that move during the nudged phase instead of after it."""

from __future__ import annotations

import torch
from torch import Tensor

from toreq.core import Energy
from toreq.core.state import State, detached, difference, leaves, scaled
from toreq.errors import ConfigError, DivergenceError
from toreq.estimators import OneSided
from toreq.estimators.base import FreePhase
from toreq.settle import full_precision
from toreq.solvers import Relaxation
from toreq.systems.htsep import HTSEP


def continual_step(
    net: HTSEP, x: Tensor, y: Tensor, rate: float, *, steps: int = 20, damping: float = 1.0, beta: float = 0.3
) -> float:
    r"""One batch learned by continual Equilibrium Propagation (Ernoult et al. 2020).

    From the free equilibrium the nudged phase takes T steps, and after each the weights take one of their own,

    .. math:: a^{t+1} = a^t + \gamma\,[f(h^t; \theta^t) - \beta v - a^t], \qquad
              \theta^{t+1} = \theta^t - \tfrac\eta\beta\,[\partial_\theta E(h^{t+1}) - \partial_\theta E(h^t)] .

    As :math:`\eta \to 0` the weights stand still, the sum telescopes, and the update is :math:`-\eta` times the
    one-sided contrast; at a finite rate the equilibrium moves while it is approached, and what the weights move it by
    must stay small beside the nudge: beta is large here, and the rate of plain gradient descent. No state but the
    present one is kept, and no phase has to be remembered. The head takes an ordinary step of gradient descent.

    Args:
        net: in training mode or not; its parameters are changed.
        x: ``(B, *input_shape)``.
        y: labels ``(B,)``.
        rate: :math:`\eta > 0`, of plain gradient descent.
        steps: T, at least 1.
        damping: :math:`\gamma` in (0, 1].
        beta: the aimed response of the nudged phase, beside the state.

    Returns:
        the loss before the step.

    Raises:
        ConfigError: for a value out of range.
        DivergenceError: for a loss that is not finite.
    """
    if not (rate > 0 and steps >= 1 and 0 < damping <= 1):
        raise ConfigError(
            f"continual_step: expected rate > 0, steps >= 1 and damping in (0, 1], got {rate}, {steps} and {damping}; "
            "e.g. 0.1, 20, 1"
        )
    net.check_input(x)
    energy = net.equilibrium.dynamics
    assert isinstance(energy, Energy)
    with net.placed(x):
        net.hold(x)
        bindings = detached(energy.bind(x))
        free = net.equilibrium.free_phase(bindings)
        loss, v = _head_step(net, x, free.h, y, rate)
        phase = FreePhase(energy, bindings, net.equilibrium.solver, free.state, free.h)
        estimator = OneSided(beta=beta)
        size = estimator.betas(phase, v)
        with torch.no_grad(), full_precision(bindings):
            # what is left of the free phase's residual stays in both, as in every nudged phase
            rest = difference(free.state, Relaxation(energy, bindings).field(free.h))
        force = {**rest, **{n: rest[n] - t for n, t in scaled(v, size).items()}}
        weight = estimator.active(v) / size
        a, h = free.state, free.h
        for _ in range(steps):
            a, h = _step(net, energy, x, (a, h), force, weight, rate, damping)
    return loss


def _head_step(net: HTSEP, x: Tensor, h: State, y: Tensor, rate: float) -> tuple[float, State]:
    """The loss and its cotangent at the read-out; the head's parameters are moved."""
    name = net.equilibrium.readout[0]
    with torch.enable_grad():
        read = h[name].detach().requires_grad_()
        loss = net.criterion(net.head(net.opened(x, read)), y)
        if not bool(torch.isfinite(loss)):
            raise DivergenceError(f"continual_step: expected a finite loss, got {loss.item()}; lower the rate")
        own = list(net.head.parameters())
        v, *grads = torch.autograd.grad(loss, [read, *own])
    with torch.no_grad():
        for p, g in zip(own, grads, strict=True):
            p.sub_(g, alpha=rate)
    return float(loss.detach()), {name: v}


def _step(
    net: HTSEP,
    energy: Energy,
    x: Tensor,
    state: tuple[State, State],
    force: State,
    weight: Tensor,
    rate: float,
    damping: float,
) -> tuple[State, State]:
    own = [p for p in net.equilibrium.parameters() if p.requires_grad]
    with torch.enable_grad():
        graph = energy.bind(x)
    bindings = detached(graph)
    with torch.no_grad(), full_precision(bindings):
        a, h = state
        f = Relaxation(energy, bindings, force).field(h)
        moved = {n: torch.lerp(t, f[n], damping) for n, t in a.items()}
        after = moved, energy.activate(moved, bindings)
        contrast = energy.contrast(after, state, weight, bindings)
    pairs = [(t, g) for t, g in zip(leaves(graph), contrast, strict=True) if g is not None and t.requires_grad]
    grads = torch.autograd.grad([t for t, _ in pairs], own, [g for _, g in pairs], allow_unused=True)
    with torch.no_grad():
        for p, g in zip(own, grads, strict=True):
            if g is not None:
                p.sub_(g, alpha=rate)
    return after
