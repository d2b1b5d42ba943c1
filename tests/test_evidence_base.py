"""The base claims: their smoke budgets, the pieces of their protocols that can be wrong, and resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from toreq import systems
from toreq.core.state import detached, norm
from toreq.errors import ConfigError, ToreqError
from toreq.estimators import Implicit, OneSided
from toreq.evidence import BUDGETS, Claim, Outcome, Trial, claim, claims, counting, judge
from toreq.evidence.base import accuracy, memory, nets, nudges, settling
from toreq.evidence.budgets import find
from toreq.solvers import Fading, FixedPoint, Relaxation

SMOKE = BUDGETS["smoke"]
CLAIMS = pytest.mark.parametrize("one", claims(), ids=lambda c: c.id)


@CLAIMS
def test_a_smoke_run_gives_finite_numbers_of_the_right_shape(
    one: Claim, smoke: Callable[[Claim], dict[tuple[str, int], Outcome]]
) -> None:
    outcomes = smoke(one)
    for outcome in outcomes.values():
        assert outcome.metrics
        for name, quantity in outcome.metrics.items():
            assert quantity.value is None or math.isfinite(quantity.value), name
        for name, points in outcome.curves.items():
            assert len(points) > 0, name
            assert [x for x, _ in points] == sorted(x for x, _ in points)
        assert Outcome.from_json(outcome.to_json()) == outcome
    # every curve and metric that the picture wants is there on some side
    for name in one.picture.curves:
        assert any(name in outcome.curves for outcome in outcomes.values())
    drawn = {name for outcome in outcomes.values() for name in outcome.metrics}
    # a smoke run's pyramids have two levels
    missing = {"M6": {"smallest cosine, level 3, trained"}}.get(one.id, set())
    assert set(one.picture.metrics) - drawn <= missing


@CLAIMS
def test_a_smoke_run_reaches_every_criterion_but_settles_nothing(
    one: Claim, smoke: Callable[[Claim], dict[tuple[str, int], Outcome]]
) -> None:
    found = judge(one, smoke(one), SMOKE)
    assert found.verdict == "not settled"
    # a smoke run measures the memory of the mlp (of pyramids, dense ones) alone, and takes no finite differences
    larger = {
        "B1": {"finite differences"},
        "B3": {"conv", "transformer"},
        "M6": {"finite differences"},
        "M8": {"conv:", "sequence:"},
        "S6": {"finite differences"},
    }.get(one.id, set())
    for finding in found.findings:
        assert finding.mean is not None or any(word in finding.name for word in larger), finding.name
    assert not any("print" in reason for reason in found.reasons)


@CLAIMS
def test_a_claim_is_complete(one: Claim) -> None:
    assert one.sentence.endswith(".")
    assert len(one.protocol.split()) > 30
    # a dear network may have one seed, if the protocol says so
    assert one.seeds >= 3 or "One seed" in " ".join(one.protocol.split())
    assert one.exclusive == (one.id in ("B3", "H7", "S1", "S2"))
    assert len({c.name for c in one.criteria}) == len(one.criteria)


def test_gradients_and_locality_cover_every_registered_architecture() -> None:
    registered = {f"{name} {arch}" for name in systems.names() for arch in systems.architectures(name)}
    for name in ("B1", "B6"):
        assert registered < set(claim(name).sides)
        assert registered < {criterion.side for criterion in claim(name).criteria}


def test_gradients_and_locality_are_right_already_in_small(
    smoke: Callable[[Claim], dict[tuple[str, int], Outcome]],
) -> None:
    for outcome in smoke(claim("B1")).values():
        cosines = {n: q.value or 0 for n, q in outcome.metrics.items() if n.startswith("smallest cosine, ")}
        assert cosines
        assert min(cosines.values()) > 0.999
    for outcome in smoke(claim("B6")).values():
        assert (outcome.metrics["largest error, float64"].value or 0) < 1e-12
        assert (outcome.metrics["parameters examined, float64"].value or 0) >= 4


def test_an_estimator_with_too_large_a_nudge_fails_the_gradient_claim(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("toreq.diagnostics.gradients.supported", lambda net: [("onesided", OneSided(beta=0.5))])
    outcome = claim("B1").run(Trial(SMOKE, "toreqprop mlp", 0, "cpu", tmp_path))
    assert (outcome.metrics["smallest cosine"].value or 1) < 0.999


# -- settling


def _measured(solver: FixedPoint, eigenvalue: float) -> float:
    """The factor by which a residual shrinks in a sweep, on one eigenvalue of a quadratic energy."""
    from toreq.bench import settling as quadratic

    energy, x = quadratic.quadratic("lateral", (eigenvalue, eigenvalue), 4, 2, 0)
    bindings = detached(energy.bind(x))
    start = energy.initial(bindings)
    sizes = []
    for steps in (14, 28):
        fixed = FixedPoint(damping=solver.damping, torus=solver.torus, max_steps=steps, tolerance=0.0)
        end = fixed.solve(Relaxation(energy, bindings), start).state
        exact = x / (1 - eigenvalue)
        sizes.append(float(norm({n: t - exact for n, t in end.items()}).mean()))
    return (sizes[1] / sizes[0]) ** (1 / 14)


@pytest.mark.parametrize("eigenvalue", [-0.9, 0.6, 0.9])
@pytest.mark.parametrize(("damping", "alpha"), [(1.0, 0.4), (0.7, 0.9)])
def test_the_rate_by_which_fading_is_tuned_is_the_one_it_has(eigenvalue: float, damping: float, alpha: float) -> None:
    solver = FixedPoint(damping=damping, torus=Fading(alpha=alpha, length=settling.RING, decay=settling.DECAY))
    wanted = settling.fading_rate(damping, alpha, eigenvalue)
    assert _measured(solver, eigenvalue) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("eigenvalue", [-0.9, 0.9])
def test_the_rate_by_which_heavy_ball_is_tuned_is_the_one_it_has(eigenvalue: float) -> None:
    # two real roots, or the pace is no steady one
    damping, alpha = 0.9, 0.02
    solver = FixedPoint(damping=damping, torus=Fading(alpha=-alpha, length=1))
    assert _measured(solver, eigenvalue) == pytest.approx(settling.ball_rate(damping, alpha, eigenvalue), rel=0.02)


def test_momentum_and_anderson_save_steps_and_the_ablation_none(tmp_path: Path) -> None:
    saved = {
        side: claim("B4").run(Trial(SMOKE, side, 0, "cpu", tmp_path)).metrics["steps saved at the worst radius"].value
        for side in settling.SIDES
    }
    assert saved[settling.OFF] == 0
    assert (saved["heavy ball"] or 0) > 20
    assert (saved["anderson"] or 0) > 20


# -- the other protocols


def test_of_equally_good_betas_the_one_nearest_to_the_claim_is_taken() -> None:
    assert nudges.best([(0.01, 90.0), (0.1, 95.0), (0.3, 95.0), (5.0, 95.0)]) == 0.3
    assert nudges.best([(0.01, None), (0.1, 1.0)]) == 0.1
    assert nudges.best([(0.01, None)]) is None
    low, high = nudges.WITHIN
    assert sum(low <= beta <= high for beta in nudges.ABSOLUTE) >= 3
    assert nudges.CLAIMED in nudges.ABSOLUTE
    assert nudges.CLAIMED in nudges.RELATIVE


def test_a_summed_loss_leaves_the_update_as_it_is() -> None:
    data = nets.mnist(16, 10)
    weights = []
    for summed in (False, True):
        net = nets.build("toreqprop mlp", SMOKE, 0, "cpu", estimator=Implicit(tolerance=1e-6))
        assert nets.fit(net, data, 3, batch=8, rate=1e-2, seed=0, summed=summed) == 24
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=2e-4)


def test_unrolling_grows_and_the_twin_knows_no_steps() -> None:
    data = nets.mnist(32, 1)
    x, y = data.inputs("train", slice(None)), data.train_y
    net = nets.build("toreqprop mlp", SMOKE, 0, "cpu", hidden=(32,))
    peaks = {side: memory._peaks(side, net, x, y, (5, 100)) for side in ("eqprop", "unrolled", "bp-ff")}
    growth = {side: points[1][1] / points[0][1] for side, points in peaks.items()}
    assert growth["unrolled"] > 1.5
    assert growth["eqprop"] < 1.02
    assert growth["bp-ff"] == 1


def test_an_interrupted_training_goes_on_at_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(SMOKE, "mlp eqprop", 0, "cpu", tmp_path / "broken")
    whole = accuracy.run(Trial(SMOKE, "mlp eqprop", 0, "cpu", tmp_path / "whole"))
    from toreq.training import session

    steps = iter(range(100))
    check = session.Session.check

    def stops(self: session.Session) -> dict[str, float]:
        if next(steps) == 2:  # after the first checkpoint, in the middle of the epoch
            raise KeyboardInterrupt
        return check(self)

    monkeypatch.setattr(session.Session, "check", stops)
    with pytest.raises((ToreqError, KeyboardInterrupt), match="kept"):
        accuracy.run(trial)
    monkeypatch.setattr(session.Session, "check", check)
    resumed = accuracy.run(trial)
    assert resumed.notes == ("continued from a checkpoint",)
    assert resumed.metrics["accuracy"] == whole.metrics["accuracy"]
    assert resumed.metrics["radius"].value == pytest.approx(whole.metrics["radius"].value, rel=1e-5)


def test_operations_are_counted_by_hand() -> None:
    layer = torch.nn.Linear(10, 20, bias=False)
    x = torch.randn(4, 10, requires_grad=True)
    product = 2 * 4 * 10 * 20
    assert counting.flops(lambda: layer(x)) == product
    # backward: one product for the weight, one for the input
    assert counting.flops(lambda: layer(x).sum().backward()) == 3 * product
    assert counting.parameters(layer) == 200


def test_budgets() -> None:
    assert find("quick").pick(1, 2, 3) == 2
    assert [b.conclusive for b in BUDGETS.values()] == [False, True, True]
    with pytest.raises(ConfigError, match="did you mean 'smoke'"):
        find("smok")
