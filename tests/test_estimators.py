"""Every estimator on every network it supports, against Implicit, finite differences and exact linear algebra."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import (
    EXACT,
    TIGHT,
    assert_aligned,
    assert_close,
    assert_finite_differences,
    cosine,
    gradients,
    precise,
    quadratic,
)
from toreq import Equilibrium, estimators
from toreq.core import Bilinear, Dense, Drive, Energy, HardSigmoid, Identity, Lateral, Node, ReLU
from toreq.errors import ConfigError, DivergenceError
from toreq.estimators import (
    Centered,
    Estimator,
    Holomorphic,
    Implicit,
    NonConservative,
    OneSided,
    Predictive,
    Unrolled,
)
from toreq.solvers import Anderson, Fading, FixedPoint, Solver
from zoo import ALL, ENERGIES, case, linear

SHIPPED: dict[str, Estimator] = {name: kind() for name, kind in estimators.REGISTRY.items()}
PAIRS = [(n, k) for n in ALL for k, e in SHIPPED.items() if e.supports(case(n).dynamics)]
KINKED = [n for n in ALL if not case(n).smooth]
# what the relative error of a gradient may be at the settings of `precise`
PRECISION = {"onesided": 3e-3, "holomorphic": 1e-4, "predictive": 1e-4, "unrolled": 1e-8, "implicit": 1e-9}


@pytest.mark.parametrize("name", ALL)
def test_implicit_against_finite_differences(name: str) -> None:
    c, loss = case(name), quadratic()
    layer = c.layer()
    assert_finite_differences(layer, c.x, loss, gradients(layer, c.x, loss))


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_supported_pair_against_implicit(name: str, kind: str) -> None:
    c, loss = case(name), quadratic()
    wanted = gradients(c.layer(), c.x, loss)
    found = gradients(c.layer(precise(SHIPPED[kind])), c.x, loss)
    assert_close(found, wanted, rtol=PRECISION.get(kind, 1e-5), small=1e-3)


@pytest.mark.parametrize("name", ["tanh_layers", "transformer", "springs", "residual_loop", "field_layer_norm"])
def test_default_estimator_against_finite_differences(name: str) -> None:
    """Without Implicit between: the contrast itself against differences of the loss."""
    c, loss = case(name), quadratic()
    default = Equilibrium(c.dynamics).estimator
    layer = c.layer(precise(default))
    assert_finite_differences(layer, c.x, loss, gradients(layer, c.x, loss), rtol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [p for p in PAIRS if p[0] not in KINKED])
@pytest.mark.parametrize("dtype", [torch.float32])
def test_shipped_settings_align_with_the_true_gradient(name: str, kind: str, dtype: torch.dtype) -> None:
    """Claim B1 on the small networks: default solver tolerance, default beta, cosine >= 0.999 for every parameter."""
    c, loss = case(name), quadratic()
    wanted = gradients(c.layer(), c.x, loss)
    solver: Solver = FixedPoint(max_steps=500)
    if isinstance(c.solver, FixedPoint):
        solver = replace(solver, damping=c.solver.damping)
    layer = Equilibrium(c.dynamics.to(dtype), solver, SHIPPED[kind], readout=c.readout)
    found = gradients(layer, c.x.to(dtype), loss)
    assert all(g.dtype == dtype for g in found.values())
    assert_aligned(found, wanted, least=0.999, ratio=0.15)


@pytest.mark.parametrize("name", KINKED)
@pytest.mark.parametrize("kind", ["onesided", "centered", "nonconservative"])
def test_kinked_activations_align_at_a_small_beta(name: str, kind: str) -> None:
    c, loss = case(name), quadratic()
    wanted = gradients(c.layer(), c.x, loss)
    found = gradients(c.layer(replace(precise(SHIPPED[kind]), beta=1e-4)), c.x, loss)
    assert_aligned(found, wanted, least=0.9999, ratio=0.01)


def _exact_linear(c: Any, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The equilibrium of ``identity_pair`` and its gradient, by autograd through ``torch.linalg.solve``."""
    drive, lateral, bilinear = c.dynamics.couplings
    raw = {
        "dynamics.couplings.0.module.weight": drive.module.weight,
        "dynamics.couplings.0.module.bias": drive.module.bias,
        "dynamics.couplings.1.op.weight": lateral.op.weight,
        "dynamics.couplings.2.op.weight": bilinear.op.weight,
        "x": x,
    }
    p = {k: v.detach().clone().requires_grad_() for k, v in raw.items()}
    w, b, s, a, inputs = p.values()
    m = torch.cat([torch.cat([(s + s.T) / 2, a.T], 1), torch.cat([a, torch.zeros(3, 3, dtype=a.dtype)], 1)])
    d = torch.cat([inputs @ w.T + b, torch.zeros(x.shape[0], 3, dtype=a.dtype)], 1)
    h = torch.linalg.solve(torch.eye(8, dtype=a.dtype) - m, d.T).T
    state = {"a": h[:, :5], "b": h[:, 5:]}
    quadratic()(state).backward()
    return {k: v.detach() for k, v in state.items()}, {k: v.grad for k, v in p.items() if v.grad is not None}


