"""Are updates local: each parameter's update recomputed from the states of the nodes that its coupling joins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toreq.core import Coupling, Energy, Residual, VectorField
from toreq.core.state import per_example
from toreq.diagnostics.gradients import as_double, criterion, gradients
from toreq.errors import ConfigError, ToreqError
from toreq.estimators import Centered, NonConservative, OneSided, Predictive
from toreq.layer import Equilibrium, equilibria

State = dict[str, Tensor]
Updates = dict[str, Tensor]
POINTS = 4
"""At which the way from one state to another is integrated: exact to the eighth order in its length."""
Phase = tuple[State, State]
"""Pre-activations and activations."""


class NonLocalError(ToreqError):
    """An update was to be computed from a node that its coupling does not join."""


class Blind(dict[str, Tensor]):
    """A state that shows the nodes of one coupling only; looking at any other node is an error.

    Args:
        state: of all nodes.
        nodes: those that may be seen.
    """

    def __init__(self, state: State, nodes: Sequence[str]) -> None:
        super().__init__({n: state[n] for n in nodes})

    def __missing__(self, key: str) -> Tensor:
        raise NonLocalError(
            f"locality: expected the update of a coupling to use the nodes {list(self)} that it joins, got a look at "
            f"node {key!r}; it is not local"
        )


@dataclass(frozen=True)
class LocalityRow:
    """One parameter: ``error`` is ||shipped - local|| / ||local||, or the largest shipped entry where local is 0."""

    parameter: str
    error: float
    zero: bool


def local_updates(layer: Equilibrium, x: Tensor, cotangent: Tensor | State) -> Updates:
    r"""Gradients of every parameter of the layer's network, by the local rule of its estimator.

    Each coupling is shown the settled states of its own nodes and nothing else.

    ================ ================================================================================
    ``Centered``     :math:`\tfrac1{2\beta}\,[\partial_\theta E(h^{+}) - \partial_\theta E(h^{-})]`
    ``OneSided``     :math:`\tfrac1\beta\,[\partial_\theta E(h^{\beta}) - \partial_\theta E(h^0)]`
    ``Predictive``   :math:`-\tfrac1\beta\,\epsilon^\top\partial_\theta f`
    ``NonConservative`` :math:`-\tfrac1{2\beta}\,\langle h^+ - h^-, \partial_\theta f(h^0)\rangle`
    ================ ================================================================================

    The contrasts of energies are formed in float64 from the states as they are: a float32 sum of nearly equal numbers
    would be an inexact reference.

    Args:
        layer: with one of these estimators.
        x: its input ``(B, ...)``.
        cotangent: of the read-out.

    Returns:
        parameter name in the layer -> gradient in float64; parameters without one are missing.

    Raises:
        ConfigError: for another estimator.
        NonLocalError: when a coupling looks at a node that it does not join.
    """
    estimator = layer.estimator
    if not isinstance(estimator, Centered | OneSided | Predictive | NonConservative):
        raise ConfigError(
            f"local_updates: expected a Centered, OneSided, Predictive or NonConservative estimator, got "
            f"{type(estimator).__name__}; it has no update of local form"
        )
    free = layer.solve(x)
    nudged = layer.solve_nudged(x, cotangent)
    statistics = layer.last.nudged
    assert statistics is not None
    assert statistics.beta is not None
    beta = statistics.beta.double()
    wide = copy.deepcopy(layer.dynamics).double()
    rest = (_double(free.state), _double(free.h))
    moved = (_double(nudged.state), _double(nudged.h))
    size = beta.shape[0]
    if isinstance(estimator, Predictive):
        assert isinstance(wide, Energy)
        found = _predictive(wide, as_double(x), moved[1], beta)
    elif isinstance(estimator, OneSided):
        assert isinstance(wide, Energy)
        found = _contrast(wide, as_double(x), moved, rest, 1 / beta)
    else:
        plus, minus = ([{n: t[part] for n, t in s.items()} for s in moved] for part in (slice(size), slice(size, None)))
        if isinstance(estimator, Centered):
            assert isinstance(wide, Energy)
            found = _contrast(wide, as_double(x), (plus[0], plus[1]), (minus[0], minus[1]), 0.5 / beta)
        else:
            assert isinstance(wide, Energy | VectorField)
            found = _nonconservative(wide, as_double(x), rest, (plus[0], plus[1]), (minus[0], minus[1]), -0.5 / beta)
    return {f"dynamics.{name}": found[id(p)] for name, p in wide.named_parameters() if id(p) in found}


def against_local(net: nn.Module, x: Tensor, y: Tensor) -> list[LocalityRow]:
    """Every parameter's shipped update on a batch beside the local one; parameters outside the layer (the head) see
    the read-out and the labels only.

    Args:
        net: with one Equilibrium layer; left as it was.
        x, y: a batch ``(B, ...)`` and its labels.

    Raises:
        ConfigError: no layer or several, or an estimator without a local rule.
        NonLocalError: an update that is not local.
    """
    net = copy.deepcopy(net).eval()
    layers = equilibria(net)
    if len(layers) != 1:
        raise ConfigError(
            f"against_local: expected a network with one Equilibrium layer, got {len(layers)}; examine each by itself"
        )
    layer = layers[0]
    prefix = next(name for name, module in net.named_modules() if module is layer)
    inputs: list[Any] = []
    cotangent: State = {}
    handle = layer.register_forward_hook(_watch(layer, inputs, cotangent))
    try:
        shipped = gradients(net, x, y)
    finally:
        handle.remove()
    wanted = {f"{prefix}.{name}": g for name, g in local_updates(layer, inputs[0], cotangent).items()}
    wanted |= _outside(net, layer, x, y, prefix)
    return compare(shipped, wanted)


def _watch(
    layer: Equilibrium, inputs: list[Any], cotangent: State
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    """Keep the layer's input and the very cotangent that its backward gets.

    One computed again may differ in its last digit, and then every state does: beside a small nudge's response that is
    more than the update's own rounding.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inputs.append(args[0].detach() if isinstance(args[0], Tensor) else args[0])
        for name, t in (output if isinstance(output, dict) else {layer.readout[0]: output}).items():
            t.register_hook(lambda g, name=name: None if g is None else cotangent.update({name: g.detach()}))

    return hook


