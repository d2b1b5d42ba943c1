"""Cotangents and nudges: zero and scaled costs, absolute, relative and cost nudges, asymmetry and halving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import (
    EXACT,
    TIGHT,
    assert_close,
    gradients,
    precise,
    quadratic,
)
from toreq import Equilibrium, estimators
from toreq.core import Drive, Energy, HardSigmoid, Identity, Node, ReLU
from toreq.errors import ConfigError
from toreq.estimators import (
    Centered,
    Estimator,
    OneSided,
    Unrolled,
)
from toreq.solvers import FixedPoint
from zoo import ALL, case, linear

# those that read an equilibrium; contrasts of laws have tests of their own
SHIPPED: dict[str, Estimator] = {n: kind() for n, kind in estimators.REGISTRY.items() if kind().accepts(FixedPoint())}
PAIRS = [(n, k) for n in ALL for k, e in SHIPPED.items() if e.supports(case(n).dynamics)]
KINKED = [n for n in ALL if not case(n).smooth]


FEW = [p for p in PAIRS if p[0] in ("tanh_layers", "residual_loop", "field_mlp", "hard_sigmoid")]


@pytest.mark.parametrize(("name", "kind"), FEW)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_cotangent_gives_zero_gradient(name: str, kind: str, dtype: torch.dtype) -> None:
    """At shipped tolerances: a cost that depends on nothing teaches nothing, and needs no warning."""
    c = case(name)
    layer = Equilibrium(c.dynamics.to(dtype), estimator=SHIPPED[kind], readout=c.readout)
    found = gradients(layer, c.x.to(dtype), lambda out: 0 * quadratic()(out))
    for n, g in found.items():
        assert float(g.abs().max()) <= 1e-12, n


@pytest.mark.parametrize("kind", ["onesided", "centered", "nonconservative", "holomorphic", "implicit"])
def test_an_example_without_a_cotangent_adds_nothing(kind: str) -> None:
    """At shipped tolerances: the gradient of two examples is that of three of which one has no cost."""
    c, loss = case("tanh_layers"), quadratic()
    layer = Equilibrium(c.dynamics, estimator=SHIPPED[kind])

    def two_of_three(out: Tensor) -> Tensor:
        return loss(out * torch.tensor([[1.0], [0.0], [1.0]]).double())

    found = gradients(layer, c.x, two_of_three)
    assert float(found["x"][1].abs().max()) <= 1e-12
    kept = c.x[[0, 2]]

    def the_two(out: Tensor) -> Tensor:
        return two_of_three(torch.stack([out[0], out[0] * 0, out[1]]))

    wanted = gradients(layer, kept, the_two)
    for n, w in wanted.items():
        f = found[n][[0, 2]] if n == "x" else found[n]
        torch.testing.assert_close(f, w, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["onesided", "centered", "nonconservative", "holomorphic", "implicit"])
@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_gradient_is_linear_in_the_cotangent(kind: str, scale: float) -> None:
    """A relative beta does not care how the loss is scaled."""
    c, loss = case("tanh_layers"), quadratic()
    layer = c.layer(SHIPPED[kind])
    wanted = gradients(layer, c.x, loss)
    found = gradients(layer, c.x, lambda out: scale * loss(out))
    for n, w in wanted.items():
        torch.testing.assert_close(found[n] / scale, w, rtol=1e-5, atol=1e-8 * float(w.norm()))


def test_gradients_of_examples_add_up() -> None:
    c, loss = case("transformer"), quadratic()
    layer = c.layer(precise(Centered()))
    whole = gradients(layer, c.x, loss)
    parts = [
        gradients(layer, c.x, lambda out, i=i: loss(torch.where(torch.arange(3).view(3, 1, 1) == i, out, out.detach())))
        for i in range(3)
    ]
    for n, w in whole.items():
        torch.testing.assert_close(sum(p[n] for p in parts), w, rtol=1e-6, atol=1e-8)


# -- nudges ----------------------------------------------------------------------------------------------------------


def test_absolute_nudge_applies_beta_as_it_is() -> None:
    c = case("tanh_layers")
    v = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = c.layer(Centered(beta=0.03, nudge="absolute", tolerance=1e-11, max_halvings=0, max_steps=3000))
    solution = layer.solve_nudged(c.x, v)
    assert layer.last.nudged is not None
    assert layer.last.nudged.beta is not None
    assert layer.last.nudged.beta.tolist() == [0.03] * 3
    with torch.no_grad():
        bindings = c.dynamics.bind(c.x)
        for sign, part in ((1, slice(0, 3)), (-1, slice(3, 6))):
            h = {n: t[part] for n, t in solution.h.items()}
            field = c.dynamics.field(h, bindings)
            for n, a in solution.state.items():
                wanted = field[n] - (sign * 0.03 * v if n == "out" else 0)
                torch.testing.assert_close(a[part], wanted, rtol=1e-8, atol=1e-9)


def test_relative_nudge_gives_about_the_response_asked_for() -> None:
    c = case("tanh_layers")
    g = torch.Generator().manual_seed(0)
    v = torch.randn(3, 3, generator=g, dtype=torch.float64) * torch.tensor([[1e-3], [1.0], [1e3]])
    for beta in (0.01, 0.001):
        layer = c.layer(Centered(beta=beta))
        solution = layer.solve_nudged(c.x, v)
        last = layer.last.nudged
        assert last is not None
        assert last.beta is not None
        assert last.response is not None
        free = torch.cat([t.flatten(1) for t in layer.solve(c.x).h.values()], 1)
        h = torch.cat([t.flatten(1) for t in solution.h.values()], 1)
        response = (h[:3] - h[3:]).norm(dim=1) / (2 * free.norm(dim=1))
        torch.testing.assert_close(last.response, response, rtol=1e-3, atol=1e-9)
        assert bool((response > beta / 2).all())
        assert bool((response < 8 * beta).all())
        # a cotangent a thousand times larger needs a beta a thousand times smaller
        assert float(last.beta[0] / last.beta[2]) > 1e4


def test_cost_nudge_follows_the_cost() -> None:
    """``loss`` under ``nudge='cost'``: the papers' nudge, whose gradient is the implicit one as beta vanishes."""
    c = case("tanh_layers")
    y = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def cost(out: dict[str, Tensor]) -> Tensor:
        target = y[: out["out"].shape[0]]
        return (out["out"] - target).square().sum(1) * 0.5 + out["out"].pow(4).sum(1) * 0.1

    def run(estimator: Estimator) -> dict[str, Tensor]:
        layer = c.layer(estimator)
        layer.zero_grad()
        value = layer.loss(c.x, cost)
        (3 * value).backward()
        with torch.no_grad():
            torch.testing.assert_close(value.detach(), cost(layer.solve(c.x).h).mean())
        return {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}

    wanted = run(EXACT)
    plain = run(precise(Centered()))
    cost_options: dict[str, Any] = {"nudge": "cost", "tolerance": 1e-11, "max_steps": 3000}
    assert_close(plain, wanted, rtol=1e-3)
    assert_close(run(Centered(beta=1e-3, **cost_options)), wanted, rtol=1e-3)
    assert_close(run(OneSided(beta=1e-4, **cost_options)), wanted, rtol=5e-3)
    assert_close(run(Unrolled(steps=400)), wanted, rtol=1e-8)
    nudged = c.layer(Centered(beta=0.5, **cost_options))
    with pytest.raises(ConfigError, match=r"loss\(x, cost\) with nudge='cost'"):
        nudged(c.x)
    with torch.no_grad():
        assert nudged(c.x).shape == (3, 3)
    with pytest.raises(ConfigError, match="do not reduce over the batch"):
        nudged.loss(c.x, lambda out: out["out"].sum())