@pytest.mark.parametrize(
    "estimator",
    [EXACT, *(precise(SHIPPED[k]) for k in ("centered", "onesided", "holomorphic", "nonconservative", "unrolled"))],
    ids=lambda e: e.name,
)
def test_linear_network_against_exact_algebra(estimator: Estimator) -> None:
    c = case("identity_pair")
    state, wanted = _exact_linear(c, c.x)
    layer = c.layer(estimator, readout=("a", "b"))
    solution = layer.solve(c.x)
    for n, h in state.items():
        torch.testing.assert_close(solution.h[n], h, rtol=1e-10, atol=1e-11)
    # a linear cost on a linear network has no error in beta at all, except the one-sided free phase's own square
    assert_close(gradients(layer, c.x, quadratic()), wanted, rtol=1e-3 if estimator.name == "onesided" else 1e-7)


@pytest.mark.parametrize("kind", ["centered", "holomorphic", "nonconservative"])
@pytest.mark.parametrize("beta", [0.5, 0.05])
def test_contrast_is_exact_in_beta_on_linear_networks(kind: str, beta: float) -> None:
    c = case("identity_pair")
    _, wanted = _exact_linear(c, c.x)
    estimator = replace(precise(SHIPPED[kind]), beta=beta)
    assert_close(gradients(c.layer(estimator, readout=("a", "b")), c.x, quadratic()), wanted, rtol=1e-7)