def compare(shipped: Updates, wanted: Updates) -> list[LocalityRow]:
    """One row per parameter of ``shipped``."""
    rows = []
    for name, got in shipped.items():
        local = wanted.get(name)
        if local is None or float(local.abs().max()) == 0:
            rows.append(LocalityRow(name, float(got.abs().max()), True))
        else:
            rows.append(LocalityRow(name, float((got.double() - local).norm() / local.norm()), False))
    return rows


def _outside(net: nn.Module, layer: Equilibrium, x: Tensor, y: Tensor, prefix: str) -> Updates:
    """Gradients of what is not in the layer, from its detached read-out and the labels."""

    def cut(module: nn.Module, args: tuple[object, ...], output: object) -> object:
        return {n: t.detach() for n, t in output.items()} if isinstance(output, dict) else output.detach()  # type: ignore[attr-defined]

    named = {n: p for n, p in net.named_parameters() if p.requires_grad and not n.startswith(f"{prefix}.")}
    if not named:
        return {}
    handle = layer.register_forward_hook(cut)
    try:
        loss = criterion(net)(net(x), y)
    finally:
        handle.remove()
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g.double() for n, g in zip(named, found, strict=True) if g is not None}


def _double(state: State) -> State:
    return {n: t.double() for n, t in state.items()}


def _parameters(*modules: nn.Module) -> list[nn.Parameter]:
    # modules may share parameters: each counts once
    return list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))


