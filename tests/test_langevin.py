"""Langevin chains against closed forms and quadrature, and the steps that are stable."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws import bistable_pair, gaussian, hessian, one_unit, quadrature, relaxation
from toreq import Equilibrium, wrap
from toreq.core import Bilinear, Dense, Drive, Energy, Identity, Lateral, Node, Residual, Tanh
from toreq.core.state import State
from toreq.errors import ConfigError, DivergenceError
from toreq.solvers import Langevin, Relaxation
from toreq.solvers.curvature import lanczos
from zoo import case, linear

X1 = torch.tensor([[0.4]], dtype=torch.float64)
X2 = torch.tensor([[0.3, -0.8]], dtype=torch.float64)


def stacked_samples(solver: Langevin, problem: Relaxation, start: State, of: int = 1) -> Tensor:
    """All samples of all chains: pre-activations (0) or activations (1) of all nodes side by side, ``(N, n)``."""
    return torch.cat([torch.cat(list(part[of].values()), 1) for part in solver.sample(problem, start)])


def moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples.mean(0), samples.T.cov()


# the law


@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
def test_gaussian_law_with_the_bias_of_the_step(share: float) -> None:
    """On a quadratic energy the stationary covariance is ``tau [H (1 - eta H / 2)]^-1``, at any stable step."""
    energy, tau = gaussian(), 0.3
    curvature, minimum = hessian(energy, X2)
    eta = share * 2 / float(torch.linalg.eigvalsh(curvature)[-1])
    wanted = tau * torch.linalg.inv(curvature @ (torch.eye(3).double() - 0.5 * eta * curvature))
    # the slowest direction forgets its start
    burn_in = round(6 / (eta * float(torch.linalg.eigvalsh(curvature)[0])))
    solver = Langevin(temperature=tau, step_size=eta, burn_in=burn_in, samples=25, thin=round(2 / eta))
    mean, covariance = moments(stacked_samples(solver, *relaxation(energy, X2, 8000), of=0))
    scale = wanted.diagonal().sqrt()
    assert float(((mean - minimum) / scale).abs().max()) < 0.015
    assert float(((covariance - wanted) / scale[:, None] / scale[None, :]).abs().max()) < 0.02
    if share > 0.4:
        unbiased = tau * torch.linalg.inv(curvature)
        assert float(((covariance - unbiased) / scale[:, None] / scale[None, :]).abs().max()) > 0.1


def test_adjusted_chain_has_the_exact_gaussian_law_at_a_large_step() -> None:
    energy, tau = gaussian(), 0.3
    curvature, minimum = hessian(energy, X2)
    eta = 0.5 * 2 / float(torch.linalg.eigvalsh(curvature)[-1])
    wanted = tau * torch.linalg.inv(curvature)
    solver = Langevin(temperature=tau, step_size=eta, burn_in=40, samples=25, thin=4, adjusted=True)
    mean, covariance = moments(stacked_samples(solver, *relaxation(energy, X2, 8000), of=0))
    scale = wanted.diagonal().sqrt()
    assert float(((mean - minimum) / scale).abs().max()) < 0.015
    assert float(((covariance - wanted) / scale[:, None] / scale[None, :]).abs().max()) < 0.025


@pytest.mark.parametrize(("temperature", "gain"), [(0.2, 1.0), (1.5, 1.0), (0.5, 2.5)])
def test_one_tanh_unit_against_quadrature(temperature: float, gain: float) -> None:
    """At high temperatures the law is nearly uniform in h: without the determinant it could not even be normalised."""
    energy = one_unit(gain=gain)
    law = quadrature(energy, X1, temperature)
    exact = torch.stack([law.mean(law.h[:, 0] ** k) for k in (1, 2, 3, 4)]).detach()
    problem, start = relaxation(energy, X1, 8000)
    limit = Langevin(temperature=temperature).limit(problem, start)
    solver = Langevin(temperature=temperature, step_size=0.3 * limit, burn_in=60, samples=25, thin=4, adjusted=True)
    h = stacked_samples(solver, problem, start)[:, 0]
    found = torch.stack([(h**k).mean() for k in (1, 2, 3, 4)])
    assert float((found - exact).abs().max()) < 6e-3
    plain = replace(solver, adjusted=False, step_size=0.05 * limit, burn_in=150, samples=8, thin=20)
    h = stacked_samples(plain, problem, start)[:, 0]
    found = torch.stack([(h**k).mean() for k in (1, 2, 3, 4)])
    assert float((found - exact).abs().max()) < 0.02


@pytest.mark.parametrize("adjusted", [True, False])
def test_preconditioning_leaves_the_law_and_lets_flat_nodes_keep_up(adjusted: bool) -> None:
    """Two coupled units, one of a hundredth of the other's slope: its law needs some thousand steps without."""
    flat, steep, tau, w = 0.05, 5.0, 0.3, 0.8
    nodes = [Node("a", 1, Identity(flat)), Node("b", 1, Identity(steep))]
    op = Dense(1, 1).double()
    with torch.no_grad():
        op.weight.fill_(w)
    energy = Energy(nodes, [Bilinear(op, "a", "b")]).double()
    problem = Relaxation(energy, energy.bind(torch.zeros(64, 1, dtype=torch.float64)))
    start = {n: torch.zeros(64, 1, dtype=torch.float64) for n in "ab"}
    # E = a^2 / 2 flat + b^2 / 2 steep - w a b in the activations
    wanted = tau * torch.linalg.inv(torch.tensor([[1 / flat, -w], [-w, 1 / steep]], dtype=torch.float64))
    found = {}
    for preconditioned in (True, False):
        eta = 0.3 if preconditioned else 0.3 / steep
        chain = Langevin(
            temperature=tau, step_size=eta, burn_in=30, samples=400, preconditioned=preconditioned, adjusted=adjusted
        )
        drawn = torch.stack([torch.cat([h["a"], h["b"]], 1) for _, h in chain.sample(problem, start)])
        found[preconditioned] = drawn.flatten(0, 1).T.cov()
    # an unadjusted step of 0.3 widens each law by about 1 / (1 - 0.15)
    torch.testing.assert_close(found[True], wanted, rtol=0.06 if adjusted else 0.25, atol=0.01)
    assert float(found[False][0, 0]) < 0.8 * float(wanted[0, 0])


