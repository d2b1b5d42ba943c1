"""Properties that must hold for any draw: descent, equivariance, zero cost, independence of instances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracles import gradients, precise, quadratic
from toreq import Equilibrium
from toreq.core import Bilinear, Dense, Drive, Energy, Lateral, Node, Potential
from toreq.core.nodes import Activation, HardSigmoid, Identity, LayerNorm, ReLU, Softmax, Tanh
from toreq.estimators import Centered, Implicit
from toreq.solvers import Anderson, Fading, FixedPoint, Solver
from zoo import COUPLED, case, linear

FEW = settings(max_examples=12, deadline=None)
KINDS = st.sampled_from([Identity, Tanh, HardSigmoid, ReLU, Softmax, lambda: LayerNorm(5)])
SOLVERS = st.sampled_from(
    [
        FixedPoint(max_steps=60, tolerance=1e-6),
        FixedPoint(max_steps=60, tolerance=1e-6, order="gauss_seidel"),
        FixedPoint(max_steps=60, tolerance=1e-6, torus=Fading(alpha=-0.2, length=2)),
        Anderson(max_steps=60, tolerance=1e-6, length=3),
    ]
)


def _network(seed: int, kind: Activation, strength: float) -> Energy:
    g = torch.Generator().manual_seed(seed)
    nodes = [Node("a", 5, kind), Node("b", 4, Tanh())]
    terms = [
        Drive("a", linear(3, 5, g)),
        Lateral(Dense(5, 5, symmetric=True, scale=strength / 5**0.5, generator=g), "a"),
        Bilinear(Dense(5, 4, scale=strength / 5**0.5, generator=g), "a", "b"),
        Potential(Dense(4, 6, scale=strength / 4**0.5, generator=g), "b"),
    ]
    return Energy(nodes, terms).double()


def _input(seed: int, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


@FEW
@given(seed=st.integers(0, 1000), kind=KINDS, strength=st.floats(0.05, 0.6), start=st.floats(0.1, 3.0))
def test_energy_descends_under_a_small_damping(seed: int, kind: type, strength: float, start: float) -> None:
    """From any start, every example, every step: ``dE = -gamma <sigma' r, r> <= 0`` to first order."""
    energy = _network(seed, kind(), strength)
    x = _input(seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bindings = energy.bind(x)
        a = {n: start * torch.randn(4, *s, generator=g, dtype=torch.float64) for n, s in energy.shapes.items()}
        before = energy(a, bindings)
        for _ in range(40):
            field = energy.field(energy.activate(a, bindings), bindings)
            a = {n: t + 0.02 * (field[n] - t) for n, t in a.items()}
            after = energy(a, bindings)
            assert bool((after <= before + 1e-10).all()), float((after - before).max())
            before = after


@pytest.mark.parametrize("name", COUPLED)
def test_recorded_energy_of_every_coupling_descends(name: str) -> None:
    c = case(name)
    trace = c.layer(solver=FixedPoint(damping=0.05, max_steps=60, tolerance=0.0)).solve(c.x, record=True).trace
    assert trace is not None
    assert trace.energy is not None
    assert bool((trace.energy[1:] <= trace.energy[:-1] + 1e-10).all())
    assert bool((trace.energy[-1] < trace.energy[0]).all())


@FEW
@given(seed=st.integers(0, 1000), kind=KINDS, solver=SOLVERS)
def test_permuting_the_batch_permutes_the_result(seed: int, kind: type, solver: Solver) -> None:
    layer = Equilibrium(_network(seed, kind(), 0.2), solver, Centered(max_steps=200), readout=("a", "b"), warn=False)
    x = _input(seed, 6) * torch.tensor([[0.01], [0.1], [1], [3], [10], [0.5]]).double()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    plain, mixed = layer.solve(x), layer.solve(x[order])
    assert torch.equal(plain.steps[order], mixed.steps)
    for n in plain.h:
        torch.testing.assert_close(plain.h[n][order], mixed.h[n], rtol=1e-9, atol=1e-11)

    def loss(out: dict[str, Tensor], index: Tensor) -> Tensor:
        weight = torch.linspace(0.5, 2, 6).double()[index]
        return sum((weight * t.square().sum(1)).sum() for t in out.values())  # type: ignore[return-value]

    a = gradients(layer, x, lambda out: loss(out, torch.arange(6)))
    b = gradients(layer, x[order], lambda out: loss(out, order))
    for n, g in a.items():
        wanted = g[order] if n == "x" else g
        torch.testing.assert_close(b[n], wanted, rtol=1e-6, atol=1e-7 * (1 + float(g.abs().max())))


@FEW
@given(seed=st.integers(0, 1000), kind=KINDS)
def test_zero_cost_gives_zero_gradient(seed: int, kind: type) -> None:
    layer = Equilibrium(_network(seed, kind(), 0.2), FixedPoint(max_steps=300), warn=False)
    for g in gradients(layer, _input(seed), lambda out: (out * 0).sum()).values():
        assert float(g.abs().max()) <= 1e-12


@FEW
@given(seed=st.integers(0, 1000), other=st.integers(1001, 2000), solver=SOLVERS)
def test_two_instances_do_not_interact(seed: int, other: int, solver: Solver) -> None:
    a = Equilibrium(_network(seed, Tanh(), 0.2), solver, warn=False)
    b = Equilibrium(_network(other, Tanh(), 0.2), solver, warn=False)
    x = _input(seed)
    alone = gradients(a, x, quadratic())
    out, noise = a(x), b(_input(other) * 2)
    quadratic()(noise).backward()
    a.zero_grad()
    quadratic()(out).backward()
    for n, p in a.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, alone[n])


@FEW
@given(seed=st.integers(0, 1000), kind=st.sampled_from([Identity, Tanh, Softmax, lambda: LayerNorm(5)]))
def test_centered_agrees_with_implicit_on_any_draw(seed: int, kind: type) -> None:
    energy, x = _network(seed, kind(), 0.15), _input(seed)
    tight = FixedPoint(damping=0.5, max_steps=2000, tolerance=1e-11)
    wanted = gradients(Equilibrium(energy, tight, Implicit(tolerance=1e-11, max_steps=2000)), x, quadratic())
    found = gradients(Equilibrium(energy, tight, precise(Centered())), x, quadratic())
    for n, w in wanted.items():
        assert float((found[n] - w).norm()) <= 1e-4 * float(w.norm()) + 1e-7


@FEW
@given(seed=st.integers(0, 1000), solver=SOLVERS)
def test_solving_twice_gives_the_same_bits(seed: int, solver: Solver) -> None:
    layer, x = Equilibrium(_network(seed, Tanh(), 0.2), solver, warn=False), _input(seed)
    first, second = layer.solve(x), layer.solve(x)
    assert all(torch.equal(t, second.state[n]) for n, t in first.state.items())


@FEW
@given(seed=st.integers(0, 1000), kind=KINDS)
def test_solve_agrees_with_forward(seed: int, kind: type) -> None:
    layer, x = Equilibrium(_network(seed, kind(), 0.2), FixedPoint(max_steps=300), warn=False), _input(seed)
    assert torch.equal(layer(x).detach(), layer.solve(x).h["b"])
    assert layer.last.free is not None
    assert torch.equal(layer.last.free.steps, layer.solve(x).steps)
