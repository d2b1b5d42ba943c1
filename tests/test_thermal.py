"""Contrasts of laws against exact derivatives: by quadrature on tanh units, by linear algebra on Gaussian laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from laws import bistable_pair, gaussian, hessian, one_unit, quadrature
from toreq import Equilibrium, estimators
from toreq.core import Energy
from toreq.errors import ConfigError, DivergenceError
from toreq.estimators import Centered, Thermal, ThermalStatistics
from toreq.estimators.base import FreePhase, LinearNudge
from toreq.solvers import Anderson, Langevin
from zoo import case

X1 = torch.tensor([[0.4]], dtype=torch.float64)
X2 = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
V = torch.tensor([0.8, -0.5], dtype=torch.float64)


def estimate(energy: Energy, x: Tensor, chains: int, solver: Langevin, thermal: Thermal) -> dict[str, Tensor]:
    """Gradient of ``<v, h>`` for the mean of many chains of one input, by the layer's backward."""
    names = energy.names
    layer = Equilibrium(energy, solver, thermal, readout=names)
    layer.zero_grad()
    out = layer(x.expand(chains, -1))
    h = torch.cat([out[n] for n in names], 1)
    (h @ V[: h.shape[1]]).mean().backward()
    assert isinstance(layer.last.nudged, ThermalStatistics)
    found = {n: p.grad.clone() for n, p in energy.named_parameters() if p.grad is not None}
    if layer.last.nudged.temperature_gradient is not None:
        found["temperature"] = layer.last.nudged.temperature_gradient.sum()
    return found


def exact(energy: Energy, x: Tensor, temperature: float) -> dict[str, Tensor]:
    """The same by autograd through quadrature."""
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    law = quadrature(energy, x, tau)
    cost = law.mean(law.h @ V[: law.h.shape[1]])
    named = dict(energy.named_parameters())
    grads = torch.autograd.grad(cost, [*named.values(), tau])
    return dict(zip([*named, "temperature"], grads, strict=True))


