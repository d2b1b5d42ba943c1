"""Langevin chains against closed forms and quadrature; steps, noise, annealing, resumption and refusals."""

from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws import bistable_pair, gaussian, hessian, one_unit, quadrature
from oracles import assert_close, gradients, quadratic
from toreq import Equilibrium, solvers, wrap
from toreq.core import Dense, Drive, Energy, HardSigmoid, Identity, Lateral, Node, ReLU, Residual, Tanh
from toreq.core.state import State
from toreq.errors import ConfigError, ConvergenceWarning, DivergenceError
from toreq.estimators import Centered, Implicit, Thermal, Unrolled
from toreq.solvers import Anderson, Fading, FixedPoint, Langevin, Relaxation, Step
from toreq.solvers.curvature import lanczos
from toreq.training import rng
from zoo import case, linear

X1 = torch.tensor([[0.4]], dtype=torch.float64)
X2 = torch.tensor([[0.3, -0.8]], dtype=torch.float64)


def relaxation(energy: Energy, x: Tensor, chains: int) -> tuple[Relaxation, State]:
    """The network bound to as many copies of one input, and the start of a layer."""
    with torch.no_grad():
        bindings = energy.bind(x.expand(chains, -1))
        return Relaxation(energy, bindings), energy.initial(bindings)


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
    law = quadrature(energy, X1, tau)
    problem, start = relaxation(energy, X1, 10000)
    bins = torch.linspace(-1, 1, 9).double()
    exact = torch.stack(
        [law.p.detach()[(law.h[:, 0] > a) & (law.h[:, 0] <= b)].sum() for a, b in itertools.pairwise(bins)]
    )
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


# noise


def test_copies_of_an_example_get_the_same_noise() -> None:
    problem, start = relaxation(one_unit(), X1, 6)
    for adjusted in (False, True):
        paired = Langevin(copies=2, burn_in=5, samples=5, adjusted=adjusted).solve(problem, start)
        h = paired.state["h"]
        assert torch.equal(h[:3], h[3:])
        assert h[:3].unique().numel() == 3
        alone = Langevin(burn_in=5, samples=5, adjusted=adjusted).solve(problem, start).state["h"]
        assert alone.unique().numel() == 6
    with pytest.raises(ConfigError, match="4 equal parts"):
        Langevin(copies=4).solve(problem, start)


def test_the_stream_goes_on_is_shared_by_replace_and_is_set_by_the_seed() -> None:
    problem, start = relaxation(one_unit(), X1, 3)

    def run(solver: Langevin) -> Tensor:
        return solver.solve(problem, start).h["h"]

    solver = Langevin(burn_in=2, samples=3, seed=7)
    first, second = run(solver), run(solver)
    assert not torch.equal(first, second)
    fresh = Langevin(burn_in=2, samples=3, seed=7)
    assert torch.equal(run(fresh), first)
    # a copy with another setting takes its noise from the same stream, so that both go on
    assert torch.equal(run(replace(fresh, tolerance=0.1)), second)
    assert not torch.equal(run(fresh), second)
    assert torch.equal(run(replace(fresh, seed=8)), run(Langevin(burn_in=2, samples=3, seed=8)))
    for clone in (copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
        twin = clone(solver)
        assert twin == solver
        assert torch.equal(run(twin), run(solver))


def test_global_random_state_is_left_alone() -> None:
    problem, start = relaxation(one_unit(), X1, 3)
    before = torch.get_rng_state()
    Langevin(burn_in=2, samples=3).solve(problem, start)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_captures_and_restores_the_stream() -> None:
    energy = one_unit()
    layer = Equilibrium(energy, Langevin(burn_in=2, samples=3), Thermal(samples=4))
    x = X1.expand(4, -1)

    def steps(layer: Equilibrium) -> list[Tensor]:
        out = []
        for _ in range(2):
            layer.zero_grad()
            layer(x).square().sum().backward()
            out += [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        return out

    steps(layer)
    states = rng.capture(layer)
    assert [name for name in states if name.startswith("generator.")] == ["generator._solver.noise.generator"]
    wanted = steps(layer)
    other = Equilibrium(one_unit(), Langevin(burn_in=2, samples=3), Thermal(samples=4))
    rng.restore(other, states)
    for a, b in zip(steps(other), wanted, strict=True):
        assert torch.equal(a, b)
    with rng.preserved(other):
        during = steps(other)
    assert all(torch.equal(a, b) for a, b in zip(steps(other), during, strict=True))


def test_layers_are_copied_and_pickled_with_their_stream() -> None:
    layer = Equilibrium(bistable_pair(), Langevin(burn_in=2, samples=3))
    x = X1.expand(4, -1)
    layer(x)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    wanted = layer(x)
    assert all(torch.equal(twin(x), wanted) for twin in twins)


# schedules and annealing


def test_schedules_run_from_one_temperature_to_the_other() -> None:
    falling = {"temperature": 0.1, "start_temperature": 0.9, "burn_in": 5}
    linearly = Langevin(schedule="linear", **falling)
    assert [linearly.temperature_at(t) for t in range(1, 8)] == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1, 0.1, 0.1])
    geometric = Langevin(schedule="geometric", **falling)
    wanted = [0.9 * (1 / 9) ** (k / 4) for k in range(5)] + [0.1]
    assert [geometric.temperature_at(t) for t in range(1, 7)] == pytest.approx(wanted)
    assert Langevin(temperature=0.2).temperature_at(1) == 0.2
    assert Langevin(schedule="linear", temperature=0.1, start_temperature=0.9, burn_in=1).temperature_at(1) == 0.1


