"""The claims of DiffTorEqProp: every one runs small and judges what it says; the pieces that can be wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import mannwhitneyu

from toreq import data
from toreq.errors import DataError
from toreq.estimators import Thermal
from toreq.evidence import BUDGETS, Claim, Outcome, Trial
from toreq.evidence.difftoreqprop import CLAIMS, features, generation, generators, memory, nets, noise, search
from toreq.evidence.difftoreqprop import uncertainty as learned
from toreq.evidence.difftoreqprop.features import DigitFeatures, Moments, digit_fid, frechet, shipped
from toreq.solvers import Langevin
from toreq.systems import Anneal, DiffTorEqProp, Seen

SMOKE = BUDGETS["smoke"]
EVERY = pytest.mark.parametrize("one", CLAIMS, ids=lambda c: c.id)


def _trial(side: str, scratch: Path | None = None) -> Trial:
    return Trial(SMOKE, side, 0, "cpu", Path("unused") if scratch is None else scratch)


@EVERY
def test_a_claim_is_complete(one: Claim) -> None:
    assert one.system == "difftoreqprop"
    assert one.sentence.endswith(".")
    assert len(one.protocol.split()) > 30
    assert one.seeds >= 3
    assert len({c.name for c in one.criteria}) == len(one.criteria)


# -- D1 and D2


@pytest.mark.parametrize(("kind", "count"), [("langevin", 1), ("langevin direct", 2)])
def test_the_method_is_sampled_and_sees_the_input_by_the_visible_node_alone(kind: str, count: int) -> None:
    net = noise.MAKERS[kind][1]("mlp", noise.SIZES["smoke"], _trial(noise.MLP))
    layer = nets.layer(net)
    assert isinstance(layer.solver, Langevin)
    assert isinstance(layer.estimator, Thermal)
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    one, other = layer.dynamics.bind(x), layer.dynamics.bind(x + 1)
    moved = [n for n, b in one.items() if any(not torch.equal(t, other[n].batched[k]) for k, t in b.batched.items())]
    assert len(moved) == count


def test_noise_is_put_on_training_images_alone() -> None:
    inner = torch.nn.Identity()
    net = noise.NoiseTrained(inner, 0.5)
    x = torch.zeros(4, 1, 28, 28)
    assert torch.equal(net.eval()(x), x)
    assert float(net.train()(x).std()) == pytest.approx(0.5, rel=0.05)


def test_noise_is_held_up_to_the_first_level_that_falls_below(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [(0.0, 99.0), (0.25, 95.0), (0.5, 85.0), (0.75, 91.0), (1.0, 50.0)]
    outcome = Outcome({}, {"unclipped": points})
    monkeypatch.setattr(noise, "measured", lambda side, trial, size: outcome)
    found = noise.run_curves(_trial(noise.MLP)).metrics
    assert found["largest sigma with 90%, unclipped"].value == 0.25
    assert found["largest sigma with 80%, unclipped"].value == 0.75


# -- D3


def test_evaluations_are_counted_until_the_energy_stays_below() -> None:
    energy = torch.tensor([[10.0, 10.0], [0.001, 5.0], [2.0, 4.0], [0.0, 3.0]])
    assert search.evaluations(energy, torch.zeros(2)).tolist() == [3.0, math.inf]
    assert search.evaluations(energy, torch.tensor([0.0, 3.0])).tolist() == [3.0, 3.0]


def test_the_contracting_net_contracts_and_the_other_remembers() -> None:
    size, g = search.SIZES["quick"], torch.Generator().manual_seed(0)
    start = torch.randn(8, size.units, generator=g)
    ends = {}
    for kind in (search.CONTRACTING, search.MULTISTABLE):
        energy = search.network(kind, size, torch.Generator().manual_seed(1))
        problem = search._problem(energy, start)
        a = search._plain(size, 0, kind).solve(problem, {"h": start}).h["h"]
        ends[kind] = (a - a[:1]).abs().max()
    assert ends[search.CONTRACTING] < 1e-3 < 0.5 < ends[search.MULTISTABLE]


def test_the_seeds_update_without_noise_and_pull_is_the_plain_relaxation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "NOISE", 0.0)
    monkeypatch.setattr(search, "PULL", 0.0)
    size, g = search.SIZES["smoke"], torch.Generator().manual_seed(0)
    energy = search.network(search.CONTRACTING, size, g)
    start = torch.randn(3, size.units, generator=g)
    a, b = (search.METHODS[side](energy, start, size, 0, search.CONTRACTING) for side in (search.LITERAL, search.OFF))
    torch.testing.assert_close(a[: len(b) - 1], b[:-1])  # at the end settled starts have left


# -- D4


def test_the_distance_of_two_gaussians_is_frechets() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(50, 5, generator=g, dtype=torch.float64) @ torch.randn(5, 5, generator=g).double() for _ in "ab"
    ]
    a, b = (Moments.of(part) for part in parts)
    product: Any = sqrtm((a.covariance @ b.covariance).numpy())
    wanted = float((a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace()) - 2 * float(
        np.trace(product).real
    )
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    shifted = Moments(a.mean + 2, a.covariance)
    assert frechet(a, shifted) == pytest.approx(5 * 4)


def test_the_shipped_features_know_digits() -> None:
    mnist = data.load("mnist")
    x, y = mnist.inputs("test", slice(0, 2000)), mnist.test_y[:2000]
    assert float((features.classes_found(x) == y).double().mean()) > 0.97
    reference = Moments.of(shipped().features(mnist.inputs("train", slice(0, 2000))))
    floor = digit_fid(x, reference)
    assert digit_fid(x.flip(2), reference) > 4 * floor
    assert digit_fid(x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), reference) > 2 * floor
    assert features.WEIGHTS.stat().st_size < 500_000


def test_weights_of_another_network_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "digits.safetensors"
    file.write_bytes(features.WEIGHTS.read_bytes()[:1000])
    for path in (file, tmp_path / "none"):
        monkeypatch.setattr(features, "WEIGHTS", path)
        with pytest.raises(DataError, match=r"digit_features\.py"):
            shipped.__wrapped__()
    assert sum(p.numel() for p in DigitFeatures().parameters()) == 114_314


def test_scores_are_ranked_as_by_mann_and_whitney() -> None:
    g = torch.Generator().manual_seed(0)
    inside, outside = torch.randint(6, (30,), generator=g), torch.randint(2, 9, (20,), generator=g)
    found: Any = mannwhitneyu(outside.numpy(), inside.numpy())
    assert generators.auroc(inside, outside) == pytest.approx(100 * float(found.statistic) / 600)
    assert generators.auroc(torch.zeros(3), torch.ones(3)) == 100


def test_the_plain_denoiser_begins_near_the_linear_filter_and_follows_its_class() -> None:
    torch.manual_seed(0)
    net = generators.PlainDenoiser(4, 6).eval()
    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        little = net.denoise(Seen(x, torch.full((3,), 0.01)))
        assert float((little - x).abs().max()) < 0.05  # of what a filter leaves of 0.01, in parts of 0.3
        much = torch.full((3,), 0.5)
        a, b = (net.denoise(Seen(x, much, torch.full((3,), k))) for k in (1, 2))
        assert not torch.allclose(a, b)


def test_an_autoencoder_learns_its_bound_and_draws_its_classes() -> None:
    torch.manual_seed(0)
    net = generators.VAE((4, 6), 8, 3)
    centres = (torch.rand(10, 1, 28, 28) > 0.5).float()
    y = torch.arange(40) % 10
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = net.criterion(net(centres[y]), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    drawn = net.sample(
        10, anneal=Anneal(), labels=torch.arange(10), batch=4, generator=torch.Generator().manual_seed(0)
    )
    assert drawn.shape == (10, 1, 28, 28)
    assert generators.evaluations(net, Anneal(levels=7)) == 1


def test_sides_that_are_compared_have_as_many_parameters() -> None:
    for budget in ("quick", "full"):
        size = generation.SIZES[budget]
        counts = {
            side: sum(p.numel() for p in generation.build(side, _trial(side), size).parameters())
            for side in (generation.OWN, generation.EQ, generation.PLAIN, generation.AUTO)
        }
        own = counts[generation.OWN]
        assert all(abs(n / own - 1) < 0.15 for n in counts.values()), counts


# -- D5


def test_a_ring_needs_a_batch_for_each_level_and_no_more_for_more_steps() -> None:
    net = memory._net(_trial(memory.RING))
    ring = [memory.sampled(net, memory.RING, levels, 0, 8) for levels in (4, 8)]
    alone = [memory.sampled(net, memory.ALONE, 4, n, 8) for n in (0, 4)]
    assert 1.6 < ring[1] / ring[0] < 2.2
    assert alone[1] / alone[0] < 1.3
    assert alone[0] < 0.6 * ring[0]


# -- D7


def test_the_energy_score_is_least_at_the_law_of_the_data() -> None:
    g = torch.Generator().manual_seed(0)
    seen = torch.randn(4000, 3, generator=g)

    def score(deviation: float) -> float:
        a, b = (deviation * torch.randn(4000, 3, generator=g) for _ in "ab")
        return float(learned.energy_score(a, b, seen))

    at = {s: score(s) for s in (0.5, 0.8, 1.0, 1.25, 2.0)}
    assert min(at, key=lambda s: at[s]) == 1.0


def test_the_spread_of_the_visible_node_is_that_of_its_noise() -> None:
    net = nets.build(0, hidden=(8,), noise=0.6, clamp=2.0)
    assert isinstance(net, DiffTorEqProp)
    with net.equilibrium.couplings_off():
        # kappa / (1 + kappa) of the deviation on the clamp
        assert learned.spread(net, torch.rand(4, 1, 28, 28), 64) == pytest.approx(0.4, rel=0.03)
