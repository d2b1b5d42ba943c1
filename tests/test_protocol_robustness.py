"""Robustness: attacks against closed forms, the input's gradient, masked gradients found, and the smoke runs."""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toreq import systems
from toreq.diagnostics.gradients import supported, tight_copy, with_estimator
from toreq.errors import ConfigError
from toreq.evidence.protocols.robustness import attacks, masking
from toreq.evidence.protocols.robustness.attacks import Attack

needs_foolbox = pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="the extra attacks")
NETS: dict[str, dict[str, Any]] = {
    "mlp": {"arch": "mlp", "hidden": (16,)},
    "gated": {"arch": "mlp", "hidden": (16,), "gated": True},
    "hopfield": {"arch": "hopfield", "hidden": (16, 8)},
    "conv": {"arch": "conv", "channels": (4, 6)},
    "transformer": {"arch": "transformer", "features": 8, "heads": 2, "hidden": 8, "patch": 14},
}


def _loss(net: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net(x), torch.arange(len(x)), reduction="sum")


def _input_gradient(net: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(net, leaf), leaf)
    return gradient


# -- the gradient that attacks climb


@pytest.mark.parametrize("name", list(NETS))
def test_the_input_gradient_of_an_attack_is_that_of_finite_differences(name: str) -> None:
    torch.manual_seed(0)
    net = systems.create("toreqprop", (1, 28, 28), 10, **NETS[name])
    # evaluation mode: while training, norm control follows the weights from call to call
    tight = attacks.attackable(tight_copy(net, 1e-11), estimator=_tight())
    generator = torch.Generator().manual_seed(1)
    x, along = (torch.rand(3, 1, 28, 28, generator=generator, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        step = 1e-5
        difference = float((_loss(tight, x + step * along) - _loss(tight, x - step * along)) / (2 * step))
    assert float((_input_gradient(tight, x) * along).sum()) == pytest.approx(difference, rel=1e-5)


def _tight() -> Any:
    from toreq.estimators import Implicit

    return Implicit(tolerance=1e-11, max_steps=20_000)


@pytest.mark.parametrize("name", list(NETS))
def test_every_estimator_gives_the_input_gradient_at_its_shipped_beta(name: str) -> None:
    torch.manual_seed(0)
    net = systems.create("toreqprop", (1, 28, 28), 10, **NETS[name]).double().eval()
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = _input_gradient(attacks.attackable(tight_copy(net, 1e-11), _tight()), x).flatten()
    found = {kind: _input_gradient(with_estimator(net, estimator), x).flatten() for kind, estimator in supported(net)}
    assert {"centered", "onesided", "implicit", "unrolled"} <= set(found)
    for kind, gradient in found.items():
        assert float(torch.cosine_similarity(gradient, exact, dim=0)) > 0.999, kind
        assert float(gradient.norm() / exact.norm()) == pytest.approx(1, abs=0.02), kind


def test_an_attack_leaves_the_network_as_it_is() -> None:
    net = systems.create("toreqprop", (1, 28, 28), 10, hidden=(16,))
    target = attacks.attackable(net)
    assert net.training
    assert not target.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(p.requires_grad for p in target.parameters())
    assert target.equilibrium.estimator.name == "implicit"  # type: ignore[union-attr]
    assert net.equilibrium.estimator.name == "centered"


# -- attacks against closed forms


class Linear(nn.Module):
    """Two classes, logits (0, w (x - 1/2)): an example falls exactly when eps exceeds its margin in the dual norm."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        score = (x.flatten(1) - 0.5) @ self.w
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.fixture
def linear() -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(16, generator=generator)
    # near the middle of [0, 1], so that the box never binds
    x = 0.5 + 0.1 * (torch.rand(60, 1, 4, 4, generator=generator) - 0.5)
    net = attacks.attackable(Linear(w))
    score = net(x)[:, 1]
    margins = {"linf": score.abs() / w.abs().sum(), "l2": score.abs() / w.norm()}
    return net, x, (score > 0).long(), margins


@needs_foolbox
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["fgsm", "pgd", "margin"])
def test_gradient_attacks_reach_the_margin_of_a_linear_net(kind: Any, norm: Any, linear: Any) -> None:
    net, x, y, margins = linear
    median = float(margins[norm].median())
    eps = tuple(median * factor for factor in (0.5, 1.0, 1.5))
    alive = attacks.survivors(net, Attack(kind, norm, eps, 40), x, y)
    for size, row in zip(eps, alive, strict=True):
        clear = (margins[norm] - size).abs() > 0.01 * size
        assert torch.equal(row[clear], (margins[norm] > size)[clear])
    assert 0 < int(alive[1].sum()) < len(x)


@needs_foolbox
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_hopskipjump_never_beats_the_margin_and_comes_near_it(norm: Any, linear: Any) -> None:
    net, x, y, margins = linear
    found = attacks.boundary_distance(net, Attack("hopskipjump", norm, (0.1,), 6, queries=60), x[:20], y[:20])
    exact = margins[norm][:20]
    assert bool((found >= exact * 0.999).all())
    assert float((found / exact).median()) < 2.0


@needs_foolbox
def test_an_example_that_is_wrong_already_has_not_survived(linear: Any) -> None:
    net, x, y, _ = linear
    wrong = y.clone()
    wrong[:10] = 1 - wrong[:10]
    for kind in ("pgd", "hopskipjump"):
        alive = attacks.survivors(net, Attack(kind, "linf", (1e-6,), 2, queries=4), x, wrong)
        assert not bool(alive[0, :10].any())
        assert bool(alive[0, 10:].all())


@needs_foolbox
def test_attacks_are_drawn_from_their_seed_and_leave_the_global_generator(linear: Any) -> None:
    net, x, y, _ = linear
    attack = Attack("pgd", "l2", (0.02,), 1)
    before = torch.get_rng_state()
    first = attacks.perturbed(net, attack, x, y, 0.02, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(attacks.perturbed(net, attack, x, y, 0.02, seed=3), first)
    assert not torch.equal(attacks.perturbed(net, attack, x, y, 0.02, seed=4), first)
    assert float((first - x).flatten(1).norm(dim=1).max()) <= 0.02 * (1 + 1e-4)


@needs_foolbox
def test_restarts_only_ever_find_more() -> None:
    torch.manual_seed(0)
    net = attacks.attackable(nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3)))
    x = torch.rand(80, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    y = net(x).argmax(1)
    once, often = (attacks.survivors(net, Attack("pgd", "linf", (0.04,), 2, n), x, y) for n in (1, 6))
    assert bool((once | ~often).all())
    assert int(often.sum()) <= int(once.sum())


def test_a_transferred_attack_is_none_on_a_net_that_reads_other_pixels() -> None:
    pytest.importorskip("foolbox")
    w = torch.zeros(16)
    w[:8] = 1.0
    net, other = attacks.attackable(Linear(w)), attacks.attackable(Linear(w.flip(0)))
    x = 0.5 + 0.1 * torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.ones(20, dtype=torch.int64)
    attack = Attack("pgd", "linf", (0.3,), 10)
    assert not bool(attacks.transferred(net, net, attack, x, y).any())
    # the surrogate's gradient is zero on the pixels that the net reads: only the random start moves those
    assert bool(attacks.transferred(net, other, Attack("pgd", "linf", (0.01,), 10), x, y).all())


def test_decisions_are_consistent_and_counted() -> None:
    class Flips(nn.Module):
        sign = 1.0

        def forward(self, x: Tensor) -> Tensor:
            self.sign = -self.sign
            return torch.stack([x.flatten(1).sum(1), torch.zeros(len(x))], 1) * self.sign

    labels = attacks.Decisions(Flips())
    x = torch.ones(3, 1, 2, 2)
    assert torch.equal(labels(x), labels(x))
    assert labels.queries == 6
    assert set(labels(x).flatten().tolist()) == {0.0, 1.0}


def test_settings_of_attacks_are_checked() -> None:
    for eps in ((), (0.0, 0.1), (0.2, 0.1)):
        with pytest.raises(ConfigError, match="growing eps"):
            Attack("pgd", "linf", eps)
    with pytest.raises(ConfigError, match="restarts"):
        Attack("pgd", "linf", (0.1,), restarts=0)


def test_without_foolbox_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"toreq\[attacks\]"):
        attacks.foolbox()


# -- masked gradients


class Stairs(nn.Module):
    """Rounds its input: right labels, no gradient (a defence that hides it)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.round(x * 8) / 8)


@needs_foolbox
def test_a_net_that_hides_its_gradient_is_found_out(linear: Any) -> None:
    net, _, _, _ = linear
    x = 0.5 + 0.4 * (torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(5)) - 0.5)
    hidden = Stairs(net)
    y = hidden(x).argmax(1)
    eps = (0.05, 0.1, 0.3)
    white = attacks.survivors(hidden, Attack("pgd", "linf", eps, 10), x, y)
    black = attacks.transferred(hidden, net, Attack("pgd", "linf", eps, 10), x, y)
    assert not masking.not_vanishing(attacks.vanishing(hidden, x, y)).passes
    assert not masking.at_least_as_strong("transfer", white, black).passes
    assert not masking.reaches_zero(white).passes
    # and the same net without the stairs passes
    y = net(x).argmax(1)
    white = attacks.survivors(net, Attack("pgd", "linf", eps, 10), x, y)
    assert masking.not_vanishing(attacks.vanishing(net, x, y)).passes
    assert masking.reaches_zero(white).passes
    assert masking.falls(white, torch.ones(60, dtype=torch.bool)).passes