@pytest.mark.parametrize("finish", [None, FixedPoint(order="gauss_seidel")], ids=["anderson", "fixedpoint"])
@pytest.mark.parametrize("name", ["tanh_layers", "convolutional", "gated"])
def test_annealed_mode_reaches_the_equilibrium_of_a_contracting_network(name: str, finish: Any) -> None:
    c = case(name)
    solver = Langevin(
        mode="annealed", temperature=1e-3, start_temperature=0.3, schedule="geometric", burn_in=40, step_size=0.3,
        max_steps=1000, tolerance=1e-12, finish=finish,
    )  # fmt: skip
    wanted = c.layer().solve(c.x)
    seen: list[Step] = []
    found = c.layer(solver=solver).solve(c.x, record="states", callback=seen.append)
    assert bool(found.converged.all())
    assert int(found.steps.min()) > 40
    for n in wanted.h:
        torch.testing.assert_close(found.h[n], wanted.h[n], rtol=1e-8, atol=1e-9)
    # the trace and the callback see the noisy steps and the others, in one row
    assert found.trace is not None
    assert found.trace.states is not None
    assert found.trace.residual.shape[0] == len(seen) == len(found.trace.states) == int(found.steps.max())
    assert [s.index for s in seen] == list(range(1, len(seen) + 1))
    # what the noise does is seen: it has left where a start without noise would have been by then
    still = c.layer(solver=FixedPoint(max_steps=40, tolerance=0.0)).solve(c.x)
    first = found.trace.states[39]
    assert max(float((first[n] - still.state[n]).abs().max()) for n in first) > 1e-3


def test_annealing_finds_the_deeper_well_more_often_than_settling_from_the_other() -> None:
    """From the shallow well's side a noiseless relaxation stays there; annealed chains mostly end in the deep one."""
    energy = bistable_pair(bias=0.15)
    problem, start = relaxation(energy, X1, 200)
    start = {n: torch.full_like(t, -1.0) for n, t in start.items()}
    settled = Anderson(tolerance=1e-8).solve(problem, start)
    assert bool((settled.h["a"] < 0).all())
    annealed = Langevin(
        mode="annealed", temperature=0.02, start_temperature=0.5, schedule="linear", burn_in=400, step_size=0.2,
        tolerance=1e-8,
    ).solve(problem, start)  # fmt: skip
    assert bool(annealed.converged.all())
    assert float((annealed.h["a"] > 0).double().mean()) > 0.8


@pytest.mark.parametrize("estimator", [Centered(beta=1e-4, tolerance=1e-9), Implicit(tolerance=1e-12)])
def test_gradients_after_annealing_are_those_of_the_settled_network(estimator: Any) -> None:
    """The nudged phase is not annealed again: that would lead away from the equilibrium it is to respond from."""
    c = case("tanh_layers")
    wanted = c.layer()
    solver = Langevin(mode="annealed", temperature=0.05, burn_in=30, max_steps=2000, tolerance=1e-12)
    found = c.layer(estimator, solver=solver)
    assert_close(gradients(found, c.x, quadratic()), gradients(wanted, c.x, quadratic()), rtol=1e-5)


# layers and refusals


def test_the_layer_reads_out_the_mean() -> None:
    energy = gaussian()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settled = Equilibrium(energy, Anderson(tolerance=1e-12))(x)
    layer = Equilibrium(energy, Langevin(temperature=0.05, step_size=1.0, samples=900))
    assert isinstance(layer.estimator, Thermal)
    with torch.no_grad():
        out = layer(x)
    # the mean of a Gaussian law is its minimum, whatever the step
    assert float((out - settled).abs().max()) < 0.05
    assert layer.last.free is not None
    assert layer.last.free.steps.tolist() == [1000] * 5
    unsure = Equilibrium(energy, Langevin(samples=4, tolerance=1e-3))
    with pytest.warns(ConvergenceWarning, match="5 examples"), torch.no_grad():
        unsure(x)


def test_hasten_leaves_the_tolerance_of_a_mean_alone() -> None:
    layer = Equilibrium(gaussian(), Langevin())
    layer.hasten()
    assert layer.solver.tolerance == 0
    annealed = Equilibrium(gaussian(), Langevin(mode="annealed", tolerance=1e-4))
    annealed.hasten()
    assert annealed.solver.tolerance == 1e-2


