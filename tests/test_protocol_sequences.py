"""The models on sequences: state spaces against a loop, gradients at equilibrium, causality, padding, budgets."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from toreq import data
from toreq.data import Batch, Sequences, SequenceTask, text
from toreq.data import sequences as data_sequences
from toreq.errors import ConfigError
from toreq.estimators import Centered, Implicit, Predictive
from toreq.evidence import Trial, counting
from toreq.evidence.budgets import BUDGETS
from toreq.evidence.protocols import sequences
from toreq.evidence.protocols.sequences import models, parts, plans, scores
from toreq.evidence.protocols.sequences.ssm import DiagonalSSM
from toreq.solvers import Anderson


@functools.cache
def _task(name: str = "copy", **options: object) -> SequenceTask:
    defaults = {} if name.startswith("mnist") else {"seed": 0}
    return data.sequence_task(name, **{"train": 24, "test": 16, **defaults, **options})


def _causal() -> SequenceTask:
    """A small task in which every position has the target that follows: bits, each the opposite of the one before."""
    x = torch.arange(24)[:, None].add(torch.arange(8)).remainder(2).to(torch.uint8)
    part = Sequences(x, 1 - x)
    return SequenceTask("bits", "bits", part, part, classes=2, vocabulary=2, causal=True, metric="bits per character")


# --- the state-space model


def _by_loop(ssm: DiagonalSSM, u: Tensor) -> Tensor:
    """The recurrence as it is written, one step after the other."""
    rate = torch.complex(-ssm.log_decay.exp(), ssm.frequency)
    decay = torch.exp(ssm.log_step.exp()[:, None] * rate)
    enter = (decay - 1) / rate
    read = torch.view_as_complex(ssm.read)
    state = torch.zeros(len(u), *decay.shape, dtype=decay.dtype)
    out = []
    for t in range(u.shape[1]):
        state = decay * state + enter * u[:, t, :, None]
        out.append(2 * (read * state).sum(-1).real + ssm.skip * u[:, t])
    return torch.stack(out, 1)


@pytest.mark.parametrize("length", [1, 2, 37])
def test_the_convolution_is_the_recurrence(length: int):
    torch.manual_seed(0)
    ssm = DiagonalSSM(5, 4).double()
    u = torch.randn(3, length, 5, dtype=torch.float64)
    torch.testing.assert_close(ssm(u), _by_loop(ssm, u), atol=1e-11, rtol=1e-9)
    assert float(ssm.discrete()[0].abs().max().detach()) < 1


def test_the_gradient_of_the_convolution_is_that_of_the_recurrence():
    torch.manual_seed(1)
    ssm = DiagonalSSM(3, 2).double()
    u, v = torch.randn(2, 2, 11, 3, dtype=torch.float64)
    own = torch.autograd.grad((ssm(u) * v).sum(), list(ssm.parameters()))
    loop = torch.autograd.grad((_by_loop(ssm, u) * v).sum(), list(ssm.parameters()))
    for a, b in zip(own, loop, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


# --- the looped transformer


def _settled(task: SequenceTask, implicit: bool, strength: float = 1.0) -> models.Looped:
    """A small looped model in float64 that settles tightly; larger `strength`, stronger couplings."""
    torch.manual_seed(0)
    embed = parts.Embedding(task, 8, positioned=True)
    model = models.Looped(embed, 8, 2, 12, task.outputs, task.length, causal=task.causal, implicit=implicit).double()
    with torch.no_grad():
        for name, parameter in model.equilibrium.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                parameter.mul_(strength)
    layer = model.equilibrium
    layer.solver = Anderson(length=5, tolerance=1e-11, max_steps=2000)
    estimator = layer.estimator
    if isinstance(estimator, Centered):
        # its error is of second order in this
        estimator = replace(estimator, beta=1e-3)
    assert isinstance(estimator, Implicit | Centered | Predictive)
    layer.estimator = replace(estimator, tolerance=1e-11 if implicit else 1e-9)
    return model


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implicit", [False, True])
def test_gradients_of_the_looped_model_are_finite_differences_of_its_loss(causal: bool, implicit: bool):
    task = _causal() if causal else _task(length=2)
    model = _settled(task, implicit, strength=3.0)
    batch = task.batch(task.train, slice(0, 4))

    def loss() -> Tensor:
        return scores.loss(task, scores.read_out(model, task, batch), batch)

    model.eval()  # bounds on norms move in training steps
    loss().backward()
    drive = model.embed(batch.x).detach()
    assert model.equilibrium.radius(drive) > 0.3
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-5)
                ends.append(float(loss()))
                parameter.sub_(direction, alpha=sign * 1e-5)
        slope = (ends[0] - ends[1]) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-3, abs=2e-6), name


@pytest.mark.parametrize("causal", [False, True])
def test_the_looped_model_takes_any_length_with_the_same_weights(causal: bool):
    task = _causal() if causal else _task(length=2)
    model = _settled(task, implicit=True)
    longer = replace(task, train=Sequences(*(torch.cat([p, p], 1) for p in (task.train.x, task.train.y))))
    twin = _settled(longer, implicit=True)
    twin.load_state_dict(model.state_dict())
    x = longer.batch(longer.train, slice(0, 3)).x
    torch.testing.assert_close(model(x), twin(x), atol=1e-8, rtol=0)
    assert model.equilibrium.last.free is not None


def test_the_gradient_also_reaches_weights_through_another_length():
    task = _causal()
    model = _settled(task, implicit=True)
    x = task.batch(task.train, slice(0, 2)).x[:, :5]
    model(x).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in model.parameters())


# --- what all sides share


@pytest.mark.parametrize("side", models.SIDES)
def test_a_causal_model_does_not_see_what_comes_later(side: str):
    task = _causal()
    model = sequences.build(side, task, 1500, 0).double().eval()
    x = task.batch(task.train, slice(0, 3)).x
    other = x.clone()
    other[:, 5:] = 1 - other[:, 5:]
    with torch.no_grad():
        one, two = model(x), model(other)
    # a settled state is known to the solver's tolerance only, and Anderson mixes positions on the way
    tolerance = 0.05 if side.startswith("looped") else 1e-9
    assert float((one - two)[:, :5].abs().max()) < tolerance
    assert float((one - two)[:, 5:].abs().max()) > 4 * tolerance


@pytest.mark.parametrize("side", ["transformer", "looped-implicit", "looped-eqprop"])
def test_where_nothing_is_hidden_the_first_output_depends_on_the_last_input(side: str):
    task = _task("sort", length=3)
    model = sequences.build(side, task, 3000, 0).eval()
    x = task.batch(task.train, slice(0, 3)).x
    other = x.clone()
    other[:, 2] = other[:, 2] % 16 + 1
    with torch.no_grad():
        assert float((model(x) - model(other))[:, 0].abs().max()) > 1e-5


@pytest.mark.parametrize("side", models.SIDES)
@pytest.mark.parametrize("name", ["copy", "mnist-rows", "listops-small"])
def test_sides_have_the_parameters_asked_for_and_their_own_seed(side: str, name: str):
    task = _task(name)
    before = torch.get_rng_state()
    one, same, other = (sequences.build(side, task, 20_000, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert abs(counting.parameters(one) - 20_000) < 0.15 * 20_000
    first, second, third = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (one, same, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_an_unknown_side_or_task_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="'lstm'"):
        sequences.build("lsmt", _task(), 1000, 0)
    with pytest.raises(ConfigError, match="'copy'"):
        sequences.plan("copi", BUDGETS["smoke"])


@pytest.mark.parametrize("side", ["lstm", "gru", "transformer"])
def test_padding_changes_nothing(side: str):
    task = _task("listops-small")
    model = sequences.build(side, task, 3000, 0).eval()
    batch = task.batch(task.test, slice(0, 8))
    assert batch.lengths is not None
    wider = nn.functional.pad(batch.x, (0, 9))
    with torch.no_grad():
        one = scores.read_out(model, task, batch)
        two = scores.read_out(model, task, replace(batch, x=wider))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_positions_are_sines_and_cosines_of_any_length():
    long, short = parts.positions(50, 6), parts.positions(20, 6)
    assert torch.equal(long[:20], short)
    assert long.shape == (50, 6)
    torch.testing.assert_close(long[:, 0], torch.arange(50.0).sin(), atol=1e-5, rtol=0)
    torch.testing.assert_close(long[:, ::2] ** 2 + long[:, 1::2] ** 2, torch.ones(50, 3))
    assert parts.positions(4, 5).shape == (4, 5)


# --- scores


class _Fixed(nn.Module):
    """Puts out what it was given, whatever comes in."""

    def __init__(self, out: Tensor, pool: str = "mean") -> None:
        super().__init__()
        self.out, self.pool = out, pool

    def forward(self, x: Tensor) -> Tensor:
        return self.out[: len(x)]


def test_scores_count_what_the_mask_shows():
    x = torch.zeros(2, 3, dtype=torch.uint8)
    y = torch.tensor([[0, 1, 1], [1, 1, 0]], dtype=torch.uint8)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    part = Sequences(x, y, mask)
    task = SequenceTask("t", "t", part, part, classes=2, vocabulary=2)
    wrong_where_hidden = torch.tensor([[0, 1, 0], [0, 0, 0]])
    out = torch.stack([1.0 - wrong_where_hidden, wrong_where_hidden.float()], 2)
    score = scores.evaluate(_Fixed(out), task, part)
    assert score.metric == pytest.approx(75.0)
    assert score.whole == pytest.approx(50.0)
    p = torch.tensor([1.0, 0.0]).softmax(0)
    assert score.loss == pytest.approx(float(-(3 * p[0].log() + p[1].log()) / 4))


def test_bits_of_a_uniform_guess_are_the_logarithm_of_the_classes():
    part = Sequences(torch.zeros(300, 4, dtype=torch.uint8), torch.ones(300, 4, dtype=torch.uint8))
    task = SequenceTask("t", "t", part, part, classes=32, vocabulary=1, metric="bits per character")
    score = scores.evaluate(_Fixed(torch.zeros(300, 4, 32)), task, part)
    assert score.metric == pytest.approx(5.0)
    assert scores.reached(task, 4.9, 5.0)
    assert not scores.reached(task, 5.1, 5.0)


def test_numbers_count_within_the_tolerance():
    task = data.sequence_task("adding", train=2, test=4, length=4, longer=())
    y = task.batch(task.test, slice(None)).y
    near = (y + torch.tensor([0.0, 0.039, -0.041, 0.5])).unsqueeze(1)
    score = scores.evaluate(_Fixed(near), task, task.test)
    assert score.metric == pytest.approx(50.0)
    assert score.loss == pytest.approx((0.039**2 + 0.041**2 + 0.25) / 4, rel=1e-3)
    assert scores.reached(task, 50.0, 50.0)


def test_one_target_for_a_sequence_is_read_at_its_end_or_over_all_without_padding():
    task = _task("listops-small")
    batch = Batch(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), None, torch.tensor([2, 4]))
    out = torch.arange(2 * 4 * 10.0).reshape(2, 4, 10)
    assert torch.equal(scores.read_out(_Fixed(out, "last"), task, batch), torch.stack([out[0, 1], out[1, 3]]))
    assert torch.equal(scores.read_out(_Fixed(out), task, batch), torch.stack([out[0, :2].mean(0), out[1].mean(0)]))
    assert torch.equal(scores.read_out(_Fixed(out[:, 0]), task, batch), out[:, 0])
    with pytest.raises(ConfigError, match="read-out"):
        scores.read_out(_Fixed(out[..., :3]), task, batch)
    with pytest.raises(ConfigError, match="each position"):
        scores.read_out(_Fixed(out[:, 0]), _task(), _task().batch(_task().test, slice(0, 2)))


# --- operations


def test_operations_are_those_of_the_formulas():
    task = _task("mnist-rows")
    for side, gates in (("lstm", 4), ("gru", 3)):
        model = sequences.build(side, task, 5000, 0)
        assert isinstance(model, models.Recurrent)
        width, length = model.embed.width, 28
        products = 2 * (28 * width + gates * 2 * width * width + width * 10)
        # forward, and twice that backward; less the gradients of the input and of the first state
        least = length * (3 * products - 2 * 28 * width) - 2 * gates * width * width * 2
        found = sequences.flops_per_sample(model, task)
        assert least <= found <= 3 * length * products
    ssm = sequences.build("ssm", task, 5000, 0)
    assert isinstance(ssm, models.StateSpace)
    assert sequences.flops_per_sample(ssm, task) > 3 * ssm.uncounted_flops(28) > 0


# --- budgets


@pytest.mark.parametrize("side", models.SIDES)
def test_every_side_has_a_smoke_budget(side: str, tmp_path: Path):
    _smoke(side, "copy", tmp_path)


@pytest.mark.parametrize("task", sorted(set(plans.tasks()) - {"copy", "cifar10-pixels", "text", "listops"}))
def test_every_task_has_a_smoke_budget(task: str, tmp_path: Path):
    _smoke("looped-eqprop", task, tmp_path)


def test_text_has_a_smoke_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    symbols = torch.arange(2000).remainder(11)
    fake = text.Text(symbols[:1800], symbols[1800:], "abcdefghijk")
    monkeypatch.setattr(data_sequences, "load_text", lambda root: fake)
    _smoke("looped-eqprop", "text", tmp_path)


def _smoke(side: str, task: str, tmp_path: Path) -> None:
    outcome = sequences.side(side, Trial(BUDGETS["smoke"], side, 0, "cpu", tmp_path), task)
    metrics = outcome.metrics
    metric = next(iter(metrics))
    for name in (metric, "loss", "training time", "rate", "threshold"):
        value = metrics[name].value
        assert value is not None
        assert torch.isfinite(torch.tensor(value))
    assert [x for x, _ in outcome.curves[metric]] == [0, 4, 8]
    assert outcome.cost.samples == 8
    assert (outcome.cost.flops or 0) > 0
    assert abs((outcome.cost.parameters or 0) - plans.SMOKE_PARAMETERS) < 0.6 * plans.SMOKE_PARAMETERS
    if side.startswith("looped"):
        assert metrics["relaxations settled"].value == pytest.approx(100.0)
        assert metrics["radius"].value is not None
    if "longer" in plans.plan(task, BUDGETS["smoke"]).options:
        assert metrics[f"{metric}, 2x length"].value is not None


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("task", plans.tasks())
def test_plans_grow_with_the_budget(task: str, budget: str):
    plan = sequences.plan(task, BUDGETS[budget])
    smoke = sequences.plan(task, BUDGETS["smoke"])
    assert plan.recipe.steps >= smoke.recipe.steps
    assert plan.parameters >= smoke.parameters


def test_the_estimators_are_the_ones_that_the_names_say():
    for task in (_causal(), _task()):
        implicit, contrast = (sequences.build(f"looped-{n}", task, 1500, 0) for n in ("implicit", "eqprop"))
        assert isinstance(implicit, models.Looped)
        assert isinstance(contrast, models.Looped)
        assert isinstance(implicit.equilibrium.estimator, Implicit)
        assert type(contrast.equilibrium.estimator).__name__ == ("Predictive" if task.causal else "Centered")
        for a, b in zip(implicit.parameters(), contrast.parameters(), strict=True):
            assert torch.equal(a, b)
