"""Langevin chains as parts of layers and trainings: noise, annealing, resumption and refusals."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws import bistable_pair, gaussian, one_unit, relaxation
from oracles import assert_close, gradients, quadratic
from toreq import Equilibrium, solvers
from toreq.core import Dense, Drive, Energy, HardSigmoid, Lateral, Node, ReLU, Tanh
from toreq.errors import ConfigError, ConvergenceWarning
from toreq.estimators import Centered, Implicit, Thermal, Unrolled
from toreq.solvers import Anderson, Fading, FixedPoint, Langevin, Relaxation, Step
from toreq.training import rng
from zoo import case, linear

X1 = torch.tensor([[0.4]], dtype=torch.float64)
X2 = torch.tensor([[0.3, -0.8]], dtype=torch.float64)


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
    with torch.no_grad():
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
