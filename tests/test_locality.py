"""Claim B6: each parameter's update follows from the states of the nodes that its coupling joins, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import gradients, quadratic
from toreq import Equilibrium
from toreq.core import Coupling, Dynamics, Energy, Residual, VectorField
from toreq.core.state import per_example
from toreq.estimators import Centered, NonConservative, OneSided, Predictive
from toreq.solvers import FixedPoint
from zoo import COUPLED, ENERGIES, case

State = dict[str, Tensor]


class Blind(dict[str, Tensor]):
    """A state that shows the nodes of one coupling only; looking at any other node is an error."""

    def __init__(self, state: State, nodes: tuple[str, ...]) -> None:
        super().__init__({n: state[n] for n in nodes})

    def __missing__(self, key: str) -> Tensor:
        raise AssertionError(f"the update of this coupling looked at node {key!r}, which it does not join")


def _parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _accumulate(out: dict[int, Tensor], value: Tensor, parameters: list[torch.nn.Parameter]) -> None:
    if not parameters or not value.requires_grad:
        return
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    for p, g in zip(parameters, grads, strict=True):
        if g is not None:
            out[id(p)] = out[id(p)] + g if id(p) in out else g


def _contrast(energy: Energy, x: Tensor, plus: Any, minus: Any, weight: Tensor) -> dict[int, Tensor]:
    """``sum_b w_b [dE(plus) - dE(minus)]``, coupling by coupling, each from its own nodes, by autograd of its value."""
    out: dict[int, Tensor] = {}
    for _, c in energy.terms():
        bound = c.bind(x)
        value = (weight * (c.value(Blind(plus[1], c.nodes), bound) - c.value(Blind(minus[1], c.nodes), bound))).sum()
        _accumulate(out, -value, _parameters(c))
    for n in energy.names:
        sigma = energy.activation(n)
        phi = sigma.potential(plus[0][n]) - sigma.potential(minus[0][n])
        _accumulate(out, -(weight * phi).sum(), _parameters(sigma))
    return out


def _compare(layer: Equilibrium, wanted: dict[int, Tensor], tolerance: float) -> None:
    seen = 0
    for name, p in layer.named_parameters():
        if not p.requires_grad:
            continue
        assert p.grad is not None, name
        w = wanted.get(id(p), torch.zeros_like(p))
        if float(w.abs().max()) > 0:
            error = float((p.grad - w).norm() / w.norm())
            assert error <= tolerance, f"{name}: relative error {error:.2e}"
            seen += 1
        else:
            assert float(p.grad.abs().max()) == 0, name
    assert seen > 0


def _run(dynamics: Dynamics, x: Tensor, estimator: Any, tolerance: float = 1e-6) -> tuple[Equilibrium, Tensor]:
    layer = Equilibrium(dynamics, FixedPoint(damping=0.5, max_steps=3000, tolerance=tolerance), estimator)
    gradients(layer, x, quadratic())
    out = layer(x).detach().requires_grad_()
    (v,) = torch.autograd.grad(quadratic()(out), out)
    return layer, v


CASES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])


@CASES
@pytest.mark.parametrize("name", ENERGIES)
def test_centered_update_is_local(name: str, dtype: torch.dtype, tolerance: float) -> None:
    c = case(name)
    energy, x = c.dynamics.to(dtype), c.x.to(dtype)
    assert isinstance(energy, Energy)
    layer, v = _run(energy, x, Centered())
    shipped = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    solution = layer.solve_nudged(x, v)
    assert layer.last.nudged is not None
    beta = layer.last.nudged.beta
    assert beta is not None
    size = x.shape[0]
    plus = ({n: t[:size] for n, t in solution.state.items()}, {n: t[:size] for n, t in solution.h.items()})
    minus = ({n: t[size:] for n, t in solution.state.items()}, {n: t[size:] for n, t in solution.h.items()})
    # float32 sums of nearly equal numbers: the reference is formed in float64 from the same float32 states
    wide = case(name).dynamics
    assert isinstance(wide, Energy)
    wide.load_state_dict(energy.state_dict())
    first, second = ([{n: t.double() for n, t in s.items()} for s in pair] for pair in (plus, minus))
    doubled = _contrast(wide, x.double(), first, second, (0.5 / beta).double())
    by_name = {n: doubled[id(p)] for n, p in wide.named_parameters() if id(p) in doubled}
    wanted = {id(p): by_name[n].to(dtype) for n, p in energy.named_parameters() if n in by_name}
    for n, p in layer.named_parameters():
        p.grad = shipped.get(n)
    _compare(layer, wanted, tolerance)


@pytest.mark.parametrize("name", COUPLED)
def test_one_sided_update_is_local(name: str) -> None:
    c = case(name)
    energy = c.dynamics
    assert isinstance(energy, Energy)
    # tightly settled: the estimator refines the free state before it nudges
    layer, v = _run(energy, c.x, OneSided(), tolerance=1e-14)
    shipped = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    free, nudged = layer.solve(c.x), layer.solve_nudged(c.x, v)
    assert layer.last.nudged is not None
    beta = layer.last.nudged.beta
    assert beta is not None
    wanted = _contrast(energy, c.x, (nudged.state, nudged.h), (free.state, free.h), 1 / beta)
    for n, p in layer.named_parameters():
        p.grad = shipped.get(n)
    _compare(layer, wanted, 1e-7)


@pytest.mark.parametrize("name", ["residual_loop", "residual_chain"])
def test_predictive_update_is_local(name: str) -> None:
    """``-(1/beta) eps^T df/dtheta``: the error of the predicted node and the state of its source."""
    c = case(name)
    energy = c.dynamics
    assert isinstance(energy, Energy)
    layer, v = _run(energy, c.x, Predictive())
    shipped = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    solution = layer.solve_nudged(c.x, v)
    assert layer.last.nudged is not None
    beta = layer.last.nudged.beta
    assert beta is not None
    wanted: dict[int, Tensor] = {}
    for _, term in energy.terms():
        assert isinstance(term, Residual)
        eps = solution.h[f"eps_{term.node}"]
        source = () if term.source is None else (term.source,)
        prediction = term.prediction(Blind({n: solution.h[f"h_{n}"] for n in energy.names}, source), term.bind(c.x))
        value = -(eps * per_example(1 / beta, eps) * prediction).sum()
        _accumulate(wanted, value, _parameters(term))
    for n, p in layer.named_parameters():
        p.grad = shipped.get(n)
    _compare(layer, wanted, 1e-12)


@pytest.mark.parametrize("name", [*COUPLED, "field_mlp", "field_layer_norm"])
def test_nonconservative_update_is_local(name: str) -> None:
    """``-(1/2 beta) <h+ - h-, df/dtheta(h0)>``: differences and free states of the nodes that are joined."""
    c = case(name)
    layer, v = _run(c.dynamics, c.x, NonConservative())
    shipped = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    free, nudged = layer.solve(c.x), layer.solve_nudged(c.x, v)
    assert layer.last.nudged is not None
    beta = layer.last.nudged.beta
    assert beta is not None
    size = c.x.shape[0]
    weight = -0.5 / beta
    u = {n: (t[:size] - t[size:]) * per_example(weight, t[:size]) for n, t in nudged.h.items()}
    w = {n: (t[:size] - t[size:]) * per_example(weight, t[:size]) for n, t in nudged.state.items()}
    wanted: dict[int, Tensor] = {}
    if isinstance(c.dynamics, Energy):
        for _, term in c.dynamics.terms():
            assert isinstance(term, Coupling)
            field = term.field(Blind(free.h, term.nodes), term.bind(c.x))
            seen = Blind(u, term.nodes)
            _accumulate(wanted, sum((seen[n] * f).sum() for n, f in field.items()), _parameters(term))  # type: ignore[arg-type]
    else:
        assert isinstance(c.dynamics, VectorField)
        block, drive = c.dynamics.block, c.dynamics.drive
        f = block(free.h["h"], c.x) if c.dynamics.inject else block(free.h["h"])
        f = f if drive is None else f + drive(c.x)
        _accumulate(wanted, (u["h"] * f).sum(), [*_parameters(block), *([] if drive is None else _parameters(drive))])
    for n in c.dynamics.names:
        sigma = c.dynamics.activation(n)
        _accumulate(wanted, (w[n] * sigma(free.state[n])).sum(), _parameters(sigma))
    for n, p in layer.named_parameters():
        p.grad = shipped.get(n)
    _compare(layer, wanted, 1e-10)


def test_the_oracle_notices_a_look_at_another_node() -> None:
    state = {"a": torch.zeros(1), "b": torch.zeros(1)}
    blind = Blind(state, ("a",))
    assert blind["a"] is state["a"]
    with pytest.raises(AssertionError, match="looked at node 'b'"):
        blind["b"]
