"""Norm control as a parametrization: the bound holds under any optimizer, and its gradient is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from oracles import EXACT, TIGHT, assert_close, assert_finite_differences, gradients, precise, quadratic
from toreq import Equilibrium
from toreq.core import Bilinear, Circulant, Conv, Dense, Drive, Energy, Lateral, Node, Operator, Tanh, control_norm
from toreq.core.operators import IdentityOperator
from toreq.errors import ConfigError
from toreq.estimators import Centered
from toreq.solvers import FixedPoint
from zoo import linear


def _make(name: str, scale: float = 1.0) -> Operator:
    g = torch.Generator().manual_seed(0)
    return {
        "dense": lambda: Dense(7, 5, scale=scale, generator=g),
        "symmetric": lambda: Dense(6, 6, symmetric=True, scale=scale, generator=g),
        "shaped": lambda: Dense((2, 3), 4, scale=scale, generator=g),
        "conv": lambda: Conv((2, 7, 6), 3, 3, stride=2, padding=1, scale=scale, generator=g),
        "circulant": lambda: Circulant(6, scale=scale, generator=g),
        "circulant_symmetric": lambda: Circulant(6, symmetric=True, scale=scale, generator=g),
        "conv_pool": lambda: Conv((2, 6, 6), 3, 3, padding=1, pool=2, scale=scale, generator=g),
    }[name]().double()


NAMES = ["dense", "symmetric", "shaped", "conv", "conv_pool", "circulant", "circulant_symmetric"]
EACH = pytest.mark.parametrize("name", NAMES)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.3),
    "adam": lambda p: torch.optim.Adam(p, 0.05),
}


def _held(op: Operator, bound: float) -> Operator:
    control_norm(op, bound, next(n for n, _ in op.named_parameters()))
    return op


def _norm(op: Operator) -> float:
    n = int(torch.tensor(op.in_shape).prod())
    with torch.no_grad():
        columns = op(torch.eye(n, dtype=torch.float64).view(n, *op.in_shape)).flatten(1)
    return float(torch.linalg.matrix_norm(columns, 2))


@EACH
def test_large_weights_are_scaled_to_the_bound_and_small_ones_left_alone(name: str) -> None:
    op = _held(_make(name), 0.9)
    for _ in range(100):
        op.tensors()
    assert _norm(op) == pytest.approx(0.9, rel=2e-3)
    op.eval()
    small = _make(name, scale=1e-2)
    before = next(iter(small.tensors().values())).detach().clone()
    after = next(iter(_held(small, 0.9).tensors().values())).detach()
    torch.testing.assert_close(after, before)


def test_direction_is_kept() -> None:
    op = _make("dense")
    before = op.tensors()["weight"].detach().clone()
    after = _held(op, 0.5).tensors()["weight"].detach()
    torch.testing.assert_close(after / after.norm(), before / before.norm())


@EACH
@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.3), lambda p: torch.optim.Adam(p, 0.05)], ids=["sgd", "adam"]
)
def test_the_bound_holds_under_any_optimizer(name: str, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Maximising an output drives the norm up as fast as it can; the effective weight must not follow."""
    free, held = _make(name, 0.2), _held(_make(name, 0.2), 0.9)
    g = torch.Generator().manual_seed(1)
    u = torch.randn(4, *free.in_shape, generator=g, dtype=torch.float64)
    for op in (free, held):
        optimizer = make(op.parameters())
        for _ in range(40):
            optimizer.zero_grad()
            (-op(u).square().mean()).backward()
            optimizer.step()
    assert _norm(free) > 1.2
    assert _norm(held) < 0.9 * 1.03


@pytest.mark.parametrize("bound", [0.4, 10.0])
def test_gradient_through_the_control(bound: float) -> None:
    g = torch.Generator().manual_seed(0)

    def build(estimator: Any) -> Equilibrium:
        h = torch.Generator().manual_seed(0)
        lateral = _held(Dense(6, 6, symmetric=True, scale=0.15, generator=h), bound).double()
        dense = _held(Dense(6, 4, scale=0.15, generator=h), bound).double()
        energy = Energy(
            [Node("h", 6, Tanh()), Node("k", 4, Tanh())],
            [Drive("h", linear(3, 6, h)), Lateral(lateral, "h"), Bilinear(dense, "h", "k")],
        )
        # evaluation mode: the power iteration stands still, so that finite differences see one function
        layer = Equilibrium(energy, TIGHT, estimator)
        for _ in range(200):
            lateral.tensors(), dense.tensors()
        return layer.eval()

    x = torch.randn(3, 3, generator=g, dtype=torch.float64)
    reference = build(EXACT)
    wanted = gradients(reference, x, quadratic())
    assert_finite_differences(reference, x, quadratic(), wanted)
    assert_close(gradients(build(precise(Centered())), x, quadratic()), wanted, rtol=1e-4)


def test_evaluation_changes_nothing_and_training_survives_copies() -> None:
    op = _held(_make("dense"), 0.5).eval()
    before = {k: v.clone() for k, v in op.state_dict().items()}
    first = op.tensors()["weight"].detach().clone()
    for _ in range(3):
        assert torch.equal(op.tensors()["weight"], first)
    assert all(torch.equal(v, before[k]) for k, v in op.state_dict().items())
    twin = copy.deepcopy(op)
    assert torch.equal(twin.tensors()["weight"], first)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(3.0)
    twin.train()
    for _ in range(30):
        twin.tensors()
    assert _norm(twin) == pytest.approx(0.5, rel=1e-2)
    assert torch.equal(op.tensors()["weight"], first), "a copy must control its own operator, not the original"
    other = _held(Dense(7, 5).double(), 0.5).eval()
    other.load_state_dict(op.state_dict())
    assert torch.equal(other.tensors()["weight"], first)


def test_training_with_control_keeps_a_deep_network_settling() -> None:
    g = torch.Generator().manual_seed(0)
    lateral = _held(Dense(12, 12, symmetric=True, scale=0.1, generator=g), 0.8)
    energy = Energy([Node("h", 12, Tanh())], [Drive("h", linear(4, 12, g)), Lateral(lateral, "h")]).float()
    layer = Equilibrium(energy, FixedPoint(max_steps=300))
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    x, y = torch.randn(32, 4, generator=g), torch.sign(torch.randn(32, 12, generator=g))
    first = None
    for _ in range(40):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        first = float(loss.detach()) if first is None else first
    assert float(loss.detach()) < 0.9 * first
    assert layer.last.free is not None
    assert bool(layer.last.free.converged.all())
    assert lateral.norm() < 0.83


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="bound > 0"):
        control_norm(Dense(3, 3), 0.0)
    with pytest.raises(ConfigError, match=r"parameter 'weight', got IdentityOperator with \[\]"):
        control_norm(IdentityOperator(3), 0.9)
    with pytest.raises(ConfigError, match=r"'kernl', got Circulant with \['kernel'\]"):
        control_norm(Circulant(3), 0.9, "kernl")
    with pytest.raises(ConfigError, match="matrix parameter 'bias'"):
        control_norm(torch.nn.Linear(3, 3), 0.9, "bias")


def test_a_matrix_of_any_module_can_be_controlled() -> None:
    layer = torch.nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight.mul_(20)
    control_norm(layer, 0.7)
    for _ in range(60):
        weight = layer.weight
    assert float(torch.linalg.matrix_norm(weight.detach(), 2)) == pytest.approx(0.7, rel=1e-2)
