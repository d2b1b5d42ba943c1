"""The associative memory of a denoising DiffTorEqProp against mixtures of Gaussians and exact gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toreq import systems
from toreq.core import Softmax
from toreq.errors import ConfigError
from toreq.estimators import Implicit
from toreq.solvers import Anderson
from toreq.solvers.problem import each_node, relative
from toreq.systems import DiffTorEqProp, Seen
from toreq.systems.difftoreqprop_memory import UNIT, means_of

SHAPE = (1, 4, 4)


def _net(patterns: int = 5, **options: object) -> DiffTorEqProp:
    torch.manual_seed(0)
    net = systems.create(
        "difftoreqprop", SHAPE, 3, **{"hidden": (6,), "denoising": 1.0, "memory": patterns, **options}
    ).double()
    assert isinstance(net, DiffTorEqProp)
    return net


def _data(count: int = 60) -> Tensor:
    g = torch.Generator().manual_seed(1)
    centres = torch.rand(4, *SHAPE, generator=g, dtype=torch.float64)
    return centres[torch.arange(count) % 4] + 0.05 * torch.randn(count, *SHAPE, generator=g, dtype=torch.float64)


def test_the_memory_alone_is_the_posterior_mean_of_a_mixture() -> None:
    net, x = _net(norm_bound=0.02), _data()  # what is recalled hardly changes what is recalled
    net.observe(x)
    memory = net.memory
    assert memory is not None
    assert net.filter is not None
    variance = float(memory.recall.log_spread.detach().exp())
    with torch.no_grad():
        memory.within.variances.fill_(variance)
        memory.within.rest.fill_(variance)
        noisy, level = x[:7] + 0.3, torch.full((7,), 0.2, dtype=torch.float64)
        with net.equilibrium.couplings_off():
            # of couplings only the memory's is needed: it recalls c
            off = net.equilibrium(net.filter(Seen(noisy, level)))["c"]
        assert float(off.abs().max()) == 0
        for p in net.equilibrium.dynamics.parameters():
            if p.shape == (6, 16):
                p.zero_()  # the layers say nothing
        found = net.denoise(Seen(noisy, level))
    keys = UNIT * memory.recall.keys.detach()
    centre = net.filter.mean
    at = (noisy - net.filter.centre()).flatten(1)
    total = variance + 0.2**2
    odds = memory.recall.share.detach() - 0.5 * (at[:, None] - keys).square().sum(2) / total
    posterior = keys + variance / total * (at[:, None] - keys)
    wanted = centre + (odds.softmax(1)[:, :, None] * posterior).sum(1)
    torch.testing.assert_close(found.flatten(1), wanted, rtol=0, atol=2e-5)


def test_its_gradient_is_exact() -> None:
    """In float64 every parameter of layers and memory has the gradient of the implicit function theorem."""
    x, y = _data(12), torch.arange(12) % 3
    grads = []
    for estimator in (None, Implicit(tolerance=1e-12)):
        net = _net(estimator=estimator, solver=Anderson(tolerance=1e-13, max_steps=400, by_node=True))
        net.observe(_data())
        net.train()
        net.generator.manual_seed(5)
        net.criterion(net(x), y).backward()
        grads.append({n: p.grad for n, p in net.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[1].items():
        found = grads[0][name]
        assert wanted is not None
        assert found is not None
        if float(wanted.norm()) > 1e-9:
            assert float(torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)) > 0.9999, name


def test_a_class_moves_the_odds() -> None:
    net, x = _net(), _data(6)
    net.observe(_data())
    assert net.memory is not None
    with torch.no_grad():
        net.memory.recall.named[1, 2] = 50.0
        level = torch.full((6,), 3.0, dtype=torch.float64)
        told, other = (net.denoise(Seen(x, level, torch.full((6,), k))) for k in (1, 0))
        pattern = net.filter.centre().flatten() + UNIT * net.memory.recall.keys[2]  # type: ignore[union-attr]
    near, far = ((d.flatten(1) - pattern).norm(dim=1) for d in (told, other))
    assert bool((near < far).all())


def test_unlike_inputs_have_a_higher_energy() -> None:
    net = _net(8)
    net.observe(_data())
    net.eval()
    level = torch.full((8,), 0.1, dtype=torch.float64)
    known, strange = (net.energy(Seen(x, level)) for x in (_data(8), 1 - _data(8)))
    assert bool(known.amax() < strange.amin())


def test_means_are_of_the_inputs_nearest_to_them() -> None:
    x = _data(80).flatten(1)
    means, nearest, counts = means_of(x, 4, torch.Generator().manual_seed(3))
    assert float(counts.sum()) == 80
    assert torch.equal(nearest, torch.cdist(x, means).argmin(1))
    for k in range(4):
        if counts[k]:
            torch.testing.assert_close(means[k], x[nearest == k].mean(0))


def test_bad_memories_are_refused() -> None:
    with pytest.raises(ConfigError, match="patterns >= 2"):
        _net(1)
    with pytest.raises(ConfigError, match="memory=0 without denoising"):
        _net(4, denoising=0.0)
    with pytest.raises(ConfigError, match="at least as many inputs as patterns"):
        _net(20).observe(_data(10))
    with pytest.raises(ConfigError, match="norm below"):
        _net(4).observe(100 * _data())
    free = _net(4, norm_bound=None)
    free.observe(100 * _data())
    assert free.memory is not None
    assert float(free.memory.recall.keys.detach().abs().max()) > 100  # taken as they are


def test_small_changes_of_a_softmax_keep_their_digits() -> None:
    g = torch.Generator().manual_seed(0)
    sigma = Softmax(0.5)
    a = 5 * torch.randn(4, 9, generator=g)
    for size in (1e-4, 1e-2, 30.0):
        b = a + size * torch.randn(4, 9, generator=g)
        wanted = sigma(b.double()) - sigma(a.double())
        torch.testing.assert_close(sigma.increment(b, a, sigma(a)).double(), wanted, rtol=2e-4, atol=1e-3 * size * 1e-4)


def test_by_node_no_node_hides_behind_a_larger_one() -> None:
    r = {"small": torch.tensor([[0.5]]), "large": torch.tensor([[0.0]])}
    a = {"small": torch.tensor([[0.5]]), "large": torch.tensor([[1e6]])}
    assert float(relative(r, a)) < 1e-6
    assert float(each_node(relative)(r, a)) == pytest.approx(0.5)
    net, x = _net(), _data(6)
    net.observe(_data())
    exact = _settled(net, x, Anderson(tolerance=1e-12, max_steps=300, by_node=True))
    loose = [_settled(net, x, Anderson(tolerance=1e-2, by_node=each)) for each in (False, True)]
    errors = [float((v - exact).norm() / exact.norm()) for v in loose]
    assert errors[1] < 0.02
    assert errors[1] < errors[0]


def _settled(net: DiffTorEqProp, x: Tensor, solver: Anderson) -> Tensor:
    net.equilibrium.solver = solver
    with torch.no_grad():
        return net.equilibrium(net.filter(Seen(x, torch.full((len(x),), 0.1, dtype=x.dtype))))["v"]  # type: ignore[misc]