def test_rounded_couplings_are_sampled_too() -> None:
    g = torch.Generator().manual_seed(0)
    terms = [Drive("h", nn.Linear(64, 64)), Lateral(Dense(64, 64, symmetric=True, generator=g), "h")]
    energy = Energy([Node("h", 64, Tanh())], terms)
    x = torch.randn(4, 64, generator=g)
    full = Equilibrium(energy, Langevin(step_size=0.2))
    rounded = Equilibrium(energy, Langevin(step_size=0.2, precision="rounded"))
    with torch.no_grad():
        a, b = full(x), rounded(x)
    assert not torch.equal(a, b)
    assert float((a - b).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, r"temperature > 0, got -0\.1; without noise use FixedPoint"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"temperature": float("nan")}, "temperature > 0"),
        ({"step_size": 0.0}, "step_size > 0"),
        ({"burn_in": -1}, "burn_in an integer >= 0"),
        ({"samples": 1}, "samples an integer >= 2"),
        ({"thin": 0}, "thin an integer >= 1"),
        ({"copies": 0}, "copies an integer >= 1"),
        ({"start_temperature": 1.0}, "start_temperature None with schedule='constant'"),
        ({"schedule": "linear"}, "start_temperature > 0 with schedule='linear', got None"),
        ({"schedule": "geometric", "start_temperature": 0.0}, "start_temperature > 0"),
        ({"schedule": "linear", "start_temperature": 1.0, "burn_in": 0}, "burn_in >= 1"),
        ({"max_steps": 50}, r"max_steps >= burn_in \+ samples \* thin = 200, got 50"),
        ({"precision": "mixed"}, "precision 'full' or 'rounded'"),
        ({"finish": Anderson()}, "finish None with mode='sample'"),
        ({"mode": "annealed"}, "tolerance > 0 with mode='annealed'"),
        ({"mode": "annealed", "tolerance": 1e-3, "burn_in": 0}, "burn_in an integer >= 1"),
        ({"mode": "annealed", "tolerance": 1e-3, "max_steps": 100}, "max_steps > burn_in = 100"),
        ({"mode": "annealed", "tolerance": 1e-3, "finish": Langevin()}, "finish a solver that settles"),
        (
            {"mode": "annealed", "tolerance": 1e-3, "finish": FixedPoint(torus=Fading(mode="recurrent"))},
            "adds no self-coupling",
        ),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Langevin(**fields)


@pytest.mark.parametrize(("sigma", "reason"), [(ReLU(), "flat below 0"), (HardSigmoid(), "flat outside")])
def test_activations_that_cannot_be_sampled_are_refused(sigma: Any, reason: str) -> None:
    g = torch.Generator().manual_seed(0)
    energy = Energy([Node("h", 3, sigma)], [Drive("h", linear(3, 3, g))]).double()
    with pytest.raises(ConfigError, match=f"'h' has {type(sigma).__name__}: it is {reason}"):
        Equilibrium(energy, Langevin())
    layer = Equilibrium(energy)
    with pytest.raises(ConfigError, match=reason):
        layer.solver = Langevin()
    assert isinstance(layer.solver, FixedPoint)
    bindings = energy.bind(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ConfigError, match=reason):
        Langevin().solve(Relaxation(energy, bindings), energy.initial(bindings))


def test_vector_fields_and_other_problems_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no energy"):
        Equilibrium(case("field_mlp").dynamics, Langevin())
    problem, start = relaxation(one_unit(), X1, 2)
    moving = Relaxation(problem.dynamics, problem.bindings, extra=lambda h: h)
    with pytest.raises(ConfigError, match="constant forces with adjusted=True"):
        Langevin(adjusted=True).solve(moving, start)


@pytest.mark.parametrize("estimator", [Centered(), Implicit(), Unrolled()])
def test_estimators_that_read_an_equilibrium_are_refused_after_sampling(estimator: Any) -> None:
    reason = f"{type(estimator).__name__} reads one equilibrium, and Langevin samples a law"
    with pytest.raises(ConfigError, match=reason):
        Equilibrium(one_unit(), Langevin(), estimator)
    layer = Equilibrium(one_unit(), Anderson(), estimator)
    layer.solver = Langevin()  # perhaps the estimator follows
    with pytest.raises(ConfigError, match=reason):
        layer(X1).sum().backward()
    with pytest.raises(ConfigError, match=reason):
        layer.solve_nudged(X1, torch.ones_like(X1))
    if not isinstance(estimator, Unrolled):
        with torch.no_grad():
            assert bool(torch.isfinite(layer(X1)).all())  # nothing is learnt here
    layer.estimator = Thermal()
    layer(X1).sum().backward()


def test_by_name() -> None:
    assert "langevin" in solvers.names()
    assert solvers.create("langevin", temperature=0.3) == Langevin(temperature=0.3)
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        solvers.create("langevin", temprature=0.3)