def scatter(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest derivative."""
    size = max(float(w.abs().max()) for w in wanted.values())
    return max(float((found[n] - w).abs().max()) for n, w in wanted.items()) / size


@pytest.mark.parametrize("gain", [1.0, 2.0])
@pytest.mark.parametrize("temperature", [0.3, 1.2])
def test_one_unit_against_quadrature(temperature: float, gain: float) -> None:
    """Drive, bias, self-coupling and temperature."""
    energy = one_unit(gain=gain)
    wanted = exact(energy, X1, temperature)
    limit = 2 / (gain + 2 * temperature * gain**2 - 0.6 * gain**2)
    solver = Langevin(temperature=temperature, step_size=0.06 * limit, burn_in=80, samples=10, thin=8)
    thermal = Thermal(beta=0.02, nudge="relative", temperature_gradient=True)
    assert scatter(estimate(energy, X1, 6000, solver, thermal), wanted) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("adjusted", [False, True])
def test_bistable_pair_against_quadrature(adjusted: bool) -> None:
    """Where the mean response is mostly a shift of weight between the wells, the nudged chains have to cross, too."""
    energy, tau = bistable_pair(), 0.4
    wanted = exact(energy, X1, tau)
    eta = 0.3 if adjusted else 0.06
    solver = Langevin(temperature=tau, step_size=eta, burn_in=round(60 / eta), samples=15, thin=20, adjusted=adjusted)
    found = estimate(energy, X1, 10000, solver, Thermal(beta=0.05, temperature_gradient=True))
    assert scatter(found, wanted) < 0.06


def test_gaussian_law_against_linear_algebra() -> None:
    r"""``-(1/tau) Cov(dE/dtheta, <v, h>)`` in closed form, at a large step: the mean of a Gaussian has no bias."""
    energy, tau = gaussian(), 0.3
    curvature, minimum = hessian(energy, X2)
    v = torch.tensor([0.8, -0.5, 1.1], dtype=torch.float64)
    gains = torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64)
    covariance = tau * torch.linalg.inv(curvature) * gains[:, None] * gains[None, :]  # of the activations
    layer = Equilibrium(energy, Langevin(temperature=tau, step_size=0.6, burn_in=60, samples=20), readout=("v", "u"))
    x = X2.expand(4000, -1)
    out = layer(x)
    (torch.cat([out["v"], out["u"]], 1) @ v).mean().backward()
    drive, lateral, bilinear = energy.couplings
    # E = ... - <h_v, W x + b> - <h_v, S h_v> / 2 - <h_u, A h_v>
    mean = gains * minimum
    pull = covariance @ v / tau  # -(1/tau) Cov(-h, <v, h>)

    def error(found: Any, wanted: Tensor) -> float:
        assert isinstance(found, Tensor)
        return float((found - wanted).abs().max() / wanted.abs().max())

    # the drive's gradient is that of the mean state, on which the common noise cancels altogether
    assert error(drive.module.bias.grad, pull[:2]) < 1e-3  # type: ignore[union-attr]
    assert error(drive.module.weight.grad, pull[:2, None] * X2) < 1e-3  # type: ignore[union-attr]
    quadratic = mean[2] * pull[:2] + pull[2] * mean[:2]
    assert error(bilinear.op.weight.grad, quadratic[None]) < 0.03  # type: ignore[union-attr]
    s = 0.5 * (pull[:2, None] * mean[None, :2] + mean[:2, None] * pull[None, :2])
    assert error(lateral.op.weight.grad, s) < 0.03  # type: ignore[union-attr]


def test_the_mean_of_gradients_is_not_the_gradient_at_the_mean() -> None:
    """For a coupling of two units the contrast at mean states misses their correlation."""
    energy, tau = bistable_pair(strength=0.8, bias=0.5), 0.5
    law = quadrature(energy, X1, tau)
    cost = law.h @ V
    product, a, b = law.h[:, 0] * law.h[:, 1], law.h[:, 0], law.h[:, 1]
    wanted = float(law.covariance(product, cost).detach()) / tau
    of_means = float((law.mean(a) * law.covariance(b, cost) + law.mean(b) * law.covariance(a, cost)).detach()) / tau
    solver = Langevin(temperature=tau, step_size=0.08, burn_in=100, samples=10, thin=8)
    found = float(estimate(energy, X1, 6000, solver, Thermal(beta=0.03))["couplings.1.op.weight"])
    assert abs(found - wanted) < 0.15 * abs(wanted - of_means)


def _spread(common: bool, beta: float) -> float:
    """Standard deviation over examples of the drive's gradient."""
    energy = one_unit()
    solver = Langevin(temperature=0.5, step_size=0.2, burn_in=20, samples=10, thin=2)
    thermal = Thermal(beta=beta, nudge="absolute", common=common)
    layer = Equilibrium(energy, solver, thermal)
    x = X1.expand(400, -1).clone().requires_grad_()
    layer(x).sum().backward()  # the gradient of each example's input: the drive's, times its weight
    assert x.grad is not None
    return float(x.grad.std())


def test_common_noise_keeps_the_variance_bounded_as_beta_falls() -> None:
    betas = (0.3, 0.03, 0.003)
    common = [_spread(True, b) for b in betas]
    own = [_spread(False, b) for b in betas]
    assert max(common) < 1.3 * min(common)
    assert own[1] / own[0] == pytest.approx(10, rel=0.3)
    assert own[2] / own[1] == pytest.approx(10, rel=0.3)
    assert own[1] > 5 * common[1]


def test_error_is_of_second_order_in_beta() -> None:
    """Of the exact laws, as the formula has it; the chain's own scatter would hide it."""
    energy, tau = one_unit(), 0.5
    with torch.no_grad():
        law = quadrature(energy, X1, tau)
        wanted = float(law.covariance(0.5 * law.h[:, 0] ** 2, law.h[:, 0])) / tau
        errors = []
        for beta in (0.2, 0.1):
            sides = [quadrature(energy, X1, tau, lambda h, b=b: b * h[:, 0]) for b in (beta, -beta)]
            means = [float(side.mean(-0.5 * side.h[:, 0] ** 2)) for side in sides]
            errors.append((means[0] - means[1]) / (2 * beta) - wanted)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    # and the chain follows: at a large beta its bias is that of the formula
    solver = Langevin(temperature=tau, step_size=0.08, burn_in=40, samples=10, thin=6)
    large = Thermal(beta=0.8, nudge="absolute")
    layer = Equilibrium(energy, solver, large)
    layer(X1.expand(6000, -1)).mean().backward()
    # a mean over the batch puts 1/B into v: no nudge at all, and the plain derivative
    grads = {n: p.grad.clone() for n, p in energy.named_parameters() if p.grad is not None}
    assert float(grads["couplings.1.op.weight"]) == pytest.approx(wanted, rel=0.08)
    layer.zero_grad()
    layer(X1.expand(6000, -1)).sum().backward()
    with torch.no_grad():
        sides = [quadrature(energy, X1, tau, lambda h, b=b: b * h[:, 0]) for b in (0.8, -0.8)]
        means = [float(side.mean(-0.5 * side.h[:, 0] ** 2)) for side in sides]
    biased = (means[0] - means[1]) / 1.6
    assert abs(biased - wanted) > 0.1 * abs(wanted)
    grads = {n: p.grad / 6000 for n, p in energy.named_parameters() if p.grad is not None}
    assert float(grads["couplings.1.op.weight"]) == pytest.approx(biased, rel=0.08)


def test_cold_laws_give_the_gradient_of_the_equilibrium() -> None:
    c = case("tanh_layers")
    x = c.x
    settled = c.layer(Centered(beta=1e-4, tolerance=1e-10))
    settled(x).square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in settled.named_parameters() if p.grad is not None}
    settled.zero_grad()
    layer = Equilibrium(
        c.dynamics, Langevin(temperature=1e-6, step_size=0.5, burn_in=150, samples=10), Thermal(beta=5e-3)
    )
    layer(x).square().sum().backward()
    for n, p in layer.named_parameters():
        if p.grad is not None:
            assert float((p.grad - wanted[n]).norm()) < 0.02 * float(wanted[n].norm()), n


