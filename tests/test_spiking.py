"""Spikes against the equilibrium that deterministic settling finds, and what crosses the couplings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from oracles import TIGHT, cosine, fitted_order, gradients, quadratic
from toreq import Equilibrium
from toreq.core import (
    Bilinear,
    Dense,
    Drive,
    Dynamics,
    Energy,
    HardSigmoid,
    Lateral,
    Node,
    Potential,
    Tanh,
)
from toreq.core.state import Bindings, State
from toreq.errors import ConfigError
from toreq.estimators import Centered
from toreq.solvers import Relaxation, Spiking, Step, spiking
from toreq.solvers.spiking import SpikingSolution
from toreq.training import rng
from zoo import case

SIGMA_DELTA = Spiking(max_steps=400, tolerance=0.0)


def network(radius: float = 0.6, gain: float = 1.0, gate: nn.Module | None = None) -> tuple[Energy, Tensor]:
    """Eight and six hard sigmoids, half of them inside (0, 1), whose Jacobian has this radius; 16 examples."""
    g = torch.Generator().manual_seed(0)
    drive, across = nn.Linear(4, 8).double(), Dense(8, 6, generator=g).double()
    lateral = Dense(6, 6, symmetric=True, generator=g).double()
    with torch.no_grad():
        drive.weight.copy_(0.5 * torch.randn(8, 4, generator=g))
        drive.bias.copy_(torch.rand(8, generator=g))
        inner = (lateral.weight + lateral.weight.T) / 2
        whole = torch.cat([torch.cat([torch.zeros(8, 8), across.weight.T], 1), torch.cat([across.weight, inner], 1)])
        scale = radius / float(torch.linalg.eigvalsh(whole).abs().max()) / gain
        across.weight.mul_(scale)
        lateral.weight.mul_(scale)
    nodes = [Node("h1", 8, HardSigmoid(gain)), Node("h2", 6, HardSigmoid(gain))]
    couplings = [Drive("h1", drive), Bilinear(across, "h1", "h2"), Lateral(lateral, "h2", gate)]
    return Energy(nodes, couplings).double(), torch.randn(16, 4, generator=g, dtype=torch.float64)


def run(energy: Energy, x: Tensor, solver: Spiking, **more: Any) -> SpikingSolution:
    with torch.no_grad():
        bindings = energy.bind(x)
        return solver.solve(Relaxation(energy, bindings, as_map=True), energy.initial(bindings), **more)


def joined(state: State) -> Tensor:
    return torch.cat([t.flatten(1) for t in state.values()], 1)


@pytest.mark.parametrize(
    ("solver", "order", "within"),
    [
        (Spiking(), 1.0, 0.1),
        (Spiking(threshold_noise=0.3), 1.0, 0.1),
        (Spiking(scheme="bernoulli"), 0.5, 0.1),
        (Spiking(scheme="poisson"), 0.5, 0.1),
    ],
    ids=["sigma_delta", "noisy_thresholds", "bernoulli", "poisson"],
)
def test_rates_converge_to_the_mean_field_equilibrium(solver: Spiking, order: float, within: float) -> None:
    """At 1/t and 1/sqrt(t); the error is the root mean square over 16 examples of 14 units."""
    energy, x = network()
    wanted = joined(Equilibrium(energy, TIGHT).solve(x).h)
    assert 0.3 < float(((wanted > 0) & (wanted < 1)).double().mean()) < 0.9, "some saturated, some not"
    marks, errors = [2**k for k in range(5, 11)], {}

    def note(step: Step) -> None:
        if step.index in marks:
            errors[step.index] = float((joined(step.h) - wanted).square().mean().sqrt())

    run(energy, x, replace(solver, max_steps=marks[-1], tolerance=0.0), callback=note)
    assert fitted_order([float(m) for m in marks], [errors[m] for m in marks]) == pytest.approx(-order, abs=within)
    assert errors[marks[-1]] < (1e-3 if order == 1 else 3e-2)


def test_a_membrane_clamped_at_zero_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    energy, x = network(radius=0.9)
    wanted = joined(Equilibrium(energy, TIGHT).solve(x).h)
    errors = []
    for clamp in (spiking.CLAMP, 0.0):
        monkeypatch.setattr(spiking, "CLAMP", clamp)
        found = run(energy, x, Spiking(max_steps=1000, tolerance=0.0))
        errors.append(float((joined(found.h) - wanted).abs().max()))
    assert errors[0] < 3e-3
    assert errors[1] > 3 * errors[0]


def test_a_gain_scales_what_is_integrated() -> None:
    energy, x = network(gain=0.5)
    wanted = joined(Equilibrium(energy, TIGHT).solve(x).h)
    for solver, within in ((SIGMA_DELTA, 5e-3), (Spiking(scheme="bernoulli", max_steps=400, tolerance=0.0), 0.12)):
        assert float((joined(run(energy, x, solver).h) - wanted).abs().max()) < within


def test_integrate_and_fire_step_by_step() -> None:
    """Three units, written out: threshold 1, subtractive reset, membrane in [-3, 4]."""
    weight = torch.tensor([[0.0, 0.5, -0.3], [0.5, 0.2, 0.0], [-0.3, 0.0, 0.0]], dtype=torch.float64)
    d = [0.4, -2.0, 7.0]
    op, drive = Dense(3, 3, symmetric=True).double(), nn.Linear(1, 3).double()
    with torch.no_grad():
        op.weight.copy_(weight)
        drive.weight.zero_()
        drive.bias.copy_(torch.tensor(d))
    energy = Energy([Node("h", 3, HardSigmoid())], [Drive("h", drive), Lateral(op, "h")]).double()
    start = {"h": torch.tensor([[0.25, 0.0, 1.0]], dtype=torch.float64)}
    with torch.no_grad():
        problem = Relaxation(energy, energy.bind(torch.zeros(1, 1, dtype=torch.float64)))
        found = replace(SIGMA_DELTA, max_steps=23).solve(problem, start)
    golden = (math.sqrt(5) - 1) / 2
    u = [h + (0.5 + i * golden) % 1 for i, h in enumerate([0.25, 0.0, 1.0])]
    counts, received = [0, 0, 0], [0.0, 0.0, 0.0]
    for _ in range(23):
        s = [int(v >= 1) for v in u]
        f = [d[i] + sum(float(weight[i, j]) * s[j] for j in range(3)) for i in range(3)]
        u = [min(max(u[i] - s[i] + f[i], -3.0), 4.0) for i in range(3)]
        counts = [a + b for a, b in zip(counts, s, strict=True)]
        received = [a + b for a, b in zip(received, f, strict=True)]
    assert found.spikes["h"].tolist() == [[float(c) for c in counts]]
    assert 0 < counts[0] < 23
    assert counts[1:] == [0, 23]
    torch.testing.assert_close(found.h["h"][0], torch.tensor(counts).double() / 23)
    torch.testing.assert_close(found.state["h"][0], torch.tensor(received, dtype=torch.float64) / 23)


class Listening(Relaxation):
    """A relaxation that keeps what crosses its couplings."""

    def __init__(self, dynamics: Dynamics, bindings: Bindings) -> None:
        super().__init__(dynamics, bindings)
        self.heard: list[Tensor] = []

    def field(self, h: State, only: frozenset[str] | None = None) -> State:
        self.heard.append(joined(h))
        return super().field(h, only)


@pytest.mark.parametrize("scheme", ["sigma_delta", "bernoulli", "poisson"])
def test_only_spikes_cross_the_couplings(scheme: Any) -> None:
    energy, x = network()
    with torch.no_grad():
        problem = Listening(energy, energy.bind(x))
        found = Spiking(scheme=scheme, max_steps=50, tolerance=0.0).solve(problem, energy.initial(problem.bindings))
    heard = torch.stack(problem.heard)
    assert heard.shape[0] == 50
    assert bool((heard == heard.round()).all())
    assert float(heard.min()) == 0
    assert float(heard.max()) == 1 or (scheme == "poisson" and float(heard.max()) > 1)
    assert torch.equal(joined(found.spikes), heard.sum(0))


def test_the_state_is_the_field_of_the_rates_and_the_residual_what_is_left() -> None:
    """In a symmetric contraction of norm 0.6 the rates are within residual / 0.4 of the equilibrium."""
    energy, x = network()
    wanted = joined(Equilibrium(energy, TIGHT).solve(x).h)
    found = run(energy, x, Spiking(max_steps=300, tolerance=0.0, scheme="bernoulli"))
    with torch.no_grad():
        field = energy.field(found.h, energy.bind(x))
    torch.testing.assert_close(joined(found.state), joined(field), rtol=1e-10, atol=1e-12)
    left = joined({n: t.clamp(0, 1) - found.h[n] for n, t in found.state.items()}).norm(dim=1)
    size = joined(found.state).norm(dim=1)
    torch.testing.assert_close(found.residual, left / (left + size), rtol=2e-2, atol=0)
    assert bool(((joined(found.h) - wanted).norm(dim=1) <= left / 0.4).all())


def test_examples_stop_when_they_have_settled_and_keep_their_spikes() -> None:
    energy, x = network()
    whole = run(energy, x, Spiking(max_steps=500, tolerance=0.02))
    assert bool(whole.converged.all())
    assert bool((whole.residual <= 0.02).all())
    assert len(set(whole.steps.tolist())) > 1
    for i in (0, 5):
        alone = run(energy, x[i : i + 1], Spiking(max_steps=500, tolerance=0.02))
        assert int(alone.steps) == int(whole.steps[i])
        assert torch.equal(joined(alone.spikes)[0], joined(whole.spikes)[i])
        fixed = run(energy, x[i : i + 1], Spiking(max_steps=int(alone.steps), tolerance=0.0))
        assert torch.equal(joined(fixed.spikes), joined(alone.spikes))


def test_a_window_averages_the_last_steps() -> None:
    energy, x = network()
    solver = Spiking(tolerance=0.0, max_steps=100)
    last = run(energy, x, replace(solver, window=30))
    whole, before = run(energy, x, solver), run(energy, x, replace(solver, max_steps=70))
    torch.testing.assert_close(30 * joined(last.h), 100 * joined(whole.h) - 70 * joined(before.h))
    torch.testing.assert_close(30 * joined(last.state), 100 * joined(whole.state) - 70 * joined(before.state))
    assert torch.equal(joined(last.spikes), joined(whole.spikes))


@pytest.mark.parametrize("scheme", ["bernoulli", "poisson"])
def test_copies_share_their_noise(scheme: Any) -> None:
    energy, x = network()
    twice = run(energy, torch.cat([x, x]), Spiking(scheme=scheme, copies=2, max_steps=60, tolerance=0.0))
    rates = joined(twice.h)
    assert torch.equal(rates[:16], rates[16:])
    own = joined(run(energy, torch.cat([x, x]), Spiking(scheme=scheme, max_steps=60, tolerance=0.0)).h)
    assert not torch.equal(own[:16], own[16:])
    wanted = joined(Equilibrium(energy, TIGHT).solve(x).h)
    assert float((rates[:16] - wanted).square().mean().sqrt()) < 0.2
    with pytest.raises(ConfigError, match="batch of 3 equal parts"):
        run(energy, x, Spiking(copies=3))
    solver = Spiking(scheme=scheme, nudged_copies=2)
    nudged = solver.nudged()
    assert isinstance(nudged, Spiking)
    assert (solver.copies, nudged.copies) == (1, 2)
    assert nudged.noise is solver.noise


def test_poisson_counts_are_those_of_the_law() -> None:
    xi = torch.linspace(1e-6, 1 - 1e-6, 999, dtype=torch.float64)
    for rate in (0.0, 0.1, 0.73, 1.0):
        found = spiking._poisson_quantile(xi, torch.full_like(xi, rate))
        assert found.tolist() == scipy.stats.poisson.ppf(xi.numpy(), rate).clip(0).tolist()


def test_training_captures_the_noise() -> None:
    energy, x = network()
    layer = Equilibrium(energy, Spiking(scheme="bernoulli", max_steps=20, tolerance=0.0, seed=3), warn=False)
    assert len(rng.named_generators(layer)) == 1
    kept = rng.capture(layer)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second), "the stream goes on from batch to batch"
    rng.restore(layer, kept)
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize(
    ("solver", "least"),
    [
        (Spiking(max_steps=1000, tolerance=0.0), 0.995),
        (Spiking(max_steps=1000, tolerance=0.0, scheme="bernoulli", nudged_copies=2), 0.95),
    ],
    ids=["sigma_delta", "bernoulli"],
)
def test_a_contrast_of_rates_is_that_of_the_equilibria(solver: Spiking, least: float) -> None:
    """Against settling at the same nudge: what its size costs at the kinks of hard sigmoids is common to both."""
    energy, x = network()
    estimator = Centered(beta=0.1, tolerance=0.0, max_halvings=0)
    settled = replace(TIGHT, tolerance=0.0, max_steps=100)
    found = gradients(Equilibrium(energy, solver, estimator, warn=False), x, quadratic())
    wanted = gradients(Equilibrium(energy, settled, estimator, warn=False), x, quadratic())
    for name, g in wanted.items():
        assert cosine(found[name], g) > least, name
        assert float(found[name].norm() / g.norm()) == pytest.approx(1, abs=0.1), name


def test_networks_that_cannot_spike_are_refused() -> None:
    x = torch.zeros(2, 4)
    drive = Drive("h", nn.Identity())
    tanh = Energy([Node("h", 4, Tanh())], [drive])
    curved = Energy([Node("h", 4, HardSigmoid())], [drive, Potential(Dense(4, 4), "h")])
    for energy, message in ((tanh, "node 'h' has Tanh"), (curved, "Potential is not linear")):
        assert message in Spiking().refusal(energy)
        with pytest.raises(ConfigError, match=message):
            run(energy, x, Spiking())
    field = case("field_mlp")
    assert "VectorField" in Spiking().refusal(field.dynamics)
    good, x = network()
    assert Spiking().refusal(good) == ""
    bindings = good.bind(x)
    with pytest.raises(ConfigError, match="expected no graph"):
        SIGMA_DELTA.solve(Relaxation(good, bindings), good.initial(bindings))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"threshold_noise": 0.6}, r"threshold_noise in \[0, 0.5\]"),
        ({"threshold_noise": 0.1, "scheme": "poisson"}, "threshold_noise 0 with scheme='poisson'"),
        ({"power": 1.0}, r"power in \(0.5, 1\)"),
        ({"window": 0}, "window None or an integer >= 1"),
        ({"window": 10}, "tolerance 0 with a window"),
        ({"copies": 0}, "copies an integer >= 1"),
        ({"nudged_copies": 0}, "nudged_copies an integer >= 1"),
        ({"precision": "mixed"}, "precision 'full' or 'rounded'"),
    ],
)
def test_options_out_of_range_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"Spiking: expected {message}.*, got .*; "):
        Spiking(**bad)
    with pytest.raises(Exception, match="scheme"):
        Spiking(scheme="gaussian")  # type: ignore[arg-type]
