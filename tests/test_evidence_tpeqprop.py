"""The claims of TPEqProp: every one runs small and judges what it says; the pieces of T3 that can be wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from toreq.evidence import BUDGETS, Claim, Trial
from toreq.evidence.tpeqprop import CLAIMS, nets, phases, rule

SMOKE = BUDGETS["smoke"]
EVERY = pytest.mark.parametrize("one", CLAIMS, ids=lambda c: c.id)


@EVERY
def test_a_claim_is_complete(one: Claim) -> None:
    assert one.system == "tpeqprop"
    assert one.sentence.endswith(".")
    assert len(one.protocol.split()) > 30
    assert one.seeds >= 3
    assert not one.exclusive
    assert len({c.name for c in one.criteria}) == len(one.criteria)


@pytest.mark.parametrize("one", [c for c in CLAIMS if c.tuning is not None], ids=lambda c: c.id)
def test_an_objective_of_tuning_gives_a_number(one: Claim, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert one.tuning is not None
    for side, start in one.tuning.start.items():
        trial = Trial(SMOKE, side, 1, "cpu", tmp_path_factory.mktemp("tuning"))
        assert math.isfinite(one.tuning.objective(trial, start))


# -- the sides of all claims


@pytest.mark.parametrize("arch", list(nets.SMALL))
def test_all_sides_begin_with_the_same_weights(arch: str) -> None:
    sides = (nets.OWN, nets.FORWARD, nets.IMPLICIT, nets.CODING)
    made = {side: nets.trained_by(side, arch, 3, **nets.SMALL[arch]).eval() for side in sides}
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = made[nets.OWN](x)
        for side, net in made.items():
            torch.testing.assert_close(net(x), wanted, msg=side)


# -- T3


def _trial(side: str) -> Trial:
    return Trial(SMOKE, side, 0, "cpu", Path("unused"))


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(4, 1, 28, 28, generator=g, dtype=torch.float64), torch.tensor([1, 2, 3, 4])


def test_the_rule_is_backprop_on_a_chain_and_an_error_in_one_level_shows() -> None:
    net = rule.network("mlp", _trial("mlp")).double()
    x, y = _batch()
    phase = rule.nudged(net, x, y)
    layer = nets.layer(net)
    found = rule.of_errors(layer, phase)
    torch.manual_seed(0)
    twin = net.feedforward().double()  # pyright: ignore[reportCallIssue]
    loss = torch.nn.functional.cross_entropy(twin(x), y, reduction="sum")
    loss.backward()
    wanted = sorted(float(p.grad.norm()) for p in twin.parameters() if p.grad is not None)
    own = sorted(float(t.norm()) for t in found.values())
    # the twin's head has two more parameters
    assert all(any(math.isclose(a, b, rel_tol=1e-9) for b in wanted) for a in own)
    wrong = {n: t * (2.0 if n == "h2" else 1.0) for n, t in phase.eps.items()}
    assert rule.largest_error(phase.shipped, rule.of_errors(layer, replace(phase, eps=wrong))) > 0.4
    assert rule.largest_error(phase.shipped, found) < 1e-12


def test_the_literal_rule_has_the_second_term_that_the_gradient_has_not() -> None:
    net = rule.network("mlp", _trial("mlp")).double()
    x, y = _batch()
    phase = rule.nudged(net, x, y)
    layer = nets.layer(net)
    found, wanted = rule.literal(layer, phase), rule.of_errors(layer, phase)
    assert len(found) == 2
    below, top = found
    # no level is above the last one
    assert rule.largest_error({top: found[top]}, {top: wanted[top]}) < 1e-12
    eps, h = phase.eps["h3"] / phase.beta[:, None], phase.h["h2"]
    torch.testing.assert_close(found[below] - wanted[below], eps.T @ torch.tanh(h), rtol=1e-9, atol=1e-12)
    assert rule.cosine(found, wanted) < 0.999


def test_the_energys_gradient_is_not_the_update_where_the_states_have_not_moved() -> None:
    net = rule.network("mlp", _trial("mlp")).double()
    x, y = _batch()
    # at the shipped nudge h - f(h) is zero: the states are left where they are
    phase = rule.nudged(net, x, y)
    assert rule.largest_error(phase.shipped, rule.of_energy(nets.layer(net), phase)) > 0.9


# -- T1


def test_a_probe_counts_a_nudged_phase_for_each_sign() -> None:
    net = phases.build("tpeqprop, loop", SMOKE, 8, 0)
    x, y = phases.batch(8, 3, 0, "cpu")
    assert (phases.count(net, x, y).free, phases.count(net, x, y).nudged) == (1, 1)
    nets.layer(net).estimator = replace(nets.layer(net).estimator, two_sided=True)  # type: ignore[call-arg]
    assert phases.count(net, x, y).nudged == 2
    assert phases.count(phases.build("eqprop", SMOKE, 8, 0), x, y).nudged == 2
    forward = phases.count(phases.build("bp, chain", SMOKE, 8, 0), x, y)
    assert (forward.free, forward.nudged) == (0, 0)
    assert 0 < forward.kept <= forward.peak


def test_a_state_is_all_levels_and_backprop_keeps_more_of_them() -> None:
    x, y = phases.batch(8, 3, 0, "cpu")
    own, forward = (phases.build(side, SMOKE, 8, 0) for side in ("tpeqprop, chain", "bp, chain"))
    # two blocks: three levels of 8 tokens with 8 features
    assert phases.state_bytes(own, x) == phases.state_bytes(forward, x) == 4 * 3 * 3 * 8 * 8
    assert phases.count(own, x, y).kept < 0.5 * phases.count(forward, x, y).kept


def test_the_exponent_is_the_slope_on_logarithms() -> None:
    assert phases.exponent([(1.0, 9.0), (4.0, 3.0), (8.0, 12.0)]) == pytest.approx(2.0)


def test_examples_that_do_not_settle_are_found_and_the_others_do_without_them() -> None:
    net = rule.network("mlp", _trial("mlp")).double()
    x, y = _batch()
    large = rule.with_estimator(net, rule.LARGE)
    assert bool(rule.settled(large, x, y).all())
    hasty = rule.with_estimator(net, replace(rule.LARGE, max_steps=2))
    assert not bool(rule.settled(hasty, x, y).any())
    # what an example does has nothing to do with the others of its batch
    whole, part = rule.nudged(large, x, y), rule.nudged(large, x[:2], y[:2])
    for name, t in part.eps.items():
        torch.testing.assert_close(t, whole.eps[name][:2], rtol=1e-9, atol=1e-12)
