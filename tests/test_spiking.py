"""Spikes against the equilibrium that deterministic settling finds, and their events against counts by hand."""

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
    Conv,
    Dense,
    Drive,
    Dynamics,
    Energy,
    HardSigmoid,
    IdentityOperator,
    Lateral,
    Node,
    Potential,
    SelfCoupling,
    Tanh,
)
from toreq.core.state import Bindings, State
from toreq.errors import ConfigError
from toreq.estimators import Centered
from toreq.solvers import Relaxation, Spiking, Step, events, spiking
from toreq.solvers.events import Work, dense_work, fan_out, spiking_work
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


def test_events_and_energy_of_a_tiny_net_by_hand() -> None:
    """Three units onto two, and the two onto each other: a spike of the three reaches 2 units, of the two 3 + 1."""
    across, lateral = Dense(3, 2).double(), Dense(2, 2, symmetric=True).double()
    with torch.no_grad():
        across.weight.copy_(torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]))  # one synapse less
        lateral.weight.copy_(torch.tensor([[0.0, 0.2], [0.2, 0.0]]))
    nodes = [Node("h1", 3, HardSigmoid()), Node("h2", 2, HardSigmoid())]
    couplings = [Drive("h1", nn.Linear(2, 3)), Bilinear(across, "h1", "h2"), Lateral(lateral, "h2")]
    energy = Energy(nodes, couplings).double()
    synapses = fan_out(energy, energy.bind(torch.zeros(1, 2, dtype=torch.float64)))
    assert synapses["h1"].tolist() == [[2, 2, 1]]
    assert synapses["h2"].tolist() == [[4, 3]]
    spikes = {"h1": torch.tensor([[5.0, 0.0, 7.0]]), "h2": torch.tensor([[1.0, 2.0]])}
    happened = 5 * 2 + 7 * 1 + 1 * 4 + 2 * 3
    assert events.events(spikes, synapses).tolist() == [happened]
    steps = torch.tensor([10])
    solution = SpikingSolution({}, {}, steps, torch.zeros(1), torch.ones(1, dtype=torch.bool), None, spikes)
    work = spiking_work(Spiking(), solution, synapses)
    assert work.adds.tolist() == [happened + 15 + 2 * 5 * 10]  # events, resets, drives and thresholds
    assert work.multiply_adds.tolist() == [0]
    assert work.words.tolist() == [3 * happened + 2 * 5 * 10]
    assert float(work.picojoules()) == pytest.approx(0.9 * 142)
    assert float(work.picojoules(events.SRAM)) == pytest.approx(0.9 * 142 + 5 * 181)
    noisy = spiking_work(Spiking(scheme="bernoulli"), solution, synapses)
    assert (noisy.adds.tolist(), noisy.multiply_adds.tolist()) == ([happened + 100], [50])
    dense = dense_work(synapses, steps)
    assert dense.multiply_adds.tolist() == [12 * 10]
    assert float(dense.picojoules()) == pytest.approx(4.6 * 120 + 0.9 * 100)
    assert dense.words.tolist() == [120 + 100]
    total = work + dense
    assert isinstance(total, Work)
    assert float(total.picojoules(events.DRAM)) == pytest.approx(
        float(work.picojoules(events.DRAM) + dense.picojoules(events.DRAM))
    )


class Half(nn.Module):
    """A gate that is open for the first half of six units."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.5, 0.2, 0, 0, 0]], dtype=x.dtype).expand(x.shape[0], 6)


def jacobian_synapses(energy: Energy, x: Tensor) -> Tensor:
    """Nonzero entries in each unit's column of the field's Jacobian, for one example."""
    with torch.no_grad():
        bindings = energy.bind(x[:1])
        shapes = {n: t.shape for n, t in energy.initial(bindings).items()}

    def field(flat: Tensor) -> Tensor:
        parts = flat.split([math.prod(s[1:]) for s in shapes.values()])
        h = {n: p.reshape(shapes[n]) for n, p in zip(shapes, parts, strict=True)}
        return torch.cat([t.flatten() for t in energy.field(h, bindings).values()])

    at = torch.full((sum(math.prod(s[1:]) for s in shapes.values()),), 0.5, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(field, at)
    assert isinstance(matrix, Tensor)
    return (matrix != 0).sum(0)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3])
def test_fan_out_of_convolutions(kernel: int, pool: int) -> None:
    """Against the Jacobian; with pooling, of the convolution before it, where only what is pooled counts."""
    first = Conv((2, 7, 7), 3, kernel, pool=pool).double()
    size = first.out_shape
    nodes = [Node("image", (2, 7, 7), HardSigmoid()), Node("maps", size, HardSigmoid())]
    lateral = Conv(size, 3, 3, padding=1, symmetric=True).double()
    couplings = [Bilinear(first, "image", "maps"), Lateral(lateral, "maps"), SelfCoupling("image", 0.1)]
    energy = Energy([*nodes], [Drive("image", nn.Identity()), *couplings]).double()
    x = torch.rand(1, 2, 7, 7, dtype=torch.float64)
    found = fan_out(energy, energy.bind(x))
    if pool == 1:
        assert torch.equal(joined(found)[0], jacobian_synapses(energy, x).double())
        return
    covered = pool * size[-1]
    taps = [sum(0 <= i - k < covered for k in range(kernel)) for i in range(7)]
    assert found["image"][0, 0].tolist() == [[1 + 3 * a * b for b in taps] for a in taps]
    beside = [sum(0 <= i + k < size[-1] for k in (-1, 0, 1)) for i in range(size[-1])]
    assert found["maps"][0, 0].tolist() == [[2 * (kernel * pool) ** 2 + 3 * a * b for b in beside] for a in beside]


def test_closed_gates_and_absent_weights_have_no_synapses() -> None:
    energy, x = network(gate=Half())
    found = fan_out(energy, energy.bind(x))
    assert torch.equal(joined(found)[0], jacobian_synapses(energy, x).double())
    assert found["h2"][0].tolist() == [11, 11, 11, 8, 8, 8]
    assert found["h2"].shape == (16, 6)


def test_synapses_that_cannot_be_counted_are_refused() -> None:
    node = [Node("h", (4,), HardSigmoid())]
    potential = Energy(node, [Drive("h", nn.Identity()), Potential(Dense(4, 4), "h")])
    with pytest.raises(ConfigError, match="got Potential"):
        fan_out(potential, potential.bind(torch.zeros(1, 4)))
    identity = Energy(node, [Drive("h", nn.Identity()), Lateral(IdentityOperator(4), "h")])
    assert fan_out(identity, identity.bind(torch.zeros(1, 4)))["h"].tolist() == [[1, 1, 1, 1]]


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
