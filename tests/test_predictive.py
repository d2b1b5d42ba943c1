"""One nudged phase of prediction-error energies: the local rule, sweeps, schedules, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import EXACT, assert_close, fitted_order, gradients, quadratic
from toreq import Equilibrium
from toreq.core import Dense, Drive, Energy, Identity, Lateral, Node, Residual
from toreq.core.blocks import Branch, Given, Linear, Norm, Pointwise, SelfAttention, Stack
from toreq.core.prediction import PredictionEnergy
from toreq.core.residual import forward_order
from toreq.errors import ConfigError, DivergenceError
from toreq.estimators import Centered, Implicit, OneSided, Predictive, Unrolled
from toreq.solvers import FixedPoint
from toreq.solvers.forward import Forward
from zoo import case

TOKENS = (4, 6)


def _chain(levels: int = 4, dtype: torch.dtype = torch.float64, tied: bool = False) -> Equilibrium:
    """Attention and perceptron levels on a chain, no parameter at a special value."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for i in range(levels - 1):
        if tied and i:
            blocks.append(blocks[0])
        elif i % 2:
            blocks.append(Branch(Stack(Norm(6), Linear(6, 8), Pointwise("gelu"), Linear(8, 6)), 0.5))
        else:
            blocks.append(Branch(Stack(Norm(6), SelfAttention(6, 2)), 0.5))
    names = [f"h{i + 1}" for i in range(levels)]
    terms = [Residual(Given(), "h1", drive=nn.Linear(3, 6))]
    terms += [Residual(b, n, source=s, inject=False) for b, n, s in zip(blocks, names[1:], names[:-1], strict=True)]
    energy = PredictionEnergy(terms, dict.fromkeys(names, TOKENS))
    with torch.no_grad():
        for p in energy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return Equilibrium(energy.to(dtype), Forward())


def _input(dtype: torch.dtype = torch.float64, batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)


def _cotangent(layer: Equilibrium, x: Tensor) -> Tensor:
    h = layer(x).detach().requires_grad_()
    return torch.autograd.grad(quadratic()(h).to(h), h)[0]


