"""DiffTorEqProp: the soft clamp, the learned noise, denoising and sampling, by closed forms and finite differences."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from toreq.core import Bilinear, Drive, Energy
from toreq.core.state import detached
from toreq.errors import ConfigError
from toreq.estimators import Centered, Implicit
from toreq.solvers import Anderson, Langevin, Relaxation
from toreq.systems.difftoreqprop import DiffTorEqProp
from toreq.systems.difftoreqprop_nets import DiffConv, DiffMLP
from toreq.systems.difftoreqprop_parts import Clamp, Seen
from toreq.systems.difftoreqprop_sampling import Anneal, Known

SHAPE = (1, 8, 8)
EXACT = Anderson(length=5, max_steps=500, tolerance=1e-12)
KINDS = {"mlp": (DiffMLP, {"hidden": (12, 9)}), "conv": (DiffConv, {"channels": (4, 6), "kernel": 3, "padding": 1})}
EACH = pytest.mark.parametrize("name", list(KINDS))


def _net(name: str, seed: int = 0, **more: Any) -> DiffTorEqProp:
    torch.manual_seed(seed)
    kind, options = KINDS[name]
    net = kind(SHAPE, 5, EXACT, **{**options, **more}).double()
    with torch.no_grad():
        for p in net.parameters():  # no parameter at a special value
            p.add_(0.05 * torch.randn_like(p))
    return net


def _batch(count: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(count, *SHAPE, generator=g, dtype=torch.float64), torch.arange(count) % 5


def _clamp(net: DiffTorEqProp) -> Clamp:
    assert isinstance(net.equilibrium.dynamics, Energy)
    (found,) = (c.module for _, c in net.equilibrium.dynamics.terms() if isinstance(c, Drive) and c.node == "v")
    assert isinstance(found, Clamp)
    return found


@EACH
@pytest.mark.parametrize("visible", ["identity", "hard_sigmoid"])
def test_the_visible_node_is_a_compromise(name: str, visible: str) -> None:
    r"""v = sigma((f + kappa x) / (1 + kappa)), f being what the hidden layer and the bias pull."""
    net, (x, _) = _net(name, visible=visible, clamp=3.0).eval(), _batch()
    solution = net.equilibrium.solve(x)
    dynamics = net.equilibrium.dynamics
    assert isinstance(dynamics, Energy)
    with torch.no_grad():
        field = dynamics.field(solution.h, dynamics.bind(x))["v"]
        v = field / 4
        torch.testing.assert_close(net.denoise(x), v.clamp(0, 1) if visible == "hard_sigmoid" else v)
        hidden = field - 3 * x - _clamp(net).bias
    assert float(hidden.norm()) > 1e-3, "the hidden layers must pull"


@EACH
@pytest.mark.parametrize("direct", [True, False])
def test_gradients_are_those_of_the_cost(name: str, direct: bool) -> None:
    net, (x, y) = _net(name, noise=0.3, direct=direct, lift=4.0, gain=2.0, label_gain=1.0).eval(), _batch()

    def gradients() -> dict[str, Tensor]:
        net.zero_grad()
        (net.criterion(net(x), y) + net.denoise(x).square().sum()).backward()
        return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}

    net.equilibrium.estimator = Implicit(tolerance=1e-12)
    wanted = gradients()
    net.equilibrium.estimator = Centered(beta=1e-3, tolerance=1e-10)
    found = gradients()
    assert set(found) == set(wanted)
    for n, w in wanted.items():
        torch.testing.assert_close(found[n], w, rtol=1e-4, atol=1e-6 * float(w.abs().max()))


@EACH
def test_the_noise_is_learned_by_the_contrast_of_its_pull(name: str) -> None:
    net, (x, y) = _net(name, noise=0.3, direct=False, lift=4.0).eval(), _batch()
    net.equilibrium.estimator = Centered(beta=1e-3, tolerance=1e-10)
    clamp = _clamp(net).train()  # alone: in training each call sharpens the estimates of norms, which moves the cost
    assert clamp.log_noise is not None
    state = clamp.generator.get_state()

    def cost() -> Tensor:
        clamp.generator.set_state(state)  # the same noise
        return net.criterion(net(x), y)

    cost().backward()
    assert clamp.log_noise.grad is not None
    found = float(clamp.log_noise.grad)
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            clamp.log_noise.add_(step)
            values.append(float(cost()))
    assert abs(found) > 1e-4
    assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3)


def test_noise_is_drawn_in_training_alone_and_by_its_own_generator() -> None:
    net, (x, _) = _net("mlp", noise=0.3), _batch()
    net.train()
    assert not torch.equal(net(x), net(x))
    twin = copy.deepcopy(net)
    assert torch.equal(net(x), twin(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    assert not torch.equal(_net("mlp", 1, noise=0.3).train()(x), net(x))


def test_a_class_and_a_level_move_what_they_are_given_to() -> None:
    net, (x, _) = _net("mlp", denoising=1.0).eval(), _batch()
    labels, level = torch.tensor([2, -1, 4]), torch.tensor([0.1, 0.5, 1.0]).double()
    plain, named = net(x), net(Seen(x, labels=labels))
    assert bool((named[[0, 2], [2, 4]] > plain[[0, 2], [2, 4]]).all())
    assert torch.equal(named[1], plain[1])
    levelled = net.denoise(Seen(x, level))
    assert bool(((levelled - net.denoise(x)).flatten(1).norm(dim=1) > 1e-3).all())


def test_a_known_level_starts_at_the_best_scalar_filter() -> None:
    """Without couplings, x times the share of the data in the variance, sigma_d^2/(sigma_d^2 + s^2)."""
    torch.manual_seed(0)
    net, (x, _) = DiffMLP(SHAPE, 5, EXACT, hidden=(12,), denoising=1.0, clamp=3.0).double().eval(), _batch()
    level = torch.tensor([0.03, 0.3, 1.2]).double()
    with net.equilibrium.couplings_off(), torch.no_grad():
        v = net.denoise(Seen(x, level))
    share = 0.3**2 / (0.3**2 + level.square())
    torch.testing.assert_close(v, share.view(-1, 1, 1, 1) * x)


@EACH
def test_every_hidden_layer_sees_the_input_only_where_it_is_told_to(name: str) -> None:
    x = _batch()[0]
    for direct in (True, False):
        net = _net(name, direct=direct).eval()
        with net.equilibrium.couplings_off(), torch.no_grad():
            h, other = net.equilibrium.solve(x).h, net.equilibrium.solve(x + 1).h
        for node in ("h1", "h2"):
            assert torch.equal(h[node], other[node]) != direct
        assert not torch.equal(h["v"], other["v"])


def test_denoising_is_part_of_the_criterion_in_training_alone() -> None:
    net, (x, y) = _net("mlp", denoising=2.0), _batch()
    net.eval()
    logits = net(x)
    plain = float(net.criterion(logits, y).detach())
    assert plain == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y).detach()))
    net.train()
    net.equilibrium.eval()  # in training each call sharpens the estimates of norms, which moves the cost
    state = net.generator.get_state()
    total = float(net.criterion(net(x), y).detach())
    net.generator.set_state(state)
    assert total == pytest.approx(plain + 2 * float(net.denoising_cost(x, y).detach()))
    assert total > plain + 0.1
    assert float(net.criterion(net(x)[:2], y[:2]).detach()) < total, "a part is not the batch that was seen"


def test_training_denoises() -> None:
    torch.manual_seed(0)
    net = DiffMLP(SHAPE, 5, hidden=(32,), denoising=1.0, span=(0.3, 0.3001))
    g = torch.Generator().manual_seed(0)
    centres = (torch.rand(5, *SHAPE, generator=g) > 0.5).float()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        y = torch.randint(5, (32,), generator=g)
        optimizer.zero_grad()
        net.criterion(net(centres[y]), y).backward()
        optimizer.step()
    net.eval()
    y = torch.arange(5).repeat(20)
    noisy = centres[y] + 0.3 * torch.randn(100, *SHAPE, generator=g)
    with torch.no_grad():
        left = float((net.denoise(Seen(noisy, torch.full((100,), 0.3))) - centres[y]).square().mean())
        assert left < 0.4 * 0.3**2
        assert float((net(noisy).argmax(1) == y).double().mean()) > 0.9


def test_inputs_that_fit_have_the_lower_energy() -> None:
    net, (x, _) = _net("mlp").eval(), _batch()
    found = net.energy(x)
    assert found.shape == (3,)
    bindings = net.equilibrium.dynamics.bind(x)
    solution = net.equilibrium.solve(x)
    with torch.no_grad():
        dynamics = net.equilibrium.dynamics
        assert isinstance(dynamics, Energy)
        own = dynamics(solution.state, bindings)
        v = solution.h["v"]
        # the visible node's terms as they are meant: |v|^2 / 2 + kappa |v - x|^2 / 2
        meant = 0.5 * v.square().flatten(1).sum(1) + 0.5 * (v - x).square().flatten(1).sum(1)
        written = v.square().flatten(1).sum(1) - (v * x).flatten(1).sum(1)
    torch.testing.assert_close(found, own - written + meant)


def test_samples_have_the_right_shape_and_obey_what_is_given() -> None:
    net = _net("conv", denoising=1.0).train()
    anneal = Anneal(levels=4, high=1.0, low=0.1)
    x = net.sample(5, anneal=anneal, batch=2, labels=torch.tensor([0, 1, 2, 3, -1]))
    assert x.shape == (5, *SHAPE)
    assert net.training
    again = [net.sample(3, anneal=anneal, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)
    given, mask = torch.ones(SHAPE).double(), torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, :4] = True
    painted = net.sample(2, anneal=anneal, known=Known(given, mask))
    assert bool((painted[:, :, :4] == 1).all())
    assert not bool((painted[:, :, 4:] == 1).any())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clamp": 0.0}, "clamp > 0"),
        ({"visible": "tanh"}, "visible in"),
        ({"noise": -1.0}, "noise > 0 or None"),
        ({"denoising": -1.0}, "denoising >= 0"),
        ({"span": (1.0, 0.5)}, "0 < low < high"),
        ({"lift": 0.0}, "lift > 0"),
        ({"label_gain": -1.0}, "label_gain > 0"),
        ({"hidden": ()}, "positive widths"),
    ],
)
def test_refusals(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _net("mlp", **wrong)


def test_a_classifier_alone_cannot_sample() -> None:
    with pytest.raises(ConfigError, match="denoising > 0"):
        _net("mlp").sample(3)
    with pytest.raises(ConfigError, match="labels"):
        _net("mlp", denoising=1.0).sample(3, labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="classes in"):
        _net("mlp", denoising=1.0).sample(2, labels=torch.tensor([0, 5]))
    with pytest.raises(ConfigError, match="input_shape"):
        DiffConv((8,), 5)


@pytest.mark.parametrize("sign", [-3.0, 3.0])
def test_chains_reach_the_law_from_any_start(sign: float) -> None:
    """One hidden unit: with the Gaussian nodes integrated out, its law is a quadrature, and it has two wells."""
    torch.manual_seed(0)
    net = DiffMLP((2,), 2, hidden=(1,), direct=False, lift=2.0, gain=1.0, norm_bound=None).double()
    up, label = (c.op for _, c in net.equilibrium.dynamics.terms() if isinstance(c, Bilinear))
    x, tau, slope = torch.tensor([0.3, -0.1]).double(), 0.25, 1.0
    with torch.no_grad():
        for op, values in ((up, [[1.0, -0.6]]), (label, [[0.5], [-0.4]])):
            next(op.parameters()).copy_(torch.tensor(values))
    a, c = torch.tensor([1.0, -0.6]).double(), torch.tensor([0.5, -0.4]).double()
    h = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1, None]
    convex = (h * h.atanh() + 0.5 * (1 - h * h).log())[:, 0] / slope
    v, y = 0.5 * (x + h * a), slope * h * c  # means given h
    potential = convex - (v.square().sum(1) / (2 * 0.5) + y.square().sum(1) / (2 * slope))
    weight = (-(potential - potential.min()) / tau).exp()
    weight /= weight.sum()
    mean = float((weight * h[:, 0]).sum())
    chain = Langevin(temperature=tau, step_size=0.4, burn_in=150, samples=80, adjusted=True, seed=1)
    bindings = detached(net.equilibrium.dynamics.bind(x.expand(1500, 2)))
    start = {"v": torch.full((1500, 2), sign).double(), "h1": torch.full((1500, 1), sign).double()}
    start["y"] = torch.full((1500, 2), -sign).double()
    found = chain.solve(Relaxation(net.equilibrium.dynamics, bindings, as_map=True), start)
    error = 4 * float(found.h["h1"].std()) / 1500**0.5
    assert error < 0.1
    assert float(found.h["h1"].mean()) == pytest.approx(mean, abs=error)
    wanted = 0.5 * (x + mean * a)
    assert float((found.h["v"].mean(0) - wanted).abs().max()) < 4 * float(found.h["v"].std()) / 1500**0.5


def test_noise_that_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        Langevin(temperature=-0.1)
    x = _batch()[0].float()
    steep = DiffMLP(SHAPE, 5, Langevin(step_size=50.0, burn_in=2, samples=2), hidden=(4,), direct=False)
    with pytest.raises(ConfigError, match="step_size below"):
        steep(x)
    with pytest.raises(ConfigError, match="HardSigmoid"):
        DiffMLP(SHAPE, 5, Langevin(), hidden=(4,), visible="hard_sigmoid")