def test_step_limit_is_in_units_of_the_slopes_when_preconditioned() -> None:
    energy = Energy([Node("a", 3, Identity(0.02)), Node("b", 3, Identity(7.0))], []).double()
    problem = Relaxation(energy, energy.bind(torch.zeros(2, 3, dtype=torch.float64)))
    start = {n: torch.zeros(2, 3, dtype=torch.float64) for n in "ab"}
    assert Langevin(preconditioned=True).limit(problem, start) == pytest.approx(2.0, rel=1e-6)
    assert Langevin(step_size=0.01).limit(problem, start) == pytest.approx(2 / 7, rel=1e-6)


def test_bias_of_the_step_is_of_first_order_and_gone_when_adjusted() -> None:
    energy, tau = one_unit(), 0.5
    law = quadrature(energy, X1, tau)
    exact = float(law.mean(law.h[:, 0] ** 2).detach())
    problem, start = relaxation(energy, X1, 10000)
    errors = {}
    for eta, adjusted in ((0.8, False), (0.4, False), (0.8, True)):
        thin = round(2.4 / eta)
        solver = Langevin(temperature=tau, step_size=eta, burn_in=30, samples=30, thin=thin, adjusted=adjusted)
        errors[eta, adjusted] = float(stacked_samples(solver, problem, start).square().mean()) - exact
    assert abs(errors[0.8, True]) < 2e-3
    assert abs(errors[0.8, False]) > 0.02
    assert 1.6 < errors[0.8, False] / errors[0.4, False] < 2.9


