"""The claims of TPEqProp about training: the trainer, sides that begin alike, steps, feedback, protocols of others."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from toreq.data import SequenceTask, sequence_task
from toreq.errors import CheckpointError, ConfigError, DivergenceError
from toreq.estimators import Implicit, Predictive
from toreq.evidence import BUDGETS, Trial, counting
from toreq.evidence.base import nets as shared
from toreq.evidence.protocols import continual as streams
from toreq.evidence.tpeqprop import accuracy, continual, depth, feedback, fitting, nets, robustness, sequences, thinking
from toreq.systems.tpeqprop_coding import PredictiveCoding
from toreq.training.interrupt import Interrupted

SMOKE = BUDGETS["smoke"]
DATA = shared.mnist(96, 40)
PLAN = fitting.Plan(3, 5e-3, 16, tests=2, save_every=0.0)


def _trial(side: str, scratch: Path | None = None) -> Trial:
    return Trial(SMOKE, side, 0, "cpu", Path("unused") if scratch is None else scratch)


# -- the trainer


def test_it_learns_counts_and_tests_where_it_says() -> None:
    net = nets.trained_by(nets.OWN, "mlp", 0, hidden=(32,))
    at = fitting.fit(net, DATA, replace(PLAN, epochs=6), seed=0)
    assert (at.step, at.steps, at.samples, at.diverged) == (36, 36, 576, "")
    assert [epoch for epoch, _ in at.curve] == [n / 2 for n in range(1, 13)]
    assert at.best > 40  # chance is 10
    assert at.epochs_to(at.best) == next(e for e, a in at.curve if a == at.best)
    assert at.epochs_to(101) is None


def test_an_interrupted_training_gives_the_numbers_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = nets.trained_by(nets.OWN, "mlp", 0, hidden=(16,))
    wanted = fitting.fit(whole, DATA, PLAN, seed=1, watch=lambda net: counting.parameters(net))
    step, count = fitting._step, 0

    def stops(*args: Any) -> str:
        nonlocal count
        count += 1
        if count == 8:
            raise Interrupted("now")
        return step(*args)

    net = nets.trained_by(nets.OWN, "mlp", 0, hidden=(16,))
    with monkeypatch.context() as patched:
        patched.setattr(fitting, "_step", stops)
        with pytest.raises(Interrupted):
            fitting.fit(net, DATA, PLAN, seed=1, scratch=tmp_path, watch=lambda net: counting.parameters(net))
    other = nets.trained_by(nets.OWN, "mlp", 7, hidden=(16,))
    found = fitting.fit(other, DATA, PLAN, seed=1, scratch=tmp_path, watch=lambda net: counting.parameters(net))
    assert found.resumed == 1
    assert (found.curve, found.marks, found.samples) == (wanted.curve, wanted.marks, wanted.samples)
    for a, b in zip(other.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="expected the training"):
        fitting.fit(other, DATA, replace(PLAN, rate=1e-3), seed=1, scratch=tmp_path)


def test_processor_time_limits_the_steps_before_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(fitting.time, "process_time", lambda: 0.5 * next(clock))
    net = nets.trained_by(nets.OWN, "mlp", 0, hidden=(8,))
    # a step takes one tick of half a second
    assert fitting.fit(net, DATA, replace(PLAN, seconds=3.6), seed=0).step == 7
    assert fitting.fit(net, DATA, replace(PLAN, seconds=1e6), seed=0).step == 18


def test_a_clocked_training_ends_with_its_time_though_steps_become_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, now, rates = iter(range(10_000)), [0.0], []

    def clock() -> float:
        # the first three steps take a second each, those after them two
        started, ended = divmod(next(ticks), 2)
        now[0] += (1.0 if started < 3 else 2.0) if ended else 0.0
        return now[0]

    monkeypatch.setattr(fitting.time, "process_time", clock)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]))
    net = nets.trained_by(nets.OWN, "mlp", 0, hidden=(8,))
    plan = replace(PLAN, seconds=8.0, clocked=True)
    assert fitting.fit(net, DATA, plan, seed=0).step == 6
    # after the first step, the cosine of the share of the time that is gone: 1, 2, 3, 5 and 7 of 8 seconds
    shares = [0.125, 0.25, 0.375, 0.625, 0.875]
    assert rates[1:] == pytest.approx([plan.rate * 0.5 * (1 + math.cos(math.pi * s)) for s in shares])
    assert fitting.fit(net, DATA, replace(plan, seconds=1e6), seed=0).step == 18
    with pytest.raises(ConfigError, match="expected seconds"):
        replace(PLAN, clocked=True)


def test_a_training_that_diverges_ends_and_says_so() -> None:
    class Runs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = torch.nn.Linear(784, 10), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls > 4:
                raise DivergenceError("away it runs")
            return self.inner(x.flatten(1))

    at = fitting.fit(Runs(), DATA, replace(PLAN, tests=1), seed=0)
    assert (at.step, at.diverged) == (4, "away it runs")
    assert at.curve[-1][1] == 0.0
    nan = nets.trained_by(nets.FORWARD, "mlp", 0, hidden=(8,))
    with torch.no_grad():
        next(nan.parameters()).fill_(torch.nan)
    assert "nan" in fitting.fit(nan, DATA, PLAN, seed=0).diverged


def test_held_out_images_are_training_images_not_trained_on() -> None:
    part = fitting.held_out(DATA, 0.25)
    assert (len(part.train_y), len(part.test_y)) == (72, 24)
    assert torch.equal(torch.cat([part.train_x, part.test_x]), DATA.train_x)


# -- T2 and T4


def test_a_deep_hopfield_network_of_many_layers_is_finite() -> None:
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert bool(torch.isfinite(depth.build(nets.CENTERED, 128, 8, 0)(x)).all())
    assert depth.gain(2) == depth.GAIN
    assert depth.gain(128) ** 127 == pytest.approx(depth.MOST_GAIN)


def test_a_depth_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    trial = _trial(nets.OWN, tmp_path)
    first = depth.run(trial)
    file = tmp_path / "levels-4.json"
    entry = json.loads(file.read_text())
    file.write_text(json.dumps({**entry, "accuracy": 99.0, "reached": 0.5, "diverged": ""}))
    again = depth.run(trial)
    assert again.metrics["accuracy, 4 levels"].value == 99.0
    assert again.metrics[depth.REACHED].value == 50.0
    assert again.metrics[depth.FAILED].value == 50.0
    assert again.metrics["accuracy, 2 levels"] == first.metrics["accuracy, 2 levels"]


@pytest.mark.parametrize(
    ("side", "estimator"),
    [(nets.OWN, Predictive), (nets.IMPLICIT, Implicit), (nets.CODING, PredictiveCoding), (nets.FORWARD, None)],
)
def test_sides_differ_by_their_gradient_alone(side: str, estimator: type | None) -> None:
    net = accuracy.build(side, accuracy.TASKS["mnist"], _trial(f"mnist {side}"))
    own = accuracy.build(nets.OWN, accuracy.TASKS["mnist"], _trial(f"mnist {nets.OWN}"))
    assert counting.parameters(net) == counting.parameters(own)
    if estimator is not None:
        assert isinstance(nets.layer(net).estimator, estimator)


# -- T6


@pytest.mark.parametrize("name", ["copy", "text"])
def test_a_chain_of_encoder_layers_begins_and_learns_as_backprop_does(name: str) -> None:
    made = sequences.task(name, _trial(f"{name} {nets.OWN}"))
    batch = made.batch(made.train, slice(0, 4))
    grads = []
    for how in (nets.OWN, nets.FORWARD, nets.IMPLICIT):
        model = sequences.build(how, made, 8, 3).train()
        model(batch.x).square().mean().backward()
        grads.append(sorted(float(p.grad.norm()) for p in model.parameters() if p.grad is not None))
    assert grads[0] == pytest.approx(grads[1], rel=1e-3, abs=1e-6)
    assert grads[2] == pytest.approx(grads[1], rel=1e-3, abs=1e-6)


def test_a_causal_block_sees_nothing_that_comes_later() -> None:
    torch.manual_seed(0)
    h = torch.randn(1, 6, 8)
    changed = h.clone()
    changed[0, 4:] = torch.randn(2, 8)  # a shift of all features would be lost in the layer norm
    for causal in (True, False):
        block = sequences.Block(8, causal).train()
        moved = (block(h) - block(changed)).abs().amax(2)[0] > 1e-6
        assert moved.tolist() == ([False] * 4 + [True] * 2 if causal else [True] * 6)


def test_text_has_no_side_without_an_energy() -> None:
    assert "text eqprop" not in sequences.SIDES
    assert {f"copy {how}" for how in sequences.HOW} < set(sequences.SIDES)


# -- T8


def test_a_limit_on_steps_is_kept_and_taken_back() -> None:
    net = thinking.image_net(nets.OWN, _trial(f"mnist {nets.OWN}"))
    x = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    solver = nets.layer(net).solver
    with thinking.limited(nets.layer(net), 2):
        assert thinking.steps_of(net, x).tolist() == [2.0] * 5
    assert nets.layer(net).solver is solver
    assert float(thinking.steps_of(net, x).min()) > 2


def test_the_unmasked_block_is_the_causal_one_at_the_last_position() -> None:
    torch.manual_seed(0)
    causal = thinking.CausalBlock(8, 2, 16)
    block = thinking.Block(8, 2, 16)
    block.load_state_dict(causal.state_dict())
    h, x = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    with torch.no_grad():
        a, b = causal.eval()(h, x), block.eval()(h, x)
    torch.testing.assert_close(a[:, -1], b[:, -1])
    assert not torch.allclose(a[:, 0], b[:, 0])


def test_a_loop_on_sequences_is_of_any_length() -> None:
    made = sequence_task("sort", train=8, test=4, length=3, longer=(2,), seed=0)
    model = thinking.sequence_net(nets.OWN, made, 8, 0).eval()
    assert isinstance(made, SequenceTask)
    with torch.no_grad():
        for part in (made.test, made.longer["2x"]):
            batch = made.batch(part, slice(None))
            assert model(batch.x).shape == (*batch.x.shape, 17)


def test_rank_correlation_is_spearmans() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(5, (40,), generator=g).double(), torch.randn(40, generator=g)
    wanted: Any = spearmanr(a.numpy(), b.numpy())
    assert thinking.rank_correlation(a, b) == pytest.approx(float(wanted[0]))
    assert thinking.rank_correlation(torch.ones(40), b) == 0.0


# -- T9


def test_fixed_ways_back_stay_and_learned_ones_move() -> None:
    for how, moves in ((feedback.LEARNED, True), (feedback.FIXED, False)):
        net = feedback.build(f"mlp {how}", _trial(f"mlp {how}"))
        before = {n: p.detach().clone() for n, p in net.named_parameters() if n.endswith(feedback.BACK)}
        assert before
        fitting.fit(net, DATA, replace(PLAN, decay=0.5), seed=0)
        after = dict(net.named_parameters())
        assert all(torch.equal(t, after[n]) != moves for n, t in before.items())
    assert feedback.angle(feedback.build("mlp exact", _trial("mlp exact"))) == 0.0


def test_a_learned_way_back_turns_towards_its_weight() -> None:
    net = feedback.build("mlp learned", _trial("mlp learned"))
    start = feedback.angle(net)
    fitting.fit(net, DATA, fitting.Plan(20, 1e-2, 16, decay=1.0), seed=0)
    assert feedback.angle(net) < start - 10


# -- T5 and T7


def test_sides_have_the_widths_of_those_they_are_compared_with() -> None:
    plain, chain, loop, base = (
        counting.parameters(robustness.make(side, 16, 0))
        for side in ("bp mlp", "tpeqprop chain", "tpeqprop loop", "eqprop mlp")
    )
    assert plain == chain == 784 * 16 + 16 + 16 * 10 + 10
    assert loop == chain + 16 * 16 + 16
    assert chain < base <= loop


def test_a_network_without_gradients_fails_the_checks_for_masking() -> None:
    class Steps(torch.nn.Module):
        """Right on what it was shown, with a gradient that is zero everywhere."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = robustness.make("bp mlp", 16, 0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).detach() + 0 * x.sum()

    size = robustness.SIZES["smoke"]
    x = DATA.inputs("test", slice(0, 6))
    net = Steps().eval()
    y = net(x).argmax(1)
    _, clean, checks = robustness.attacked(net, net.inner, x, y, size, 0)
    assert bool(clean.all())
    passed = {check.name: check.passes for check in checks}
    assert not passed["gradients do not vanish"]
    assert not passed["nothing survives the largest eps"]


def test_a_stream_is_the_one_of_the_protocol_and_tuned_values_reach_the_learner(tmp_path: Path) -> None:
    trial = _trial("tpeqprop ring", tmp_path)
    stream = streams.create("permuted", SMOKE, 0)
    slow = continual._learned(replace(trial, tuned={"learning_rate": 1e-12}), stream)
    assert slow.metrics["final accuracy"].value is not None
    # what learns nothing forgets nothing
    assert slow.metrics["forgetting"].value == pytest.approx(0.0)
    assert slow.cost.samples == stream.samples
