"""The numbers that the doctor judges, measured on a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toreq import estimators
from toreq.core.nodes import HardSigmoid, ReLU, Tanh
from toreq.diagnostics.gradients import gradients, with_estimator
from toreq.diagnostics.relaxation import couplings_off, predictions
from toreq.layer import Equilibrium, equilibria

# Slope below which a unit passes nothing back, and the spread (of its node's) below which it says nothing.
FLAT, STILL = 1e-2, 1e-4


@dataclass(frozen=True)
class NodeState:
    """Shares in [0, 1] of a node's units without slope on any example (``saturated``), and equal on all of them."""

    name: str
    saturated: float
    constant: float


@dataclass(frozen=True)
class LayerState:
    """How one equilibrium layer settles on a batch; medians over examples, shares in [0, 1].

    ``digits`` are the decimal digits of ``h+ - h-`` that the dtype keeps; ``stopping`` is the nudged residual relative
    to the response. Both phases' numbers are of a training step with the layer's own solver and estimator.
    """

    name: str
    dtype: str
    tolerance: float
    nudged_tolerance: float
    free_steps: float
    free_unsettled: float
    free_residual: float
    nudged_steps: float
    nudged_unsettled: float
    nudged_residual: float
    asym: float
    asym_share: float
    beta: float
    response: float
    digits: float
    stopping: float
    radius: float
    nodes: tuple[NodeState, ...] = ()


@dataclass(frozen=True)
class Measurements:
    """A net on a batch: its layers, root-mean-square gradient per parameter, cosine with Implicit, accuracies."""

    layers: tuple[LayerState, ...]
    gradients: dict[str, float]
    gradient_norm: float
    cosine: float | None
    accuracy: float
    accuracy_off: float | None
    classes: int
    losses: tuple[float, ...] = field(default=())


def measure(
    net: nn.Module, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, losses: Sequence[float] = ()
) -> Measurements:
    """Run one training step on x (B, ...), y (B,) and classify the test examples; the net is left as it was."""
    layers = equilibria(net)
    inputs: dict[int, Tensor] = {}
    handles = [layer.register_forward_pre_hook(_keeper(inputs)) for layer in layers]
    try:
        found = gradients(net, x, y)
    finally:
        for handle in handles:
            handle.remove()
    names = {id(module): name for name, module in net.named_modules()}
    states = tuple(_layer_state(names.get(id(layer), "") or "the net", layer, inputs[id(layer)]) for layer in layers)
    cosine = None
    if layers:
        # The implicit gradient at the shipped tolerance: this is a health check, `toreq check` is the strict one.
        implicit = gradients(with_estimator(net, estimators.Implicit()), x, y)
        cosine = _cosine(found, implicit)
    off = None
    if layers:
        with couplings_off(net):
            off = _accuracy(net, test_x, test_y)
    return Measurements(
        layers=states,
        gradients={name: float(g.double().square().mean().sqrt()) for name, g in found.items()},
        gradient_norm=math.sqrt(sum(float(g.double().square().sum()) for g in found.values())),
        cosine=cosine,
        accuracy=_accuracy(net, test_x, test_y),
        accuracy_off=off,
        classes=int(net(test_x[:1]).shape[-1]),
        losses=tuple(losses),
    )


def _keeper(inputs: dict[int, Tensor]) -> Any:
    def keep(layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[id(layer)] = args[0].detach()

    return keep


def _accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((predictions(net, x) == y).float().mean())


def _cosine(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    one = torch.cat([g.double().flatten() for g in found.values()])
    two = torch.cat([reference[name].double().flatten() for name in found])
    return float(one @ two / (one.norm() * two.norm()))


def _layer_state(name: str, layer: Equilibrium, x: Tensor) -> LayerState:
    free, nudged = layer.last.free, layer.last.nudged
    nan = float("nan")
    with torch.no_grad():
        solution = layer.solve(x)
    dtype = next(iter(solution.h.values())).dtype
    response = beta = asym = nan
    asym_share, digits, stopping = 0.0, math.inf, 0.0
    if nudged is not None and nudged.response is not None:
        response = _median(nudged.response)
        digits = math.log10(max(2 * response, 1e-30) / torch.finfo(dtype).eps)
        stopping = _median(nudged.residual)  # relative to the response as it is
    if nudged is not None and nudged.asym is not None:
        asym = _median(nudged.asym)
        asym_share = float((nudged.asym > 0.1).float().mean())
    if nudged is not None and nudged.beta is not None:
        beta = _median(nudged.beta)
    return LayerState(
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        tolerance=layer.solver.tolerance,
        nudged_tolerance=float(getattr(layer.estimator, "tolerance", layer.solver.tolerance)),
        free_steps=nan if free is None else float(free.steps.float().mean()),
        free_unsettled=0.0 if free is None else 1 - float(free.converged.float().mean()),
        free_residual=nan if free is None else float(free.residual.max()),
        nudged_steps=nan if nudged is None else float(nudged.steps.float().mean()),
        nudged_unsettled=0.0 if nudged is None else 1 - float(nudged.converged.float().mean()),
        nudged_residual=nan if nudged is None else float(nudged.residual.max()),
        asym=asym,
        asym_share=asym_share,
        beta=beta,
        response=response,
        digits=digits,
        stopping=stopping,
        radius=float(layer.radius(x)),
        nodes=tuple(_node_states(layer, solution)),
    )


def _median(values: Tensor) -> float:
    finite = values[torch.isfinite(values)]
    return float(finite.float().median()) if finite.numel() else float("nan")


def _node_states(layer: Equilibrium, solution: Any) -> list[NodeState]:
    states = []
    for name in layer.dynamics.names:
        a, h = solution.state[name].flatten(1), solution.h[name].flatten(1)
        activation = layer.dynamics.activation(name)
        spread = h.std(dim=0)
        constant = float((spread <= STILL * h.std().clamp_min(1e-30)).float().mean())
        saturated = 0.0
        # Only these act unit by unit, so that the Hessian's action on ones is each unit's own slope.
        if isinstance(activation, (Tanh, HardSigmoid, ReLU)):
            slope = activation.derivative(a, h, torch.ones_like(h))
            saturated = float((slope.abs().amax(dim=0) < FLAT).float().mean())
        states.append(NodeState(name, saturated, constant))
    return states