@pytest.mark.slow
@pytest.mark.parametrize("adjusted", [True, False])
def test_bistable_pair_against_quadrature_from_either_well(adjusted: bool) -> None:
    """Both wells hold their share whatever the start: moments, and a histogram of one unit."""
    energy, tau = bistable_pair(), 0.3
    with torch.no_grad():
        law = quadrature(energy, X1, tau)
    problem, start = relaxation(energy, X1, 10000)
    bins = torch.linspace(-1, 1, 9).double()
    exact = torch.stack([law.p[(law.h[:, 0] > a) & (law.h[:, 0] <= b)].sum() for a, b in itertools.pairwise(bins)])
    assert float(exact[0]) > 0.08
    assert float(exact[-1]) > 0.12
    eta, samples, thin = (0.5, 20, 4) if adjusted else (0.08, 4, 20)
    for side in (-1.5, 1.5):
        solver = Langevin(
            temperature=tau,
            step_size=eta,
            burn_in=200 if adjusted else 600,
            samples=samples,
            thin=thin,
            adjusted=adjusted,
        )
        h = stacked_samples(solver, problem, {n: torch.full_like(t, side) for n, t in start.items()})
        found = torch.histc(h[:, 0], 8, -1, 1) / h.shape[0]
        assert float((found - exact).abs().max()) < (0.012 if adjusted else 0.025)
        assert abs(float((h[:, 0] * h[:, 1]).mean()) - float(law.mean(law.h[:, 0] * law.h[:, 1]))) < 0.02
        assert abs(float((h[:, 0] > 0).double().mean()) - float(law.p[law.h[:, 0] > 0].sum())) < 0.03


def test_a_prediction_error_energy_is_sampled_by_its_gradient_not_by_its_map() -> None:
    r"""``E = |h - W h - d|^2 / 2``: a Gaussian of covariance ``tau [(1 - W)^T (1 - W)]^-1``, the mean where E = 0."""
    g = torch.Generator().manual_seed(3)
    block = linear(2, 2, g, 0.4)
    layer = wrap(
        block, 2, inject="add", solver=Langevin(temperature=0.2, step_size=0.4, burn_in=40, samples=12, thin=6)
    )
    layer = layer.double()
    m = torch.eye(2).double() - block.weight.detach()
    curvature = m.T @ m
    assert isinstance(layer.solver, Langevin)
    wanted = 0.2 * torch.linalg.inv(curvature @ (torch.eye(2).double() - 0.2 * curvature))
    x = X2.expand(8000, -1)
    with torch.no_grad():
        bindings = layer.dynamics.bind(x)
        problem = Relaxation(layer.dynamics, bindings, as_map=True)
        mean, covariance = moments(stacked_samples(layer.solver, problem, layer.dynamics.initial(bindings)))
        minimum = torch.linalg.solve(m, (block(X2))[0])
    scale = wanted.diagonal().sqrt()
    assert float(((mean - minimum) / scale).abs().max()) < 0.03
    assert float(((covariance - wanted) / scale[:, None] / scale[None, :]).abs().max()) < 0.05


def test_solution_is_the_mean_over_the_samples() -> None:
    energy = bistable_pair()
    problem, start = relaxation(energy, X1, 5)
    solver = Langevin(burn_in=7, samples=11, thin=3, seed=4)
    solution = solver.solve(problem, start, record="states")
    again = replace(solver, noise=None)  # the same stream from its beginning
    drawn = list(again.sample(problem, start))
    assert len(drawn) == 11
    for n in start:
        h = torch.stack([sample[1][n] for sample in drawn])
        torch.testing.assert_close(solution.h[n], h.mean(0), rtol=1e-12, atol=1e-12)
        assert torch.equal(solution.state[n], drawn[-1][0][n])
    both = torch.cat([torch.stack([s[1][n] for s in drawn]) for n in start], 2)
    apart = (both[:5].mean(0) - both[5:].mean(0)).norm(dim=1)
    size = both.mean(0).norm(dim=1)
    torch.testing.assert_close(solution.residual, apart / (apart + size), rtol=1e-10, atol=1e-12)
    assert solution.steps.tolist() == [40] * 5
    assert solution.trace is not None
    assert solution.trace.residual.shape == (40, 5)
    assert solution.trace.energy is not None
    assert solution.trace.states is not None
    assert torch.equal(solution.trace.states[7 + 3]["a"], drawn[0][0]["a"])  # each step's start is kept


