"""Every estimator on every network it supports, against Implicit, finite differences and exact linear algebra."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import (
    EXACT,
    assert_aligned,
    assert_close,
    assert_finite_differences,
    cosine,
    gradients,
    precise,
    quadratic,
)
from toreq import Equilibrium, estimators
from toreq.core import Bilinear, Dense, Drive, Lateral
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
from zoo import ALL, ENERGIES, case

# those that read an equilibrium; contrasts of laws have tests of their own
SHIPPED: dict[str, Estimator] = {n: kind() for n, kind in estimators.REGISTRY.items() if kind().accepts(FixedPoint())}
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
    assert set(estimators.names()) == set(SHIPPED) | {"thermal"}
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