def _shipped(layer: Equilibrium, x: Tensor, v: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    layer(x).backward(v)
    return {n: p.grad.detach().clone() for n, p in layer.named_parameters() if p.grad is not None}


def _by_autograd(layer: Equilibrium, x: Tensor, total: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Gradient of a function of the bound tensors."""
    named = dict(layer.named_parameters())
    found = torch.autograd.grad(total(layer.dynamics.bind(x)), list(named.values()))
    return dict(zip(named, found, strict=True))


def _close(found: dict[str, Tensor], wanted: dict[str, Tensor], error: float) -> None:
    assert set(found) == set(wanted)
    for n, w in wanted.items():
        assert float((found[n].double() - w.double()).norm() / w.double().norm()) < error, n


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_update_is_the_local_rule(dtype: torch.dtype, error: float, tied: bool) -> None:
    """Equal to autograd of - sum_l <eps_l (detached), f_l(h_{l-1})> / beta, level by level; tied levels add up."""
    layer, x = _chain(5, dtype, tied), _input(dtype)
    v = _cotangent(layer, x)
    found = _shipped(layer, x, v)
    nudged = layer.solve_nudged(x, v)
    beta = layer.last.nudged.beta  # type: ignore[union-attr]

    def total(bindings: Any) -> Tensor:
        parts = []
        for name, c in layer.dynamics.terms():  # type: ignore[operator]
            source = {} if c.source is None else {c.source: nudged.h[f"h_{c.source}"]}
            eps = nudged.h[f"eps_{c.node}"] / beta.view(-1, 1, 1)  # type: ignore[union-attr]
            parts.append(-(eps * c.prediction(source, bindings[name])).sum())
        return torch.stack(parts).sum()

    _close(found, _by_autograd(layer, x, total), error)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_update_is_the_gradient_of_the_energy_at_the_nudged_equilibrium(tied: bool) -> None:
    layer, x = _chain(5, tied=tied), 3 * _input()
    v = _cotangent(layer, x)
    layer.estimator = Predictive(beta=0.008, tolerance=0.0, max_steps=60)
    found = _shipped(layer, x, v)
    nudged = layer.solve_nudged(x, v)
    h = {n: nudged.h[f"h_{n}"] for n in layer.dynamics.names}
    eps = torch.cat([nudged.h[f"eps_{n}"].flatten(1) for n in h], 1)
    size = eps.norm(dim=1) / torch.cat([t.flatten(1) for t in h.values()], 1).norm(dim=1)
    assert bool(((size > 2e-3) & (size < 5e-2)).all())  # errors of about 1e-2 of the state
    beta = layer.last.nudged.beta  # type: ignore[union-attr]
    _close(found, _by_autograd(layer, x, lambda b: (layer.dynamics(h, b) / beta).sum()), 1e-12)


def test_a_chain_is_its_forward_pass_and_backprop() -> None:
    layer, x = _chain(6), _input()
    loss = quadratic()
    found = gradients(layer, x, loss)
    assert layer.last.free is not None
    assert layer.last.nudged is not None
    assert int(layer.last.free.steps.max()) == 1
    assert int(layer.last.nudged.steps.max()) == 1
    layer.estimator = Unrolled()
    assert_close(found, gradients(layer, x, loss), rtol=1e-12)
    layer.estimator = Implicit(tolerance=0.0, max_steps=10)
    assert_close(found, gradients(layer, x, loss), rtol=1e-12)


@pytest.mark.parametrize("levels", [2, 16, pytest.param(128, marks=pytest.mark.slow)])
def test_depth_costs_no_digits_in_float32(levels: int) -> None:
    torch.manual_seed(levels)
    names = [f"h{i + 1}" for i in range(levels)]
    terms = [Residual(Given(), "h1", drive=nn.Linear(10, 16))]
    for n, s in zip(names[1:], names[:-1], strict=True):
        inner = Stack(Pointwise("relu"), Linear(16, 16, 2**0.5))
        terms.append(Residual(Branch(inner, (levels - 1) ** -0.5), n, source=s, inject=False))
    energy = PredictionEnergy(terms, dict.fromkeys(names, (16,)))
    layer, x = Equilibrium(energy, Forward()), torch.randn(8, 10)
    target = torch.randn(8, 16)
    layer(x).sub(target).square().mean().backward()
    found = {n: p.grad.double() for n, p in layer.named_parameters() if p.grad is not None}
    layer.double().zero_grad()
    layer.estimator = Implicit(tolerance=1e-13, max_steps=1000)
    layer(x.double()).sub(target).square().mean().backward()
    for n, p in layer.named_parameters():
        assert p.grad is not None
        cosine = nn.functional.cosine_similarity(found[n].flatten(), p.grad.flatten(), dim=0)
        assert float(cosine) > 0.999999, n


@pytest.mark.parametrize("name", ["residual_chain", "residual_loop"])
@pytest.mark.parametrize(("two_sided", "order"), [(False, 1.0), (True, 2.0)], ids=["one_sided", "two_sided"])
def test_order_in_beta(name: str, two_sided: bool, order: float) -> None:
    c, loss = case(name), quadratic()
    wanted = torch.cat([g.flatten() for g in gradients(c.layer(), c.x, loss).values()])
    betas, errors = [0.04, 0.02, 0.01, 0.005], []
    for beta in betas:
        estimator = Predictive(beta=beta, nudge="absolute", tolerance=1e-12, max_steps=3000, two_sided=two_sided)
        found = gradients(c.layer(estimator), c.x, loss)
        errors.append(float((torch.cat([g.flatten() for g in found.values()]) - wanted).norm() / wanted.norm()))
    assert errors[0] > 1e-9
    assert fitted_order(betas, errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("levels", [2, 5, 9])
def test_synchronous_steps_end_after_two_per_level(levels: int) -> None:
    layer, x = _chain(levels), _input()
    v = _cotangent(layer, x)
    wanted = _shipped(layer, x, v)
    layer.estimator = Predictive(schedule="synchronous", tolerance=1e-6, max_steps=2 * levels + 1, beta=1e-9)
    found = _shipped(layer, x, v)
    assert layer.last.nudged is not None
    assert bool(layer.last.nudged.converged.all())
    # one step more than 2L, which sees that what changes still is of the order of beta
    assert int(layer.last.nudged.steps.max()) <= 2 * levels + 1
    _close(found, wanted, 1e-6)


def test_beta_is_a_power_of_two_near_the_one_asked_for() -> None:
    layer, x = _chain(), _input()
    layer.solve_nudged(x, _cotangent(layer, x))
    assert layer.last.nudged is not None
    beta, response = layer.last.nudged.beta, layer.last.nudged.response
    assert beta is not None
    assert response is not None
    assert torch.equal(beta, torch.exp2(torch.log2(beta).round()))
    assert bool(((response > 1e-7) & (response < 1e-5)).all())


def test_errors_that_grow_on_their_way_down_stay_small() -> None:
    torch.manual_seed(0)
    names = [f"h{i + 1}" for i in range(10)]
    terms = [Residual(Given(), "h1", drive=nn.Linear(3, 6))]
    for n, s in zip(names[1:], names[:-1], strict=True):
        terms.append(Residual(Stack(Pointwise("tanh"), Linear(6, 6, 4.0)), n, source=s, inject=False))
    energy = PredictionEnergy(terms, dict.fromkeys(names, (6,)))
    layer, x = Equilibrium(energy, Forward()), torch.randn(5, 3)
    layer(x).square().sum().backward()
    found = {n: p.grad.double() for n, p in layer.named_parameters() if p.grad is not None}
    assert layer.last.nudged is not None
    response = layer.last.nudged.response
    assert response is not None
    assert bool(((response > 0.49e-6) & (response < 1.01e-6)).all())
    layer.double().zero_grad()
    layer.estimator = Unrolled()
    layer(x.double()).square().sum().backward()
    for n, p in layer.named_parameters():
        assert p.grad is not None
        assert float((found[n] - p.grad).norm() / p.grad.norm()) < 1e-4, n


@pytest.mark.parametrize("kind", [OneSided, Centered])
def test_a_nudged_chain_settles_in_error_coordinates(kind: type[OneSided | Centered]) -> None:
    """Where a plain iteration of the whole energy does not contract; judged by its field."""
    layer, x = Equilibrium(_chain(8).dynamics, Forward(), readout=("h4", "h8")), _input()
    v = {n: 0.1 * torch.randn(t.shape, dtype=t.dtype) for n, t in layer(x).items()}
    layer.estimator = kind(beta=1e-4, tolerance=1e-11)
    found = layer.solve_nudged(x, v)
    assert bool(found.converged.all())
    assert layer.last.nudged is not None
    assert layer.last.nudged.beta is not None
    signs = (-1, 1) if kind is Centered else (-1,)
    size = torch.cat([s * layer.last.nudged.beta for s in signs])[:, None, None]
    field = layer.dynamics.field(found.h, layer.dynamics.bind(x.repeat(len(signs), 1, 1)))
    for n, t in v.items():
        field[n] = field[n] + size * t.repeat(len(signs), 1, 1)
    rest = layer.solve(x).h
    for n, h in found.h.items():
        moved = float((h[: len(x)] - rest[n]).norm())
        assert moved > 1e-5
        assert float((field[n] - h).detach().norm()) < 1e-8 * moved


def test_a_ring_has_no_order_for_sweeps() -> None:
    energy = PredictionEnergy([Residual(Stack(Linear(3, 3)), "a", source="a", inject=False)], {"a": (3,)})
    bindings = energy.bind(torch.randn(2, 3))
    with pytest.raises(ConfigError, match=r"expected a chain or tree.*relax it with a solver"):
        energy.errors({"a": torch.zeros(2, 3)}, bindings, {})
    with pytest.raises(ConfigError, match=r"expected a chain or tree.*relax it with a solver"):
        energy.forward_from({"a": torch.zeros(2, 3)}, bindings)


def test_states_move_only_where_the_tolerance_asks_for_it() -> None:
    layer, x = _chain(), _input()
    v, h0 = _cotangent(layer, x), layer.solve(x).h
    held = layer.solve_nudged(x, v).h
    assert all(torch.equal(held[f"h_{n}"], t) for n, t in h0.items())
    layer.estimator = Predictive(beta=1e-2, tolerance=1e-9)
    moved = layer.solve_nudged(x, v).h
    for n in h0:  # h = f(h) + eps, checked against the blocks themselves
        state = {m: moved[f"h_{m}"] for m in h0}
        predicted = layer.dynamics.map(state, layer.dynamics.bind(x))[n]
        torch.testing.assert_close(state[n] - predicted, moved[f"eps_{n}"], rtol=1e-6, atol=1e-9)


def test_an_example_does_not_depend_on_its_batch() -> None:
    layer, x = _chain(), _input(batch=6)
    layer.estimator = Predictive(beta=1e-3, tolerance=1e-7)
    v = _cotangent(layer, x)
    v = v * torch.logspace(0, 3, 6, dtype=v.dtype).view(-1, 1, 1)
    together = layer.solve_nudged(x, v)
    for i in range(6):
        alone = layer.solve_nudged(x[i : i + 1], v[i : i + 1])
        for n, t in alone.h.items():
            torch.testing.assert_close(together.h[n][i : i + 1], t, rtol=1e-9, atol=1e-14)
        assert int(alone.steps[0]) == int(together.steps[i])


def test_an_example_without_a_cotangent_gives_nothing() -> None:
    layer, x = _chain(), _input()
    v = _cotangent(layer, x)
    v[1] = 0
    both = _shipped(layer, x, v)
    rest = _shipped(layer, x[[0, 2]], v[[0, 2]])
    _close(both, rest, 1e-12)


def test_levels_without_a_reader_and_trees() -> None:
    """Two levels read one; the second branch is not read out and must get no gradient."""
    torch.manual_seed(0)
    terms = [
        Residual(nn.Linear(3, 5), "a"),
        Residual(nn.Sequential(nn.Linear(5, 4), nn.Tanh()), "b", source="a", inject=False),
        Residual(nn.Sequential(nn.Linear(5, 2), nn.Tanh()), "c", source="a", inject=False),
    ]
    energy = PredictionEnergy(terms, {"a": (5,), "b": (4,), "c": (2,)}).double()
    x = torch.randn(3, 3, dtype=torch.float64)
    layers = [Equilibrium(energy, Forward(), e, readout="b") for e in (Predictive(), EXACT)]
    found, wanted = (gradients(layer, x, quadratic()) for layer in layers)
    assert_close(found, wanted, rtol=1e-9)
    assert not found["dynamics.couplings.2.block.0.weight"].any()
    both = [Equilibrium(energy, Forward(), e, readout=("b", "c")) for e in (Predictive(), EXACT)]
    assert_close(*(gradients(layer, x, quadratic()) for layer in both), rtol=1e-9)  # type: ignore[arg-type]


def test_forward_order() -> None:
    def term(node: str, source: str | None) -> Residual:
        return Residual(nn.Linear(2, 2), node, source=source, inject=source is None)

    assert forward_order([term("c", "b"), term("b", "a"), term("a", None)]) == ("a", "b", "c")
    assert forward_order([term("a", "b"), term("b", "a")]) is None
    assert forward_order([Residual(nn.Linear(2, 2), "a", source="a", inject=False)]) is None


def test_an_additional_energy_is_refused_and_centered_takes_it() -> None:
    """With R(h) beside the prediction errors the free equilibrium has errors of its own: their formula is not the
    gradient of the cost, which only a contrast of two phases gives."""
    torch.manual_seed(0)
    nodes = [Node("a", 4, Identity()), Node("b", 3, Identity())]
    lateral = Dense(4, 4, symmetric=True, scale=0.1)
    terms = [
        Residual(nn.Linear(5, 4), "a"),
        Residual(nn.Sequential(nn.Tanh(), nn.Linear(4, 3)), "b", source="a", inject=False),
    ]
    extra = [Lateral(lateral, "a"), Drive("b", nn.Linear(5, 3))]
    energy = Energy(nodes, [*terms, *extra]).double()
    assert not energy.predictive
    with pytest.raises(ConfigError, match="nothing else; use Centered"):
        Equilibrium(energy, estimator=Predictive())
    x = torch.randn(3, 5, dtype=torch.float64)
    solver = FixedPoint(damping=0.5, tolerance=1e-13, max_steps=3000)
    centered = Centered(beta=1e-4, tolerance=1e-10, max_steps=3000)
    found, wanted = (gradients(Equilibrium(energy, solver, e), x, quadratic()) for e in (centered, EXACT))
    assert_close(found, wanted, rtol=1e-4)
    # why: the free state is not its own prediction
    layer = Equilibrium(energy, solver, centered)
    h, bound = layer.solve(x).h, energy.bind(x)
    error = h["b"] - terms[1].prediction(h, bound["coupling_1"])
    assert float(error.detach().norm()) > 0.1


def test_a_diverging_loop_is_an_error() -> None:
    torch.manual_seed(0)
    block = Branch(Linear(6, 6, gain=3.0), skip=False, inject=True)
    energy = PredictionEnergy([Residual(block, "h1", source="h1", drive=nn.Linear(3, 6))], {"h1": (6,)})
    layer = Equilibrium(energy, FixedPoint(max_steps=40), warn=False)
    with pytest.raises(DivergenceError, match="blocks do not contract"):
        layer(torch.randn(4, 3)).sum().backward()
    layer.solver = replace(layer.solver, max_steps=400)
    with pytest.raises(DivergenceError, match="expected a finite state"):
        layer(torch.randn(4, 3)).sum().backward()


def test_an_overflow_in_a_chain_is_an_error() -> None:
    layer, x = _chain(dtype=torch.float32), _input(torch.float32)
    with torch.no_grad():
        next(iter(layer.parameters())).fill_(1e30)
    with pytest.raises(DivergenceError, match="finite state"):
        layer(x * 1e30)


def test_forward_solver_records_and_calls_back() -> None:
    layer, x = _chain(), _input()
    seen: list[int] = []
    solution = layer.solve(x, record="states", callback=lambda s: seen.append(s.index))
    assert seen == [1]
    assert solution.trace is not None
    assert solution.trace.energy is not None
    assert solution.trace.states is not None
    assert solution.trace.residual.shape == (2, 3)
    # the energy is zero at the forward pass, and nowhere else
    assert float(solution.trace.energy[-1].abs().max()) < 1e-20
    assert float(solution.trace.energy[0].min()) > 0


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="'relative' or 'absolute'"):
        Predictive(nudge="cost")
    with pytest.raises(ConfigError, match="drive would not be read"):
        Residual(nn.Linear(2, 2), "a", source="a", inject=False, drive=nn.Linear(3, 2))
    with pytest.raises(ConfigError, match="predict every level once"):
        PredictionEnergy([Residual(nn.Linear(2, 2), "a")], {"a": (2,), "b": (2,)})
    with pytest.raises(ConfigError, match="depends on that example"):
        Residual(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "a", source="a")
    energy = PredictionEnergy([Residual(nn.Linear(3, 4), "a")], {"a": (5,)})
    with pytest.raises(ConfigError, match="expected a prediction of shape"):
        Equilibrium(energy, Forward())(torch.randn(2, 3))