def test_residual_falls_with_the_samples_and_tolerance_is_judged_by_it() -> None:
    problem, start = relaxation(gaussian(), X2, 400)
    solver = Langevin(temperature=0.3, step_size=0.6, burn_in=30)
    sizes = [replace(solver, samples=s).solve(problem, start).residual.median() for s in (20, 320)]
    # 16 times as many samples: up to 4 times as near, the residual being a share of itself and the mean
    assert 2.3 < float((sizes[0] / (1 - sizes[0])) / (sizes[1] / (1 - sizes[1]))) < 5.5
    solution = Langevin(samples=50, temperature=0.3, tolerance=0.1).solve(problem, start)
    assert torch.equal(solution.converged, solution.residual <= 0.1)
    assert 0 < int(solution.converged.sum()) < 400
    assert bool(Langevin(samples=50).solve(problem, start).converged.all())


def test_an_adjusted_chain_that_stands_still_has_sampled_nothing() -> None:
    """Where the step overshoots every proposal is refused; equal halves must not count as converged."""
    energy = Energy([Node("h", 1, Identity())], [Residual(_Square(), "h", source="h")])
    problem, start = relaxation(energy, torch.zeros(1, 1, dtype=torch.float64), 9)
    start = {"h": start["h"].clone()}
    start["h"][8] = 30.0  # not among the examples whose curvature is probed
    solver = Langevin(temperature=0.1, step_size=0.5, burn_in=3, samples=8, adjusted=True, tolerance=0.99)
    solution = solver.solve(problem, start)
    assert float(solution.state["h"][8]) == 30
    assert float(solution.residual[8]) == 1
    assert solution.converged.tolist() == [True] * 8 + [False]


# steps


def test_step_limit_is_the_one_of_the_exact_hessian() -> None:
    energy = gaussian()
    curvature, _ = hessian(energy, X2)
    problem, start = relaxation(energy, X2, 3)
    wanted = 2 / float(torch.linalg.eigvalsh(curvature)[-1])
    assert Langevin().limit(problem, start) == pytest.approx(wanted, rel=1e-6)
    whole = Relaxation(energy, problem.bindings, extra=lambda h: {})  # cannot be cut into examples
    assert Langevin().limit(whole, start) == pytest.approx(wanted, rel=1e-6)
    for factor in (1.001, 3.0):
        with pytest.raises(ConfigError, match=rf"step_size below {wanted:.4g}, .* at most half of it"):
            Langevin(step_size=factor * wanted).solve(problem, start)
    with pytest.raises(ConfigError, match="step_size below"):
        next(Langevin(step_size=1.001 * wanted).sample(problem, start))
    below = Langevin(step_size=0.97 * wanted, burn_in=300, samples=2).solve(problem, start)
    # the sharpest direction has 1 / (1 - 0.97) times its variance, and no more
    assert float(torch.cat(list(below.state.values()), 1).abs().max()) < 60


