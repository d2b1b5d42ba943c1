"""The linear filter of a denoising network, against matrices written out, and what the network makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from toreq import training
from toreq.core import Standardize
from toreq.errors import ConfigError
from toreq.estimators import Centered, Implicit
from toreq.solvers import Anderson
from toreq.systems.difftoreqprop_filter import LinearFilter, shrunk
from toreq.systems.difftoreqprop_nets import DiffConv, DiffMLP
from toreq.systems.difftoreqprop_parts import Seen
from toreq.systems.difftoreqprop_sampling import Anneal
from toreq.training import TrainConfig

SHAPE = (1, 8, 8)
SPAN = (0.02, 4.0)
EXACT = Anderson(length=5, max_steps=500, tolerance=1e-12)


def _data(count: int = 400, shape: tuple[int, ...] = (6,)) -> Tensor:
    """Correlated inputs with a mean."""
    g = torch.Generator().manual_seed(0)
    size = torch.Size(shape).numel()
    mix = torch.randn(size, size, generator=g, dtype=torch.float64) / size**0.5
    return (torch.randn(count, size, generator=g, dtype=torch.float64) @ mix + 0.7).view(count, *shape)


def _fitted(x: Tensor, components: int = 512) -> tuple[LinearFilter, Tensor]:
    """A filter and the covariance that it should have: shrunk towards a multiple of the identity."""
    found = LinearFilter(tuple(x.shape[1:]), SPAN, components).double()
    found.observe(x)
    sample, p, n = torch.cov(x.flatten(1).T), x[0].numel(), len(x)
    squares, total = (sample @ sample).trace(), sample.trace()
    share = ((1 - 2 / p) * squares + total**2) / ((n + 1 - 2 / p) * (squares - total**2 / p))
    eye = torch.eye(p, dtype=torch.float64)
    return found, (1 - share) * sample + share * total / p * eye


def test_it_is_the_posterior_mean_and_knows_what_it_leaves() -> None:
    x = _data()
    found, covariance = _fitted(x)
    level = torch.tensor([0.05, 0.4, 3.0]).double()
    seen = found(Seen(x[:3], level))
    assert seen.filtered is not None
    torch.testing.assert_close(seen.x, x[:3] - x.mean(0))
    for i, s in enumerate(level):
        noisy = covariance + s**2 * torch.eye(6, dtype=torch.float64)
        wanted = covariance @ torch.linalg.solve(noisy, x[i] - x.mean(0))
        torch.testing.assert_close(seen.filtered[i], wanted)
        remains = covariance - covariance @ torch.linalg.solve(noisy, covariance)
        torch.testing.assert_close(found.left(level)[i], remains.trace() / 6)


def test_directions_that_are_not_kept_have_one_variance() -> None:
    x = _data()
    found, covariance = _fitted(x, 2)
    values, vectors = torch.linalg.eigh(covariance)
    merged = torch.cat([values[:4].mean().expand(4), values[4:]])
    level = torch.tensor([0.4]).double()
    seen = found(Seen(x[:1], level))
    assert seen.filtered is not None
    gains = merged / (merged + 0.4**2)
    torch.testing.assert_close(seen.filtered[0], vectors @ (gains * (vectors.T @ (x[0] - x.mean(0)))))
    torch.testing.assert_close(found.left(level), (0.4**2 * gains).mean()[None])


def test_draws_have_mean_and_covariance() -> None:
    for components in (2, 512):
        found, covariance = _fitted(_data(), components)
        x = found.drawn(40_000, torch.Generator().manual_seed(1))
        values, vectors = torch.linalg.eigh(covariance)
        if components == 2:
            values = torch.cat([values[:4].mean().expand(4), values[4:]])
        wanted = vectors @ (values[:, None] * vectors.T)
        assert float((x.mean(0) - found.centre()).abs().max()) < 5 * float(values.max()) ** 0.5 / 200
        assert float((torch.cov(x.T) - wanted).abs().max()) < 10 * float(values.max()) / 200


def test_few_examples_are_trusted_less() -> None:
    values = torch.tensor([0.0, 0.0, 1.0, 5.0]).double()
    spread = [float(shrunk(values, n).std()) for n in (3, 30, 300_000)]
    assert spread == sorted(spread)
    torch.testing.assert_close(shrunk(values, 10**9), values)
    for n in (3, 30, 300):
        assert float(shrunk(values, n).sum()) == pytest.approx(6)
    torch.testing.assert_close(shrunk(torch.ones(4), 10), torch.ones(4))


def test_before_it_has_observed_it_is_the_best_scalar_filter() -> None:
    x, level = _data(3), torch.tensor([0.03, 0.3, 1.2]).double()
    seen = LinearFilter((6,), SPAN).double()(Seen(x, level))
    share = 0.09 / (0.09 + level.square())
    assert seen.filtered is not None
    torch.testing.assert_close(seen.filtered, share[:, None] * x)


@pytest.mark.parametrize("components", [100, 512])
def test_an_unknown_level_is_the_most_likely_one(components: int) -> None:
    g = torch.Generator().manual_seed(0)
    scales = (-torch.arange(200).double() / 20).exp()  # as of images: noise stands out where the data have no variance
    turn, _ = torch.linalg.qr(torch.randn(200, 200, generator=g, dtype=torch.float64))
    x = 0.7 + (torch.randn(5000, 200, generator=g, dtype=torch.float64) * scales) @ turn
    found, covariance = _fitted(x, components)
    for s in (0.1, 0.6, 2.0):
        noisy = x[:50] + s * torch.randn(50, 200, generator=g, dtype=torch.float64)
        level = found.level(noisy)
        assert float((level / s - 1).abs().mean()) < 0.2
        assert found(noisy).level is not None
        if components == 512:  # the minimum by a fine search, of the law written out
            values, vectors = torch.linalg.eigh(covariance)
            parts = ((noisy - x.mean(0)) @ vectors).square()
            fine = torch.linspace(-3.9, 1.38, 4000, dtype=torch.float64)
            total = values[:, None] + (2 * fine).exp()
            best = fine[(total.log().sum(0) + parts @ (1 / total)).argmin(1)].exp()
            torch.testing.assert_close(level, best, rtol=0.01, atol=0)
    clean = found.level(x[:50])
    assert float(clean.max()) < 0.1
    assert float(clean.min()) >= 0.02 * (1 - 1e-9)
    assert float(found.level(x[:5] * 1000).max()) <= 4 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(torch.zeros(4, 5), "inputs \\(B, 6\\)"), (torch.zeros(1, 6), "B >= 2"), (torch.ones(4, 6), "inputs that differ")],
)
def test_refusals(wrong: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LinearFilter((6,), SPAN).observe(wrong)


def _net(kind: str, **more: Any) -> DiffMLP | DiffConv:
    torch.manual_seed(0)
    if kind == "mlp":
        return DiffMLP(SHAPE, 5, EXACT, hidden=(12, 9), denoising=1.0, **more).double()
    return DiffConv(SHAPE, 5, EXACT, channels=(4,), dense=(9,), kernel=3, padding=1, denoising=1.0, **more).double()


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_network_starts_at_the_filter_and_learns_by_exact_gradients(kind: str) -> None:
    net, x, y = _net(kind).eval(), _data(300, SHAPE), torch.arange(3)
    net.observe(x)
    own = net.filter
    assert own is not None
    level, names = torch.tensor([0.1, 0.5, 1.5]).double(), torch.tensor([-1, 2, 4])
    with net.equilibrium.couplings_off(), torch.no_grad():
        seen = own(Seen(x[:3], level))
        torch.testing.assert_close(net.denoise(Seen(x[:3], level)), own.centre() + seen.filtered)
    with torch.no_grad():
        for p in net.parameters():  # no parameter at a special value
            p.add_(0.05 * torch.randn_like(p))

    def gradients() -> dict[str, Tensor]:
        net.zero_grad()
        cost = net.denoise(Seen(x[:3], level, names)).square().sum() + net.criterion(net(x[:3]), y)
        cost.backward()
        return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}

    net.equilibrium.estimator = Implicit(tolerance=1e-12)
    wanted = gradients()
    net.equilibrium.estimator = Centered(beta=1e-3, tolerance=1e-10)
    found = gradients()
    assert set(found) == set(wanted)
    for n, w in wanted.items():
        torch.testing.assert_close(found[n], w, rtol=1e-4, atol=1e-6 * float(w.abs().max()))


def test_the_energy_is_that_at_the_estimated_level() -> None:
    net, x = _net("mlp").eval(), _data(300, SHAPE)
    net.observe(x)
    assert net.filter is not None
    level = net.filter.level(x[:4])
    torch.testing.assert_close(net.energy(x[:4]), net.energy(Seen(x[:4], level)))
    assert not torch.allclose(net.energy(x[:4]), net.energy(Seen(x[:4], 3 * level)))


def test_chains_begin_about_the_data() -> None:
    net, x = _net("mlp").eval(), 5 + _data(300, SHAPE)
    net.observe(x)
    drawn = net.sample(64, anneal=Anneal(levels=4, high=0.5, low=0.05), generator=torch.Generator().manual_seed(0))
    assert float((drawn.mean(0) - x.mean(0)).abs().mean()) < 0.5


def test_moments_are_learned_in_training_and_saved_with_the_weights() -> None:
    config = TrainConfig("difftoreqprop", set={"hidden": (7,), "denoising": 1.0})
    x = _data(50, SHAPE).float()
    net = training.build(config, SHAPE, 5, x)
    again = training.build(config, SHAPE, 5)
    again.load_state_dict(net.state_dict())
    assert isinstance(net, DiffMLP)
    assert isinstance(again, DiffMLP)
    assert again.filter is not None
    torch.testing.assert_close(again.filter.mean, x.mean(0).flatten())
    seen = Seen(x[:2], torch.tensor([0.2, 0.9]))
    torch.testing.assert_close(net.eval().denoise(seen), again.eval().denoise(seen))


def test_the_backprop_twin_sees_plain_images() -> None:
    config = TrainConfig("difftoreqprop", side="bp-ff", set={"hidden": (7,), "denoising": 1.0})
    net = training.build(config, SHAPE, 5, _data(50, SHAPE).float())
    assert training.trained_module(net, config)(torch.rand(2, *SHAPE)).shape == (2, 5)


def test_a_second_normalisation_is_refused() -> None:
    with pytest.raises(ConfigError, match="denoising=0"):
        _net("mlp").standardize(Standardize([0.5], [0.3]))
    plain = DiffMLP(SHAPE, 5, hidden=(4,))
    plain.standardize(Standardize([0.5], [0.3]))
    plain.observe(torch.rand(5, *SHAPE))  # nothing to do
    assert plain.filter is None
    with pytest.raises(ConfigError, match="denoising > 0"):
        plain.denoising_cost(torch.rand(2, *SHAPE), torch.zeros(2, dtype=torch.int64))