def test_cost_nudge_differs_from_a_linear_one_at_a_large_beta() -> None:
    """At beta 0.5 a quadratic cost is a spring towards the target: exact in a linear network."""
    energy = Energy([Node("h", 3, Identity())], [Drive("h", linear(3, 3, torch.Generator().manual_seed(0)))]).double()
    layer = Equilibrium(energy, TIGHT, OneSided(beta=0.5, nudge="cost", tolerance=1e-12, max_steps=500))
    x = torch.ones(1, 3, dtype=torch.float64)
    with torch.no_grad():
        d = energy.bind(x)["coupling_0"]["drive"]
    layer.loss(x, lambda out: 0.5 * out["h"].square().sum(1)).backward()
    module = energy.couplings[0].module  # type: ignore[union-attr]
    # h_beta = d - beta h_beta = d / 1.5, so -(h_beta - d) / beta = d / 1.5 stands where the true gradient has d
    torch.testing.assert_close(module.bias.grad, (d / 1.5)[0])


def _kinked_pair() -> tuple[Energy, Tensor]:
    """Two relu units: one far from its kink, one so close to it that a 1% nudge crosses it."""
    module = torch.nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 2e-3], [1.0, 0.5]], dtype=torch.float64)
    return Energy([Node("h", 2, ReLU())], [Drive("h", module)]), x