def test_step_limit_knows_the_temperature_and_the_steepest_point() -> None:
    r"""At a = 0 a tanh unit curves by ``g + 2 tau g^2 - g w g``, more than where it starts, saturated."""
    energy = one_unit(self_coupling=0.6, gain=2.0)
    problem, _ = relaxation(energy, X1, 2)
    saturated = {"h": torch.full((2, 1), 3.0, dtype=torch.float64)}
    for tau in (0.1, 2.0):
        wanted = 2 / (2 + 8 * tau - 4 * 0.6)
        assert Langevin(temperature=tau).limit(problem, saturated) == pytest.approx(wanted, rel=1e-5)
    falling = Langevin(temperature=0.1, schedule="geometric", start_temperature=2.0)
    assert falling.limit(problem, saturated) == pytest.approx(2 / (2 + 16 - 2.4), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"), [("tanh_layers", torch.float32), ("tanh_layers", torch.float64), ("gated", torch.float64)]
)
def test_step_limit_against_the_dense_hessian(name: str, dtype: torch.dtype) -> None:
    """Of U by autograd, example by example, at the start and at 0."""
    c = case(name)
    energy = c.dynamics
    assert isinstance(energy, Energy)
    x = c.x[:2]
    tau, largest = 0.2, 0.0
    start = energy.initial(energy.bind(x))
    sizes = [t[0].numel() for t in start.values()]
    for i in range(2):
        bindings = energy.bind(x[i : i + 1])
        for point in (torch.cat([t[i].flatten() for t in start.values()]), torch.zeros(sum(sizes)).double()):

            def value(flat: Tensor, bindings: Any = bindings) -> Tensor:
                parts = [p.view(1, *s) for p, s in zip(flat.split(sizes), energy.shapes.values(), strict=True)]
                a = dict(zip(energy.names, parts, strict=True))
                h = energy.activate(a, bindings)
                slopes = [energy.activation(n).log_slope(t, h[n]) for n, t in a.items()]
                return (energy(a, bindings) - tau * torch.stack(slopes).sum(0)).sum()

            # at 0 itself autograd's second derivative of the absolute value in log cosh is wrong
            dense = torch.autograd.functional.hessian(value, point.detach() + 1e-9)
            largest = max(largest, float(torch.linalg.eigvalsh(dense)[-1]))
    energy = energy.to(dtype)
    bindings = energy.bind(x.to(dtype))
    found = Langevin(temperature=tau).limit(Relaxation(energy, bindings), energy.initial(bindings))
    assert found == pytest.approx(2 / largest, rel=2e-3)


def test_lanczos_against_dense_eigenvalues() -> None:
    g = torch.Generator().manual_seed(0)
    m = torch.randn(3, 9, 9, generator=g, dtype=torch.float64)
    m = m + m.mT
    m[2] = 2 * torch.eye(9)  # an invariant subspace at once
    start = torch.randn(3, 9, generator=g, dtype=torch.float64)
    found = lanczos(lambda v: (m @ v[:, :, None])[:, :, 0], start, 9)
    torch.testing.assert_close(found[:2], torch.linalg.eigvalsh(m[:2]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[2], torch.full((9,), 2.0, dtype=torch.float64))


def test_unconfined_identity_nodes_are_refused_as_divergence() -> None:
    g = torch.Generator().manual_seed(0)
    lateral = Dense(2, 2, symmetric=True, generator=g).double()
    with torch.no_grad():
        lateral.weight.copy_(torch.diag(torch.tensor([1.2, 0.3])))
    nodes = [Node("v", 2, Identity()), Node("h", 1, Tanh())]
    for kinds in (nodes[:1], nodes):
        energy = Energy(kinds, [Drive("v", linear(2, 2, g)), Lateral(lateral, "v")]).double()
        with pytest.raises(DivergenceError, match=r"curvature of -0\.2: the chain would run away"):
            Equilibrium(energy, Langevin())(X2)
    clamped = [Node("v", 2, Identity(1 / (1 + 0.5)))]
    energy = Energy(clamped, [Drive("v", linear(2, 2, g)), Lateral(lateral, "v")]).double()
    assert bool(torch.isfinite(Equilibrium(energy, Langevin())(X2)).all())


class _Square(nn.Module):
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return h * h + x


def test_a_chain_that_overflows_raises_in_the_layer() -> None:
    """``(h - h^2)^2 / 2`` curves ever more: a step that is stable at the start runs away, an adjusted chain stays."""
    energy = Energy([Node("h", 1, Identity())], [Residual(_Square(), "h", source="h")])
    x = torch.zeros(8, 1, dtype=torch.float64)
    hot = Langevin(temperature=5.0, step_size=1.0, burn_in=20, samples=10)
    with pytest.raises(DivergenceError, match="8 of 8 examples"):
        Equilibrium(energy, hot)(x)
    out = Equilibrium(energy, replace(hot, adjusted=True))(x)
    assert bool(torch.isfinite(out).all())
