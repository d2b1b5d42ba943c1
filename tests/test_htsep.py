"""HTSEP: gates on a torus of contexts, gradients, spikes, growth, and weights that move while it settles."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from toreq import systems
from toreq.core import Conv, Dense, GatedBilinear
from toreq.errors import ConfigError
from toreq.estimators import Centered, Implicit, OneSided
from toreq.solvers import Anderson, Spiking
from toreq.solvers.events import fan_out
from toreq.systems.htsep import HTSEP, HTSEPConv, HTSEPDense
from toreq.systems.htsep_continual import continual_step
from toreq.systems.htsep_langevin import ExploredCentered
from toreq.systems.htsep_norm import OpenNorm

TIGHT = Anderson(length=3, tolerance=1e-12, max_steps=400)
SHAPE = (1, 6, 6)


def dense(**options: object) -> HTSEPDense:
    torch.manual_seed(0)
    chosen = {"hidden": (24, 12), "torus": (3, 3), "coupling_scale": 0.5, **options}
    net = HTSEPDense(SHAPE, 4, TIGHT, **chosen).double()  # type: ignore[arg-type]
    _steeper(net)
    return net


def conv(**options: object) -> HTSEPConv:
    torch.manual_seed(0)
    chosen = {"channels": (6, 8), "kernel": 3, "stride": 1, "torus": (3,), "lateral": True, **options}
    net = HTSEPConv(SHAPE, 4, TIGHT, **chosen).double()  # type: ignore[arg-type]
    _steeper(net)
    return net


def _steeper(net: HTSEP) -> None:
    """Drives that leave most units between 0 and 1."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "bias" in name or "value" in name:
                # steeper upper layers saturate sooner
                scale = 0.2 if "value" in name else 1.0
                p.copy_(scale * (0.3 + 0.1 * torch.rand(p.shape, generator=g)))


