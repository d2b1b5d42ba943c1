"""The order of each estimator's error in beta, fitted on smooth networks in float64."""

from __future__ import annotations

import pytest
import torch

from oracles import fitted_order, gradients, quadratic
from toreq.estimators import Centered, Contrastive, Holomorphic, NonConservative, OneSided, Predictive
from zoo import case

BETAS = [0.04, 0.02, 0.01, 0.005]


def _order(name: str, make, betas: list[float]) -> float:
    c, loss = case(name), quadratic()
    wanted = gradients(c.layer(), c.x, loss)
    flat = torch.cat([g.flatten() for g in wanted.values()])
    errors = []
    for beta in betas:
        found = gradients(c.layer(make(beta)), c.x, loss)
        error = torch.cat([g.flatten() for g in found.values()]) - flat
        errors.append(float(error.norm() / flat.norm()))
    assert errors[0] > 1e-9, "below rounding: nothing to fit"
    return fitted_order(betas, errors)


SMOOTH = ["tanh_layers", "gated", "convolutional", "transformer", "softmax_output", "driven_potential", "springs"]


def _options(**more: object) -> dict[str, object]:
    return {"tolerance": 1e-11, "max_steps": 3000, "max_halvings": 0, **more}


@pytest.mark.parametrize("name", SMOOTH)
def test_one_sided_is_first_order(name: str) -> None:
    order = _order(name, lambda b: OneSided(beta=b, **_options()), [b / 4 for b in BETAS])  # type: ignore[arg-type]
    assert order == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("name", SMOOTH)
def test_centered_is_second_order(name: str) -> None:
    order = _order(name, lambda b: Centered(beta=b, **_options()), BETAS)  # type: ignore[arg-type]
    assert order == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("name", ["field_mlp", "field_pair", "field_layer_norm", "field_attention", "tanh_layers"])
def test_nonconservative_is_second_order(name: str) -> None:
    order = _order(name, lambda b: NonConservative(beta=b, **_options()), BETAS)  # type: ignore[arg-type]
    assert order == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("points", [2, 4])
@pytest.mark.parametrize("name", ["tanh_layers", "transformer", "softmax_output"])
def test_holomorphic_order_is_its_number_of_points(name: str, points: int) -> None:
    betas = BETAS if points == 2 else [2 * b for b in BETAS]
    order = _order(name, lambda b: Holomorphic(beta=b, points=points, **_options()), betas)  # type: ignore[arg-type]
    assert order == pytest.approx(points, abs=0.35)


@pytest.mark.parametrize("name", ["residual_loop", "residual_chain"])
def test_predictive_is_first_order(name: str) -> None:
    order = _order(name, lambda b: Predictive(beta=b, **_options()), [b / 4 for b in BETAS])  # type: ignore[arg-type]
    assert order == pytest.approx(1.0, abs=0.15)


def test_more_points_are_more_exact() -> None:
    c, loss = case("tanh_layers"), quadratic()
    wanted = torch.cat([g.flatten() for g in gradients(c.layer(), c.x, loss).values()])

    def error(estimator: Contrastive) -> float:
        found = gradients(c.layer(estimator), c.x, loss)
        return float((torch.cat([g.flatten() for g in found.values()]) - wanted).norm() / wanted.norm())

    errors = [error(Holomorphic(beta=0.05, points=m, tolerance=1e-13, max_steps=3000)) for m in (2, 4, 6)]
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 0.2 * errors[1]