SOLVERS: dict[str, Solver] = {
    "gauss_seidel": FixedPoint(order="gauss_seidel", max_steps=2000, tolerance=1e-13),
    "damped": FixedPoint(damping=0.5, max_steps=3000, tolerance=1e-13),
    "heavy_ball": FixedPoint(torus=Fading(alpha=-0.2, length=1), max_steps=3000, tolerance=1e-13),
    "anderson": Anderson(max_steps=500, tolerance=1e-12),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("kind", ["onesided", "centered", "nonconservative", "holomorphic", "implicit"])
@pytest.mark.parametrize("name", ["tanh_layers", "transformer"])
def test_estimators_under_every_solver(solver: Solver, kind: str, name: str) -> None:
    c, loss = case(name), quadratic()
    wanted = gradients(c.layer(), c.x, loss)
    estimator = replace(precise(SHIPPED[kind]), tolerance=1e-9)
    found = gradients(c.layer(estimator, solver), c.x, loss)
    assert_close(found, wanted, rtol=PRECISION.get(kind, 1e-5) if kind != "implicit" else 1e-6, small=1e-3)


@pytest.mark.parametrize("solver", [SOLVERS["gauss_seidel"], SOLVERS["damped"], SOLVERS["anderson"]])
@pytest.mark.parametrize(
    ("name", "kind"), [("residual_loop", "predictive"), ("residual_chain", "predictive"), ("field_pair", "implicit")]
)
def test_other_networks_under_every_solver(solver: Solver, name: str, kind: str) -> None:
    c, loss = case(name), quadratic()
    wanted = gradients(c.layer(), c.x, loss)
    assert_close(gradients(c.layer(precise(SHIPPED[kind]), solver), c.x, loss), wanted, rtol=1e-4)


# -- cotangents ------------------------------------------------------------------------------------------------------


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


# -- what a nudged phase must refuse ---------------------------------------------------------------------------------


def test_an_unsettled_nudged_phase_warns() -> None:
    from toreq.errors import ConvergenceWarning

    c = case("tanh_layers")
    layer = c.layer(Centered(max_steps=2))
    out = layer(c.x)
    with pytest.warns(ConvergenceWarning, match="nudged phase to settle, got 3 of 3"):
        out.sum().backward()


def test_a_cotangent_that_is_not_finite_is_refused() -> None:
    c = case("tanh_layers")
    for kind in ("onesided", "centered", "nonconservative", "holomorphic", "implicit"):
        for bad in (torch.nan, torch.inf):
            layer = c.layer(SHIPPED[kind], warn=False)
            out = layer(c.x)
            weight = torch.ones_like(out)
            weight[1, 0] = bad
            with pytest.raises(DivergenceError, match=r"nudged phase|cotangent"):
                out.backward(weight)


@pytest.mark.parametrize(
    ("name", "estimator", "reason"),
    [
        ("field_mlp", Centered(), "VectorField has none; use NonConservative"),
        ("field_mlp", OneSided(), "VectorField has none"),
        ("field_mlp", Holomorphic(), "VectorField has none"),
        ("field_mlp", Predictive(), "pure prediction-error energy"),
        ("tanh_layers", Predictive(), "pure prediction-error energy"),
        ("residual_mixed", Predictive(), "pure prediction-error energy"),
        ("hard_sigmoid", Holomorphic(), r"\['h', 'out'\] have kinks"),
        ("relu", Holomorphic(), r"\['h'\] have kinks"),
        ("residual_loop", Holomorphic(), r"analytic couplings, and \['Residual'\] are not"),
    ],
)
def test_unsupported_pairs_are_refused_with_the_reason(name: str, estimator: Estimator, reason: str) -> None:
    c = case(name)
    assert not estimator.supports(c.dynamics)
    with pytest.raises(ConfigError, match=reason):
        c.layer(estimator)
    layer = c.layer(Implicit())
    with pytest.raises(ConfigError, match=reason):
        layer.estimator = estimator
    assert layer.estimator == Implicit()


def test_all_for_lists_what_is_supported() -> None:
    assert set(estimators.names()) == set(SHIPPED)
    found = dict(estimators.all_for(case("tanh_layers").dynamics))
    assert set(found) == set(SHIPPED) - {"predictive"}
    assert set(dict(estimators.all_for(case("field_mlp").dynamics))) == {"nonconservative", "implicit", "unrolled"}
    assert "predictive" in dict(estimators.all_for(case("residual_chain").dynamics))
    assert all(e == SHIPPED[n] for n, e in found.items())


def test_default_estimators() -> None:
    kinds = {"tanh_layers": Centered, "field_mlp": NonConservative, "residual_loop": Predictive}
    for name, kind in kinds.items():
        assert type(Equilibrium(case(name).dynamics).estimator) is kind
    assert type(Equilibrium(case("residual_mixed").dynamics).estimator) is Centered


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (Centered, {"beta": 0.0}),
        (Centered, {"beta": -0.1}),
        (Centered, {"beta": 0.6}),
        (Centered, {"beta": float("nan")}),
        (Centered, {"tolerance": 1.0}),
        (Centered, {"tolerance": -1e-9}),
        (Centered, {"max_steps": 0}),
        (Centered, {"asym_limit": 0.0}),
        (Centered, {"max_halvings": -1}),
        (OneSided, {"beta": 0.0}),
        (NonConservative, {"nudge": "cost"}),
        (Holomorphic, {"points": 3}),
        (Holomorphic, {"points": 0}),
        (Holomorphic, {"nudge": "cost"}),
        (Predictive, {"nudge": "cost"}),
        (Implicit, {"tolerance": 1.5}),
        (Implicit, {"max_steps": 0}),
        (Unrolled, {"steps": 0}),
    ],
)
def test_options_out_of_range_are_refused(kind: Any, bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ConfigError, match=rf"{kind.__name__}: expected {name} .*, got .*; "):
        kind(**bad)


def test_absolute_betas_may_be_large() -> None:
    assert Centered(beta=1000.0, nudge="absolute").beta == 1000.0
    with pytest.raises(TypeError, match="betta"):
        Centered(betta=0.1)  # type: ignore[call-arg]


def test_kinked_centered_at_its_shipped_beta() -> None:
    """Halving where the asymmetry is large keeps the shipped setting right on kinked activations too."""
    for name in KINKED:
        c, loss = case(name), quadratic()
        wanted, found = gradients(c.layer(), c.x, loss), gradients(c.layer(Centered()), c.x, loss)
        for n, w in wanted.items():
            if float(w.norm()) > 1e-6:
                assert cosine(found[n], w) > 0.999, (name, n)


def test_energies_are_covered() -> None:
    """Every coupling and operator of the library is in some network that the pairs above go through."""
    from toreq import core

    seen = {type(m).__name__ for n in ENERGIES for m in case(n).dynamics.modules()}
    for kind in (Bilinear, Lateral, Drive, Dense):
        assert kind.__name__ in seen
    wanted = {"Attention", "LinearAttention", "Potential", "Residual", "Spring", "Conv", "Resample", "Circulant"}
    wanted |= {"Tanh", "HardSigmoid", "ReLU", "Softmax", "LayerNorm", "Identity", "IdentityOperator"}
    assert wanted <= seen
    assert all(hasattr(core, n) for n in wanted)