def batch(size: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(size, *SHAPE, generator=g, dtype=torch.float64), torch.randint(4, (size,), generator=g)


def gradient(net: HTSEP, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    net.criterion(net(x), y).backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


# -- gradients


@pytest.mark.parametrize("make", [dense, conv])
def test_the_contrast_is_the_implicit_gradient_with_gates_half_open(make: type) -> None:
    net = make().eval()
    x, y = batch()
    net.equilibrium.estimator = Implicit(tolerance=1e-13, max_steps=1000)
    wanted = gradient(net, x, y)
    assert float(net.equilibrium.radius(x)) > 0.05
    net.equilibrium.estimator = Centered(beta=1e-5, tolerance=1e-10, max_steps=2000)
    found = gradient(net, x, y)
    assert found.keys() == wanted.keys()
    for n, g in wanted.items():
        assert float(g.norm()) > 0, n
        assert float((found[n] - g).norm() / g.norm()) < 1e-5, n


def test_the_implicit_gradient_is_that_of_finite_differences() -> None:
    net = dense().eval()
    x, y = batch()
    net.equilibrium.estimator = Implicit(tolerance=1e-13, max_steps=1000)
    found = gradient(net, x, y)
    g = torch.Generator().manual_seed(3)
    for name, p in net.named_parameters():
        along = torch.randn(p.shape, generator=g, dtype=p.dtype)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(along, alpha=sign * 1e-6)
                losses.append(float(net.criterion(net(x), y)))
                p.sub_(along, alpha=sign * 1e-6)
        slope = (losses[0] - losses[1]) / 2e-6
        assert slope == pytest.approx(float((found[name] * along).sum()), rel=1e-4, abs=1e-8), name


def test_the_contrast_of_gated_couplings_reaches_gates_that_have_a_slope() -> None:
    g = torch.Generator().manual_seed(0)
    below, above = (nn.Sequential(nn.Linear(3, n), nn.Sigmoid()).double() for n in (5, 4))
    coupling = GatedBilinear(Dense(5, 4, generator=g).double(), "a", "b", below, above)
    x = torch.randn(6, 3, generator=g, dtype=torch.float64)
    plus, minus = (
        {
            "a": torch.randn(6, 5, generator=g, dtype=torch.float64),
            "b": torch.randn(6, 4, generator=g, dtype=torch.float64),
        }
        for _ in range(2)
    )
    weight = torch.rand(6, generator=g, dtype=torch.float64)
    bound = coupling.bind(x).map(torch.Tensor.detach, torch.Tensor.detach)
    found = coupling.gradient(plus, minus, weight, bound)
    leaf = bound.map(lambda t: t.clone().requires_grad_(), lambda t: t.clone().requires_grad_())
    total = (weight * (coupling.value(plus, leaf) - coupling.value(minus, leaf))).sum()
    names = ["weight", "gate_pre", "gate_post"]
    for name, wanted in zip(names, torch.autograd.grad(total, [leaf[n] for n in names]), strict=True):
        torch.testing.assert_close(found[name], wanted, rtol=1e-10, atol=1e-12)
    h = {n: t.clone().requires_grad_() for n, t in plus.items()}
    slopes = torch.autograd.grad(coupling.value(h, bound).sum(), list(h.values()))
    for f, wanted in zip(coupling.field(plus, bound).values(), slopes[::-1], strict=True):
        torch.testing.assert_close(f, wanted, rtol=1e-10, atol=1e-12)
    with pytest.raises(ConfigError, match="two different nodes"):
        GatedBilinear(Dense(5, 5), "a", "a", below, below)


@pytest.mark.parametrize("make", [dense, conv])
def test_a_closed_unit_is_silent_and_none_of_its_weights_changes(make: type) -> None:
    net = make().eval()
    x, y = batch()
    found = gradient(net, x, y)
    with torch.no_grad():
        h = net.equilibrium.solve(x).h
    shut = {n: net.context.gates(x, n) == 0 for n in net.equilibrium.dynamics.names}
    for n, closed in shut.items():
        assert 0.2 < float(closed.double().mean()) < 0.8
        assert float(h[n][closed].abs().max()) == 0
    # nor does a nudge open it
    v = torch.randn_like(h["h2"])
    for n, t in net.equilibrium.solve_nudged(x, net.opened(x, v)).h.items():
        assert float(t[shut[n].repeat(2, 1)].abs().max()) == 0
    statistics = net.equilibrium.last.nudged
    assert statistics is not None
    assert statistics.asym is not None
    assert float(statistics.asym.max()) < 0.1
    # all examples share a context here: the same units are closed for each
    rows = shut["h1"][0]
    drive = found[next(n for n in found if "inner" in n and n.endswith("weight"))]
    assert float(drive[rows].abs().max()) == 0
    assert float(drive[~rows].abs().amax(tuple(range(1, drive.dim()))).min()) > 0


@pytest.mark.parametrize("make", [dense, conv])
def test_learning_one_context_leaves_the_weights_of_the_others(make: type) -> None:
    """Units that a context never opens keep every weight between them to the bit, though the bound is always active."""
    net = make(open_share=0.3, norm_bound=0.4, gates="hard", lateral=True)
    net.equilibrium.solver = Anderson(length=3, tolerance=1e-4)
    x, y = batch(16)
    net.context.observe(x)
    adam = torch.optim.Adam(net.parameters(), lr=5e-3, betas=(0.0, 0.999))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    opened = {n: net.context.gates(x, n).amax(0) > 0 for n in net.context.radius}
    assert all(0 < int(o.sum()) < len(o) for o in opened.values())
    moved = False
    for _ in range(8):
        adam.zero_grad()
        net.criterion(net(x), y).backward()
        adam.step()
    net(x)  # the last step is projected at the next batch
    for norm in net.norms:
        assert isinstance(norm, OpenNorm)
        op = norm._operator[0]
        name = next(n for n, p in net.named_parameters() if p is op.weight)
        pair = opened[norm.post][:, None] & opened[norm.pre]
        closed = ~pair.reshape(*pair.shape, *[1] * (op.weight.dim() - 2)).expand_as(op.weight)
        assert torch.equal(op.weight[closed], before[name][closed])
        moved |= not torch.allclose(op.weight[~closed], before[name][~closed], rtol=1e-2)
        matrix = _matrix(op, opened[norm.pre], opened[norm.post]).detach()
        assert float(torch.linalg.matrix_norm(matrix, ord=2)) <= norm.bound * 1.05
    assert moved


def test_singular_values_above_the_bound_fall_to_it_and_the_others_stay() -> None:
    g = torch.Generator().manual_seed(0)
    op = Dense(12, 10).double()
    norm = OpenNorm(op, 0.5, "a", "b").double()
    left, right = (torch.linalg.qr(torch.randn(n, 10, generator=g, dtype=torch.float64))[0] for n in (10, 12))
    sizes = torch.tensor([1.3, 0.8, 0.45, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01], dtype=torch.float64)
    every = torch.ones(1, 12, dtype=torch.float64), torch.ones(1, 10, dtype=torch.float64)
    for _ in range(20):  # the directions follow from step to step
        with torch.no_grad():
            op.weight.copy_(left @ torch.diag(sizes) @ right.T)
        norm.hold(*every)
    found = torch.linalg.svdvals(op.weight)
    torch.testing.assert_close(found, sizes.clamp_max(0.5), rtol=1e-3, atol=1e-4)


def _matrix(op: Dense | Conv, pre: Tensor, post: Tensor) -> Tensor:
    """The operator among open units, one column for each number that goes in."""
    eye = torch.eye(math.prod(op.in_shape), dtype=torch.float64).reshape(-1, *op.in_shape)
    below, above = (g.double().reshape(-1, *[1] * (len(op.in_shape) - 1)) for g in (pre, post))
    return (above * op(below * eye)).flatten(1)


def test_two_batches_before_one_backward() -> None:
    net = dense(norm_bound=0.3)
    (x, y), (other, labels) = batch(4), batch(4, 1)
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(3):
        adam.zero_grad()
        (net.criterion(net(x), y) + net.criterion(net(other), labels)).backward()
        adam.step()


def test_noise_in_both_phases_leaves_the_gradient_of_a_contraction() -> None:
    net = dense().eval()
    x, y = batch()
    net.equilibrium.estimator = Centered(beta=1e-4, tolerance=1e-10, max_steps=2000)
    wanted = gradient(net, x, y)
    net.equilibrium.estimator = ExploredCentered(beta=1e-4, tolerance=1e-10, max_steps=2000, temperature=1e-2)
    found = gradient(net, x, y)
    for n, g in wanted.items():
        assert float((found[n] - g).norm() / g.norm()) < 1e-5, n
    statistics = net.equilibrium.last.nudged
    assert statistics is not None
    assert int(statistics.steps.min()) > 5


def test_both_phases_get_the_same_kicks() -> None:
    net = dense().eval()
    x, _ = batch()
    seen: list[Tensor] = []

    class Watched(ExploredCentered):
        def _explored(self, problem, a):  # type: ignore[no-untyped-def]
            out = super()._explored(problem, a)
            seen.append(torch.cat([t.flatten(1) for t in out.values()], 1))
            return out

    net.equilibrium.estimator = Watched(beta=1e-6, temperature=1.0, kicks=3)
    gradient(net, *batch())
    plus, minus = seen[0].chunk(2)
    rest = torch.cat([t.flatten(1) for t in net.equilibrium.solve(x).state.values()], 1)
    assert float((plus - rest).norm()) > 1.0
    assert float((plus - minus).norm()) < 1e-4


# -- spikes


@pytest.mark.parametrize("make", [dense, conv])
def test_spikes_converge_to_the_equilibrium_that_was_trained(make: type) -> None:
    net = make().eval()
    x, _ = batch()
    with torch.no_grad():
        wanted = net(x)
    errors = []
    for steps in (60, 960):
        logits, solution = net.spike(x, Spiking(max_steps=steps, tolerance=0.0))
        errors.append(float((logits - wanted).norm() / wanted.norm()))
        closed = net.context.gates(x, "h1") == 0
        assert float(solution.spikes["h1"][closed].sum()) == 0
    assert errors[1] < 4e-3
    assert errors[1] < errors[0] / 6
    assert isinstance(net.equilibrium.solver, Anderson)


def test_it_trains_by_spikes() -> None:
    net = dense().eval()
    x, y = batch()
    net.equilibrium.estimator = Centered(beta=1e-2, tolerance=1e-3, max_steps=4000)
    wanted = gradient(net, x, y)
    net.equilibrium.solver = Spiking(max_steps=1000, tolerance=1e-3, nudged_copies=2)
    net.equilibrium.warn = False
    net.equilibrium.estimator = Centered(beta=0.1, tolerance=0.0, max_steps=1000, max_halvings=0)
    found = gradient(net, x, y)
    a, b = (torch.cat([g[n].flatten() for n in wanted]) for g in (found, wanted))
    assert float(torch.cosine_similarity(a, b, 0)) > 0.95


@pytest.mark.parametrize("make", [dense, conv])
def test_synapses_are_the_nonzero_entries_of_the_fields_jacobian(make: type) -> None:
    net = make().eval()
    energy = net.equilibrium.dynamics
    x, _ = batch(1)
    bindings = energy.bind(x)
    found = fan_out(energy, bindings)
    names = list(energy.shapes)
    for name in names:
        state = {n: torch.zeros(1, *energy.shapes[n], dtype=torch.float64) for n in names}

        def field(t: Tensor, name: str = name, state: dict[str, Tensor] = state) -> Tensor:
            out = energy.field({**state, name: t}, bindings, static={})
            return torch.cat([out[n].flatten() for n in names])

        jacobian = torch.autograd.functional.jacobian(field, state[name]).flatten(1)
        assert torch.equal((jacobian != 0).sum(0).double(), found[name].flatten()), name


def test_events_cost_less_than_dense_products() -> None:
    net = dense().eval()
    x, _ = batch()
    solver = Spiking(tolerance=0.05)
    _, solution = net.spike(x, solver)
    own, every = net.work(x, solution, solver)
    closed = 1 - float(net.context.gates(x, "h1").mean())
    assert closed > 0.3
    assert float(every.multiply_adds.min()) >= 24 * 24 + 2 * 24 * 12
    assert float(own.multiply_adds.max()) == 0
    assert float(own.adds.min()) > 0
    assert net.context.mode == "probabilistic"


# -- weights that move while it settles


def test_at_a_vanishing_rate_continual_updates_are_the_one_sided_gradient() -> None:
    net = dense().eval()
    x, y = batch()
    net.equilibrium.estimator = OneSided(beta=1e-4, tolerance=1e-10, max_steps=2000)
    wanted = gradient(net, x, y)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    rate = 1e-9
    continual_step(net, x, y, rate, steps=60, beta=1e-4)
    for n, p in net.named_parameters():
        moved = (before[n] - p.detach()) / rate
        assert float((moved - wanted[n]).norm() / wanted[n].norm()) < 2e-3, n


def test_continual_updates_learn() -> None:
    net = dense(hidden=(24,), gates="hard", open_share=0.8).train()
    x, y = batch(24)
    x = 0.3 * x
    x.view(24, 4, 9)[torch.arange(24), y] += 0.7  # nine pixels tell the class
    losses = [continual_step(net, x, y, 0.2, steps=6) for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(ConfigError, match="rate > 0"):
        continual_step(net, x, y, 0.0)


# -- refusals and the registry


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torus": (1, 4)}, "sizes >= 2"),
        ({"open_share": 0.0}, "open_share"),
        ({"gates": "of"}, "off"),
        ({"context": "label"}, "context in"),
        ({"hidden": ()}, "positive widths"),
        ({"hidden": (9,), "sheets": (2,)}, "2 sheets divide"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        systems.create("htsep", SHAPE, 4, **{"hidden": (8,), **options})


def test_both_architectures_are_registered_and_have_a_twin() -> None:
    assert systems.architectures("htsep") == ["dense", "conv"]
    for net in (dense(), conv()):
        twin = net.feedforward().double()
        assert twin(batch()[0]).shape == (5, 4)
        # the drive, the joint and the head have a weight each in the twin
        assert len([m for m in twin.modules() if isinstance(m, nn.Linear | nn.Conv2d)]) == 3


def test_temperature_is_langevin_noise() -> None:
    assert isinstance(dense(temperature=0.01).equilibrium.estimator, ExploredCentered)
    assert not isinstance(dense().equilibrium.estimator, ExploredCentered)
    with pytest.raises(ConfigError, match="temperature"):
        replace(ExploredCentered(), temperature=-1.0)