def test_an_example_without_a_cotangent_adds_nothing() -> None:
    layer = Equilibrium(bistable_pair(), Langevin(burn_in=5, samples=5), Thermal())
    x = X1.expand(3, -1).clone().requires_grad_()
    (layer(x) * torch.tensor([[1.0], [0.0], [2.0]])).sum().backward()
    assert x.grad is not None
    assert float(x.grad[1].abs().max()) == 0
    assert float(x.grad[[0, 2]].abs().min()) > 0
    x.grad = None
    (0 * layer(x)).sum().backward()
    assert float(x.grad.abs().max()) == 0  # type: ignore[union-attr]


def test_statistics_and_solution_of_the_nudged_chains() -> None:
    energy = bistable_pair()
    layer = Equilibrium(energy, Langevin(burn_in=5, samples=7, thin=2), Thermal(burn_in=3, samples=9))
    x = X1.expand(4, -1)
    solution = layer.solve_nudged(x, torch.ones(4, 1, dtype=torch.float64))
    found = layer.last.nudged
    assert isinstance(found, ThermalStatistics)
    assert found.steps.tolist() == [3 + 18] * 4
    assert found.beta is not None
    assert found.response is not None
    assert bool((found.response > 0).all())
    assert found.temperature_gradient is None
    assert bool(((found.residual >= 0) & (found.residual <= 1)).all())
    (plus, minus) = solution.h["b"].split(4)
    assert solution.h["b"].shape == (8, 1)
    assert bool((plus < minus).all())  # the cost pulls the read-out down; with common noise in every single chain
    torch.testing.assert_close(solution.h["b"].abs() < 1, torch.ones(8, 1, dtype=torch.bool))


def test_relative_beta_is_a_share_of_the_activations() -> None:
    energy = bistable_pair()
    with torch.no_grad():
        bindings = energy.bind(X1.expand(5, -1))
        a = {n: torch.randn(5, 1, generator=torch.Generator().manual_seed(i)).double() for i, n in enumerate("ab")}
        h = energy.activate(a, bindings)
        free = FreePhase(energy, bindings, Langevin(burn_in=2, samples=4), a, {n: 0 * t for n, t in h.items()})
        v = {"b": torch.full((5, 1), 3.0).double()}
        size = (h["a"].square() + h["b"].square()).sum(1).sqrt()
        torch.testing.assert_close(Thermal(beta=0.1).betas(free, v) * 3, 0.1 * size)
        torch.testing.assert_close(Thermal().betas(free, v) * 3, 0.05 * size)
        torch.testing.assert_close(Thermal(beta=0.1, nudge="absolute").betas(free, v), torch.full((5,), 0.1).double())


def test_a_schedule_is_not_run_again_for_the_nudged_chains() -> None:
    """They start from the law's own temperature: heated up again they would forget where they came from."""
    solver = Langevin(
        schedule="geometric", temperature=1e-8, start_temperature=1.0, burn_in=200, samples=4, step_size=0.4
    )
    layer = Equilibrium(one_unit(), solver, Thermal(beta=1e-6, burn_in=5))
    solution = layer.solve_nudged(X1.expand(6, -1), torch.ones(6, 1, dtype=torch.float64))
    with torch.no_grad():
        settled = Equilibrium(one_unit(), Anderson(tolerance=1e-10))(X1)
    assert float((solution.h["h"] - settled).abs().max()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision(dtype: torch.dtype) -> None:
    layer = Equilibrium(bistable_pair().to(dtype), Langevin(burn_in=5, samples=5), Thermal(temperature_gradient=True))
    layer(X1.expand(4, -1).to(dtype)).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())
    assert layer.last.nudged.temperature_gradient.dtype == dtype  # type: ignore[union-attr]