def _accumulate(out: dict[int, Tensor], value: Tensor, parameters: list[nn.Parameter]) -> None:
    if not parameters or not value.requires_grad:
        return
    for p, g in zip(parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
        if g is not None:
            out[id(p)] = out[id(p)] + g if id(p) in out else g


def _contrast(energy: Energy, x: Tensor, plus: Phase, minus: Phase, weight: Tensor) -> dict[int, Tensor]:
    """``sum_b w_b [dE(plus) - dE(minus)]``, coupling by coupling, each by autograd of its own value.

    The difference of two values is the integral of the value's gradient along the way from one state to the other, by
    Gauss and Legendre's rule: between states that are near, the difference itself has lost its digits.
    """
    out: dict[int, Tensor] = {}
    # a coupling may borrow another one's weight, which then sums what each sees of its own nodes
    every = _parameters(energy)
    for _, c in energy.terms():
        bound = c.bind(x)
        ahead, behind = Blind(plus[1], c.nodes), Blind(minus[1], c.nodes)
        if c.linear:
            # quadratic at most: the values' difference is the field half-way times the way, and no digits cancel in it
            c.value(ahead, bound)  # is asked too: it may look where the field does not
            field = c.field(Blind({n: 0.5 * (t + behind[n]) for n, t in ahead.items()}, c.nodes), bound)
            parts = [(per_example(weight, f) * (ahead[n] - behind[n]) * f).sum() for n, f in field.items()]
            _accumulate(out, -torch.stack(parts).sum(), every)
        elif not c.analytic:
            # the rule knows no kinks
            _accumulate(out, -(weight * (c.value(ahead, bound) - c.value(behind, bound))).sum(), every)
        else:
            way = _way(lambda s, c=c, bound=bound: c.value(Blind(s, c.nodes), bound), ahead, behind, weight)
            _accumulate(out, -way, every)
    for n in energy.names:
        sigma = energy.activation(n)
        if own := _parameters(sigma):
            potential = lambda s, n=n, sigma=sigma: sigma.potential(s[n])  # noqa: E731
            _accumulate(out, -_way(potential, {n: plus[0][n]}, {n: minus[0][n]}, weight), own)
    return out


def _way(value: Callable[[State], Tensor], plus: State, minus: State, weight: Tensor) -> Tensor:
    """``sum_b w_b [value(plus) - value(minus)]`` with a graph to the parameters."""
    total = weight.new_zeros(())
    for node, share in zip(*(t.tolist() for t in _gauss(POINTS)), strict=True):
        at = {n: torch.lerp(minus[n], t, node).requires_grad_() for n, t in plus.items()}
        v = value(at)
        if not v.requires_grad:
            continue
        fields = torch.autograd.grad((weight * v).sum(), list(at.values()), create_graph=True, allow_unused=True)
        for (n, t), f in zip(plus.items(), fields, strict=True):
            if f is not None:
                total = total + share * ((t - minus[n]) * f).sum()
    return total


def _gauss(points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss and Legendre's rule on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return torch.from_numpy(0.5 * (nodes + 1)), torch.from_numpy(0.5 * weights)


def _predictive(energy: Energy, x: Tensor, h: State, beta: Tensor) -> dict[int, Tensor]:
    """The error of the predicted node and the state of its source."""
    out: dict[int, Tensor] = {}
    states = {n: h[f"h_{n}"] for n in energy.names}
    for _, term in energy.terms():
        assert isinstance(term, Residual)
        eps = h[f"eps_{term.node}"]
        source = () if term.source is None else (term.source,)
        prediction = term.prediction(Blind(states, source), term.bind(x))
        _accumulate(out, -(eps * per_example(1 / beta, eps) * prediction).sum(), _parameters(term))
    return out


def _nonconservative(
    dynamics: Energy | VectorField, x: Tensor, free: Phase, plus: Phase, minus: Phase, weight: Tensor
) -> dict[int, Tensor]:
    """Differences and free states of the nodes that are joined."""
    out: dict[int, Tensor] = {}

    def weighted(index: int) -> State:
        first, second = plus[index], minus[index]
        return {n: (t - second[n]) * per_example(weight, t) for n, t in first.items()}

    w, u = weighted(0), weighted(1)
    if isinstance(dynamics, Energy):
        every = _parameters(dynamics)
        for _, term in dynamics.terms():
            assert isinstance(term, Coupling)
            field = term.field(Blind(free[1], term.nodes), term.bind(x))
            seen = Blind(u, term.nodes)
            total = torch.stack([(seen[n] * f).sum() for n, f in field.items()]).sum()
            _accumulate(out, total, every)
    else:
        names = dynamics.names
        state = free[1][names[0]] if len(names) == 1 else free[1]
        block, drive = dynamics.block, dynamics.drive
        f = block(state, x) if dynamics.inject else block(state)
        parts: State = {names[0]: f} if isinstance(f, Tensor) else f
        if drive is not None:
            parts = {**parts, names[0]: parts[names[0]] + drive(x)}
        total = torch.stack([(u[n] * part).sum() for n, part in parts.items()]).sum()
        _accumulate(out, total, _parameters(block, *([] if drive is None else [drive])))
    for n in dynamics.names:
        sigma = dynamics.activation(n)
        _accumulate(out, (w[n] * sigma(free[0][n])).sum(), _parameters(sigma))
    return out