@needs_foolbox
def test_a_saturated_cross_entropy_is_found_out_and_the_margin_loss_climbs_on(linear: Any) -> None:
    net, x, y, margins = linear
    sure = nn.Sequential(net, _Times(1e6)).eval()
    assert not masking.not_vanishing(attacks.vanishing(sure, x, y)).passes
    eps = (float(margins["linf"].max()) * 1.5,)
    blind, seeing = (attacks.survivors(sure, Attack(kind, "linf", eps, 10), x, y) for kind in ("pgd", "margin"))
    assert not bool(seeing.any())
    assert not masking.at_least_as_strong("margin", blind, seeing).passes


class _Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_signs_are_read_off_the_survivors() -> None:
    def rows(*alive: int) -> Tensor:
        return torch.stack([torch.arange(100) < n for n in alive])

    clean = rows(95)[0]
    assert masking.falls(rows(90, 50, 0), clean).passes
    assert masking.falls(rows(90, 50, 53), clean).value == pytest.approx(3)
    assert masking.falls(rows(97, 50, 0), clean).value == pytest.approx(2)
    assert masking.reaches_zero(rows(50, 1)).passes
    assert not masking.reaches_zero(rows(50, 2)).passes
    # on the images that both saw
    assert masking.at_least_as_strong("x", rows(50), rows(10)[:, :20]).value == pytest.approx(50)
    assert masking.more_steps({40: rows(30), 10: rows(40), 100: rows(33)}).value == pytest.approx(3)
    assert not masking.Check("x", math.nan, 1.0).passes