def test_a_layer_learns_by_it() -> None:
    """The mean read-out of a bistable pair is brought to a target by its gradient alone."""
    layer = Equilibrium(bistable_pair(strength=0.8), Langevin(temperature=0.4, step_size=0.3, burn_in=15, samples=6))
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.5)
    x, losses = X1.expand(256, -1), []
    for _ in range(10):
        optimiser.zero_grad()
        loss = (layer(x).mean() + 0.5).square()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[0] > 0.2
    assert losses[-1] < 0.02


def test_a_temperature_can_be_learnt() -> None:
    """By Newton's steps along the statistic the mean activation comes to that of a known temperature."""
    energy = one_unit()
    with torch.no_grad():
        law = quadrature(energy, X1, 0.4)
        target = float(law.mean(law.h[:, 0]))
    layer = Equilibrium(energy, Langevin(temperature=1.0, step_size=0.1, burn_in=40, samples=12, thin=4))
    layer.estimator = Thermal(temperature_gradient=True)
    temperatures = []
    for _ in range(8):
        mean = layer(X1.expand(2000, -1)).mean()
        mean.backward()
        solver, found = layer.solver, layer.last.nudged
        assert isinstance(solver, Langevin)
        assert isinstance(found, ThermalStatistics)
        assert found.temperature_gradient is not None
        step = (float(mean) - target) / float(found.temperature_gradient.sum())
        temperatures.append(max(0.5 * solver.temperature, solver.temperature - step))
        layer.solver = replace(solver, temperature=temperatures[-1])
    assert sum(temperatures[4:]) / 4 == pytest.approx(0.4, rel=0.1)


# refusals


@pytest.mark.parametrize(
    "solver",
    [Anderson(), Langevin(mode="annealed", tolerance=1e-3)],
    ids=lambda s: type(s).__name__,
)
def test_a_solver_that_settles_is_refused(solver: Any) -> None:
    with pytest.raises(ConfigError, match=r"Thermal contrasts laws, which .* does not sample; use Langevin"):
        Equilibrium(one_unit(), solver, Thermal())
    layer = Equilibrium(one_unit(), solver)
    layer.estimator = Thermal()
    with pytest.raises(ConfigError, match="does not sample"):
        layer(X1)
    with torch.no_grad():
        bindings = one_unit().bind(X1)
        a = one_unit().initial(bindings)
        free = FreePhase(one_unit(), bindings, solver, a, a)
        with pytest.raises(ConfigError, match="does not sample"):
            Thermal().estimate(free, LinearNudge(a))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("relu", "'h' has ReLU: it is flat below 0"), ("transformer", "adding a constant"), ("field_mlp", "no energy")],
)
def test_networks_that_cannot_be_sampled_are_refused(name: str, reason: str) -> None:
    support = Thermal().supports(case(name).dynamics)
    assert not support
    assert reason in support.reason
    layer = case(name).layer()
    with pytest.raises(ConfigError, match="Thermal contrasts laws"):
        layer.estimator = Thermal()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "beta None or > 0"),
        ({"beta": -1.0}, "beta None or > 0"),
        ({"beta": float("nan")}, "beta None or > 0"),
        ({"burn_in": -1}, "burn_in None or >= 0"),
        ({"samples": 1}, "samples None or >= 2"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Thermal(**fields)


def test_a_cotangent_that_is_not_finite_is_noticed() -> None:
    layer = Equilibrium(one_unit(), Langevin(burn_in=2, samples=4))
    with pytest.raises(DivergenceError, match="finite cotangent"):
        (layer(X1) * float("nan")).sum().backward()


def test_listed_for_solvers_that_sample() -> None:
    dynamics = bistable_pair()
    assert "thermal" in estimators.names()
    assert "thermal" not in dict(estimators.all_for(dynamics))
    assert [name for name, _ in estimators.all_for(dynamics, Langevin())] == ["thermal"]
    assert estimators.create("thermal", beta=0.1) == Thermal(beta=0.1)
