"""HTSEP's torus of contexts: what is found, what is opened, and how it grows."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import Tensor

from test_htsep import SHAPE, batch, conv, dense, gradient
from toreq import systems
from toreq.errors import ConfigError
from toreq.evidence.protocols.continual.streams import SplitMNIST
from toreq.systems.htsep import HTSEP, HTSEPDense
from toreq.systems.htsep_context import ContextTorus, spread
from toreq.systems.htsep_growth import grow
from toreq.systems.htsep_laws import GaussianLaws

# -- contexts


def permuted(count: int, seed: int, order: Tensor) -> Tensor:
    """Images whose first third is bright, their pixels in another order."""
    g = torch.Generator().manual_seed(seed)
    x = 0.2 * torch.rand(count, 36, generator=g)
    x[:, :12] += 0.6 * torch.rand(count, 1, generator=g) + 0.2
    return x[:, order].reshape(count, *SHAPE)


def test_contexts_are_found_from_statistics_and_recognised_example_by_example() -> None:
    torus = ContextTorus(36, (4, 4), {"h": 64})
    orders = [torch.randperm(36, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    slots = []
    for k, order in enumerate(orders):
        for step in range(12):
            slots.append(torus.observe(permuted(32, 100 * k + step, order)))
    own = [slots[12 * k + 6] for k in range(4)]
    assert len(set(own)) == torus.contexts == 4
    assert torus.full == 0
    # the first batches of a context may still be seen as the one before; no later one
    assert all(slot == own[i // 12] for i, slot in enumerate(slots) if i % 12 >= 2)
    for k, order in enumerate(orders):
        found = torus.address(permuted(200, 999 + k, order))
        assert float((found == own[k]).double().mean()) > 0.97
    # places far from each other: on a torus of 4 x 4 the second is two slots off on both axes
    assert torus.slots[own[1]].tolist() == [2, 2]


def test_one_distribution_is_one_context() -> None:
    torus = ContextTorus(36, (4, 4), {"h": 64})
    for step in range(60):
        torus.observe(permuted(32, step, torch.arange(36)))
    assert torus.contexts == 1
    assert float(torus.count.sum()) == 60 * 32


def test_a_law_is_mean_and_covariance_of_what_was_seen_and_of_a_belief() -> None:
    laws = GaussianLaws(36, 3).double()
    parts = [permuted(16, step, torch.arange(36)).double() for step in range(5)]
    laws.start(1, parts[0])
    for part in parts[1:]:
        laws.follow(1, part)
    seen, first = torch.cat(parts).flatten(1), parts[0].flatten(1)
    torch.testing.assert_close(laws.mean[1], seen.mean(0))
    # as many examples again as there are dimensions, of all directions alike
    alike = first.var(0, correction=0).mean() * torch.eye(36, dtype=torch.float64)
    scatter = 80 * torch.cov(seen.T, correction=0) + 36 * alike
    torch.testing.assert_close(laws.covariance[1], scatter / (80 + 36))
    assert laws.used.tolist() == [1]
    laws._factor(1)
    law = torch.distributions.MultivariateNormal(seen.mean(0), scatter / 116 + 0.01 * torch.eye(36))
    wanted = law.log_prob(seen) / 36 + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(laws.likelihood(seen)[:, 0], wanted)


def test_inputs_of_many_numbers_are_projected_and_nothing_is_stretched() -> None:
    laws = GaussianLaws(300, 2)
    assert laws.projection is not None
    torch.testing.assert_close(laws.projection.T @ laws.projection, torch.eye(128), atol=1e-5, rtol=0)
    assert torch.equal(laws.projection, GaussianLaws(300, 2).projection)  # pyright: ignore[reportArgumentType]
    assert "projection" not in laws.state_dict()
    assert laws.bytes() == 4 * 2 * (3 + 128 + 2 * 128**2)


def test_a_law_follows_in_the_end_what_drifts() -> None:
    laws = GaussianLaws(4, 1)
    g = torch.Generator().manual_seed(0)
    laws.start(0, torch.randn(1000, 4, generator=g))
    for _ in range(3000):
        laws.follow(0, 1 + 2 * torch.randn(100, 4, generator=g))
    # the mean of all would not be there yet, that of the last thousand batches is
    laws.count[0] = 1e9
    for _ in range(5000):
        laws.follow(0, torch.randn(100, 4, generator=g) - 1)
    torch.testing.assert_close(laws.mean[0], torch.full((4,), -1.0), atol=0.05, rtol=0)
    torch.testing.assert_close(laws.covariance[0], torch.eye(4), atol=0.1, rtol=0)


def test_a_new_law_believes_what_makes_its_first_batch_likelier() -> None:
    g = torch.Generator().manual_seed(0)
    stretch = torch.diag(torch.tensor([5.0] * 8 + [0.1] * 24))
    laws = GaussianLaws(32, 3)
    laws.start(0, torch.randn(4000, 32, generator=g) @ stretch)
    # alike but elsewhere, then nothing alike
    laws.start(1, torch.randn(16, 32, generator=g) @ stretch + 3)
    laws.start(2, torch.randn(16, 32, generator=g) @ stretch.flip(0) - 3)
    spread = [laws.covariance[k].diagonal() for k in (1, 2)]
    assert float(spread[0][8:].max()) < 0.1 < 10 < float(spread[0][:8].min())
    assert float(spread[1][:8].min()) > 1


def test_classes_that_arrive_in_pairs_open_a_context_each() -> None:
    stream = SplitMNIST(0, train=8000, test=1000)
    torus = ContextTorus(784, (4, 4), {"h": 64})
    for number in range(len(stream)):
        torus.observe(stream.batch(number).x)
    assert torus.contexts == 5
    right = []
    for task in range(5):
        found = torus.address(stream.test(task)[0])
        right.append(float((found == found.mode().values).double().mean()))
    # under variances alone three of four
    assert sum(right) / 5 > 0.85


def test_a_bump_opens_its_share_around_its_slot() -> None:
    torus = ContextTorus(4, (4, 4), {"h": 1600}, share=0.2)
    p = torus.bump("h")
    opened = (p >= 0.5).double()
    assert opened.mean().item() == pytest.approx(0.2, abs=1e-3)
    assert opened.mean(1).tolist() == pytest.approx([0.2] * 16, abs=0.02)
    at, u = torus.slots[5], torus.places("h")
    apart = (u - at).abs()
    apart = torch.minimum(apart, 4 - apart).norm(dim=1)
    assert float(apart[p[5] >= 0.5].max()) <= float(apart[p[5] < 0.5].min())
    assert bool((ContextTorus(4, (3,), {"h": 10}, share=1.0).bump("h") >= 0.5).all())


def test_units_are_spread_evenly_and_so_is_every_part_of_them() -> None:
    for part in (spread(256, (4, 4)), spread(1024, (4, 4))[300:556]):
        cells = part.floor().long()
        counts = torch.bincount(cells[:, 0] * 4 + cells[:, 1], minlength=16)
        assert 11 <= int(counts.min()) <= int(counts.max()) <= 21  # drawn at random: 8 to 26


def test_gates_are_drawn_once_a_forward_and_from_the_bump() -> None:
    torus = ContextTorus(36, (3, 3), {"h": 400}, edge=1.0)
    x = permuted(300, 0, torch.arange(36))
    torus.observe(x)
    with torus.drawn(x, draw=True):
        first, again = torus.gates(x, "h"), torus.gates(x, "h")
        # another input is not what was drawn for
        other = torus.gates(x.clone(), "h")
    assert torch.equal(first, again)
    assert torch.equal(other, (torus.bump("h")[0] >= 0.5).float().expand_as(other))
    torch.testing.assert_close(first.mean(0), torus.bump("h")[0], atol=0.13, rtol=0)
    with torus.drawn(x, draw=True):
        assert not torch.equal(torus.gates(x, "h"), first)


def test_in_training_a_batch_is_observed_and_in_evaluation_not() -> None:
    net = dense().train()
    x, _ = batch()
    net(x)
    assert float(net.context.count.sum()) == 5
    net.eval()(x)
    assert float(net.context.count.sum()) == 5
    off = dense(gates="off").train()
    off(x)
    assert off.context.contexts == 0
    assert bool((off.context.gates(x, "h1") == 1).all())


def test_without_a_torus_each_input_opens_the_same_share() -> None:
    net = dense(context="input", open_share=0.25).eval()
    x, _ = batch()
    gates = net.context.gates(x, "h1")
    assert gates.sum(1).tolist() == [6] * 5
    assert len({tuple(row.tolist()) for row in gates}) > 1


# -- growth


@pytest.mark.parametrize("make", [dense, conv])
def test_growth_changes_no_output_and_makes_room(make: type, caplog: pytest.LogCaptureFixture) -> None:
    net = make().train()
    x, y = batch(40)
    net(x)
    net.eval()
    with torch.no_grad():
        before, width = net(x), next(iter(net.equilibrium.dynamics.shapes.values()))[0]
    slots = len(net.context.count)
    with caplog.at_level(logging.INFO, logger="toreq.htsep"):
        record = grow(net, 2)
    assert "unfolded" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(net(x), before, rtol=0, atol=1e-6)
    assert next(iter(net.equilibrium.dynamics.shapes.values()))[0] == 2 * width
    assert (record["slots"], record["contexts"]) == (2 * slots, 1)
    assert net.context.growth == [record]
    found = gradient(net, x, y)
    rows = found[next(n for n in found if "inner" in n and n.endswith("weight"))]
    assert float(rows[:width].abs().max()) > 0
    assert float(rows[width:].abs().max()) == 0
    # a place on the new sheet opens new units alone
    with net.context.pinned(slots):
        gates = net.context.gates(x, "h1")
        assert float(gates[:, :width].max()) == 0 < float(gates[:, width:].mean())
        rows = gradient(net, x, y)[next(n for n in found if "inner" in n and n.endswith("weight"))]
        assert float(rows[:width].abs().max()) == 0 < float(rows[width:].abs().max())
    grow(net, 3)
    with torch.no_grad():
        torch.testing.assert_close(net(x), before, rtol=0, atol=1e-6)
    assert net.context.sheets == (2, 3)


def test_a_full_torus_says_so_and_growth_takes_the_next_context() -> None:
    torch.manual_seed(0)
    net = HTSEPDense(SHAPE, 4, hidden=(16,), torus=(2,)).train()
    orders = [torch.randperm(36, generator=torch.Generator().manual_seed(k)) for k in range(3)]

    def show(k: int) -> None:
        for step in range(12):
            net(permuted(32, 100 * k + step, orders[k]))

    show(0)
    show(1)
    assert (net.context.contexts, net.context.full) == (2, 0)
    other = copy.deepcopy(net)
    net.grow(2)
    show(2)
    assert (net.context.contexts, net.context.full) == (3, 0)
    assert bool((net.context.count[2:] > 0).any())
    other(permuted(32, 0, orders[2]))
    assert (other.context.contexts, other.context.full) == (2, 1)


def test_a_grown_network_is_made_again_from_its_config() -> None:
    torch.manual_seed(0)
    net = systems.create("htsep", SHAPE, 4, hidden=(8, 6), torus=(3,))
    assert isinstance(net, HTSEP)
    net.train()(batch()[0].float())
    net.grow(2)
    again = systems.from_config(net.config)
    again.load_state_dict(net.state_dict())
    x = batch()[0].float()
    assert torch.equal(again.eval()(x), net.eval()(x))


def test_growth_is_refused_beyond_the_limit_with_the_numbers() -> None:
    net = dense()
    held = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigError, match=r"at most 1000 bytes.*got \d+ with widths of 48, 24 and 18 slots"):
        grow(net, 2, limit=1000)
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in held.items())
    with pytest.raises(ConfigError, match="size >= 2, got 1"):
        grow(net, 1)
    with pytest.raises(ConfigError, match="with contexts"):
        grow(dense(gates="off"))