def test_asymmetry_halves_beta_only_where_it_is_needed() -> None:
    energy, x = _kinked_pair()
    v = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    kept = Equilibrium(energy, TIGHT, Centered(max_halvings=0))
    kept.solve_nudged(x, v)
    before = kept.last.nudged
    assert before is not None
    assert before.asym is not None
    assert before.beta is not None
    # h+ = 0, h- = 0.002 + 0.01: |h+ + h- - 2 h0| / |h+ - h-| = 0.008 / 0.012
    assert float(before.asym[0]) == pytest.approx(0.008 / 0.012, rel=1e-3)
    assert float(before.asym[1]) < 1e-9
    assert before.halvings == 0
    layer = Equilibrium(energy, TIGHT, Centered(max_halvings=3))
    solution = layer.solve_nudged(x, v)
    after = layer.last.nudged
    assert after is not None
    assert after.asym is not None
    assert after.beta is not None
    assert after.halvings == 3
    torch.testing.assert_close(after.beta, before.beta * torch.tensor([1 / 8, 1.0]).double())
    assert float(after.asym.max()) < 1e-9
    wanted = torch.tensor([[1.0, 0.5], [1.0, 0.5]]).double() + after.beta[1] * torch.tensor([[0.0, -1.0], [0.0, 1.0]])
    torch.testing.assert_close(solution.h["h"][[1, 3]], wanted)
    assert int(after.steps[0]) > int(after.steps[1])

    def loss(out: Tensor) -> Tensor:
        return out[:, 1].sum()

    wrong, right = gradients(kept, x, loss)["x"], gradients(layer, x, loss)["x"]
    torch.testing.assert_close(right, v)
    assert abs(float(wrong[0, 1]) - 1) > 0.3


def test_halving_in_a_batch_is_that_of_the_example_alone() -> None:
    energy, x = _kinked_pair()
    layer = Equilibrium(energy, TIGHT, Centered(max_halvings=3))
    batch = torch.cat([x, x * 1.7, x.flip(0)])
    weight = torch.arange(1.0, 7.0, dtype=torch.float64)

    together = gradients(layer, batch, lambda out: (weight * out[:, 1]).sum())["x"]
    alone = [
        gradients(layer, t[None], lambda out, w=w: (w * out[:, 1]).sum())["x"]
        for t, w in zip(batch, weight, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    torch.testing.assert_close(together[:, 1], weight)


def test_saturated_units_are_nudged_all_the_same() -> None:
    """Where no unit can respond at once, beta stays finite and the gradient is zero, as it should be."""
    energy = Energy([Node("h", 3, HardSigmoid())], [Drive("h", linear(3, 3, torch.Generator().manual_seed(0)))])
    x = torch.full((2, 3), 40.0, dtype=torch.float64)
    layer = Equilibrium(energy.double(), TIGHT)
    state = layer.solve(x).h["h"]
    assert bool(((state == 0) | (state == 1)).all())
    for g in gradients(layer, x, quadratic()).values():
        assert float(g.abs().max()) == 0
