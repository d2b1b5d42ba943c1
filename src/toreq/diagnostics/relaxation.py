"""What one batch does in a net: both phases of the relaxation with their trajectories, and the read-out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from toreq.core.state import State
from toreq.diagnostics.gradients import criterion
from toreq.layer import Equilibrium, equilibria

SETTLED, MOST = 1e-6, 400
"""Relative residual and steps to which a phase is settled to see how far its steps still were."""


@dataclass(frozen=True)
class Phase:
    """One recorded phase: ``residual`` (T, B), ``energy`` (T, B) or None, ``steps`` (B,), ``converged`` (B,)."""

    residual: NDArray[np.floating]
    energy: NDArray[np.floating] | None
    steps: NDArray[np.integer]
    converged: NDArray[np.bool_]


@dataclass(frozen=True)
class Relaxation:
    """The first equilibrium layer on one batch; ``nudged`` holds both signs, 2B examples. ``tolerance`` relative."""

    free: Phase
    nudged: Phase
    tolerance: float


def relaxation(net: nn.Module, x: Tensor, y: Tensor) -> Relaxation | None:
    """Both phases of the net's first equilibrium layer, recorded; None for a net without one.

    The nudged phase gets the cotangent that the net's own loss sends to that layer.
    """
    layers = equilibria(net)
    if not layers:
        return None
    layer = layers[0]
    drive, cotangent = drive_and_cotangent(net, layer, x, y)
    free = layer.solve(drive, record=True)
    nudged = layer.solve_nudged(drive, cotangent, record=True)
    return Relaxation(_phase(free), _phase(nudged), float(getattr(layer.solver, "tolerance", 0.0)))


def drive_and_cotangent(net: nn.Module, layer: Equilibrium, x: Tensor, y: Tensor) -> tuple[Any, Any]:
    """The input that reaches ``layer`` and the loss's gradient with respect to what the layer reads out."""
    inputs: list[Any] = []
    leaves: list[Any] = []

    def cut(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        inputs.append(args[0].detach() if isinstance(args[0], Tensor) else args[0])
        leaves.append(tree_map(lambda t: t.detach().requires_grad_(), output))
        return leaves[-1]

    handle = layer.register_forward_hook(cut)
    try:
        with preserved_gradients(net), torch.enable_grad():
            criterion(net)(net(x), y).backward()
    finally:
        handle.remove()
    zero_or_grad = tree_map(lambda t: torch.zeros_like(t) if t.grad is None else t.grad, leaves[0])
    return inputs[0], zero_or_grad


def way_to_equilibrium(layer: Equilibrium, drive: Any) -> tuple[list[State], State]:
    """Pre-activations after each step of a free phase, and the activations where it ends up when it settles further.

    Args:
        layer: left as it was.
        drive: its input.
    """
    trace = layer.solve(drive, record="states").trace
    assert trace is not None
    assert trace.states is not None
    solver = layer.solver
    try:
        layer.solver = replace(solver, tolerance=SETTLED, max_steps=max(MOST, solver.max_steps), precision="full")
        return list(trace.states), layer.solve(drive).h
    finally:
        layer.solver = solver


@contextlib.contextmanager
def preserved_gradients(net: nn.Module) -> Iterator[None]:
    """Whatever backward adds to ``.grad`` inside the block is taken back after it."""
    held = [(p, p.grad) for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


def _phase(solution: Any) -> Phase:
    trace = solution.trace
    return Phase(
        residual=_numpy(trace.residual),
        energy=None if trace.energy is None else _numpy(trace.energy),
        steps=_numpy(solution.steps),
        converged=_numpy(solution.converged),
    )


def _numpy(values: Tensor) -> NDArray[Any]:
    return values.detach().cpu().numpy()


@torch.no_grad()
def predictions(net: nn.Module, x: Tensor, batch_size: int = 250) -> Tensor:
    """Predicted class of each example, (B,)."""
    return torch.cat([net(part).argmax(dim=-1) for part in x.split(batch_size)])


@contextlib.contextmanager
def couplings_off(net: nn.Module) -> Iterator[None]:
    """Every coupling of every equilibrium layer, except the drive, is zero inside the block."""
    with contextlib.ExitStack() as stack:
        for layer in equilibria(net):
            stack.enter_context(layer.couplings_off())
        yield


def radius(net: nn.Module, x: Tensor) -> float:
    """Largest spectral radius of the relaxation's Jacobian over the net's equilibrium layers, at their equilibria."""
    found: list[float] = []

    def measure(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, Equilibrium)
        found.append(float(layer.radius(args[0])))

    handles = [layer.register_forward_pre_hook(measure) for layer in equilibria(net)]
    try:
        with torch.no_grad():
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    return max(found, default=float("nan"))
