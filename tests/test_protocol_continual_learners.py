"""Learners of the continual-learning protocol, each against the formula that it claims to be."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from continual_data import images
from toreq import systems
from toreq.errors import ConfigError, DivergenceError
from toreq.evidence.protocols.continual import EWC, ClassMeans, ModuleLearner, OnlineEWC, RecursiveRidge, fisher
from toreq.evidence.protocols.continual.learner import operations
from toreq.evidence.protocols.continual.sides import Rows, perceptron

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return perceptron((36, 8, 10))


def batch(count: int = 12, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    data = images()
    return data.inputs("train", slice(start, start + count)), data.train_y[start : start + count]


def test_the_information_of_a_linear_classifier_is_its_closed_form() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 4).double()
    x = torch.randn(70, 5, dtype=torch.float64)
    found, p = fisher(linear, x), linear(x).detach().softmax(1)
    # E_c[(delta_ck - p_k)^2] = p_k (1 - p_k)
    spread = p * (1 - p)
    assert torch.allclose(found["weight"], spread.T @ x.square() / 70, rtol=1e-12)
    assert torch.allclose(found["bias"], spread.mean(0), rtol=1e-12)


def test_the_information_of_a_network_is_that_of_single_gradients() -> None:
    module, (x, _) = net(), batch(5)
    found = fisher(module, x)
    weight = module.get_parameter("1.weight")
    wanted = torch.zeros_like(weight)
    for one in x:
        log_p = module(one[None])[0].log_softmax(0)
        for label in range(10):
            (g,) = torch.autograd.grad(log_p[label], weight, retain_graph=True)
            wanted += log_p[label].exp().detach() * g.square() / 5
    assert torch.allclose(found["1.weight"], wanted, rtol=1e-4, atol=1e-8)


def test_ewc_descends_the_loss_with_one_penalty_for_each_task() -> None:
    learner = EWC(net(), SGD, strength=50.0, examples=8)
    kept = []
    for start in (0, 12):
        x, y = batch(12, start)
        learner.observe(x, y)
        kept.append((fisher(learner.module, x[-8:]), copy.deepcopy(dict(learner.module.named_parameters()))))
        learner.boundary()
    twin = copy.deepcopy(learner.module)
    x, y = batch(12, 24)
    penalty = sum(
        (information[n] * (p - held[n].detach()).square()).sum()
        for information, held in kept
        for n, p in twin.named_parameters()
    )
    loss = nn.functional.cross_entropy(twin(x), y) + 25.0 * penalty
    loss.backward()
    before = [p.detach().clone() for p in learner.module.parameters()]
    learner.observe(x, y)
    for p, old, q in zip(learner.module.parameters(), before, twin.parameters(), strict=True):
        assert q.grad is not None
        assert torch.allclose(p, old - 0.1 * q.grad, atol=1e-6)
    plain = ModuleLearner(copy.deepcopy(twin), SGD)
    plain.observe(x, y)
    assert not torch.allclose(next(plain.module.parameters()), next(learner.module.parameters()), atol=1e-6)


def test_ewc_keeps_the_latest_images_of_a_task_and_forgets_them_at_its_end() -> None:
    learner = EWC(net(), SGD, examples=8)
    learner.observe(*batch(6, 0))
    learner.observe(*batch(6, 6))
    assert learner._recent is not None
    assert torch.equal(learner._recent, batch(8, 4)[0])
    parameters = 36 * 8 + 8 + 8 * 10 + 10
    assert learner.memory() == 2 * parameters + 8 * 36
    learner.boundary()
    assert learner._recent is None
    assert learner.memory() == 2 * parameters


def test_online_ewc_decays_what_it_knows_and_moves_its_anchor() -> None:
    learner = OnlineEWC(net(), SGD, strength=5.0, examples=12, every=2, decay=0.5)
    assert not learner.boundaries
    for start in (0, 12):
        learner.observe(*batch(12, start))
    learner.boundary()  # it knows of none
    assert learner.consolidated == 1
    first = copy.deepcopy(learner._stiffness)
    assert torch.allclose(first["1.weight"], fisher(learner.module, batch(12, 12)[0])["1.weight"])
    for start in (0, 28):
        learner.observe(*batch(12, start))
    information = fisher(learner.module, batch(12, 28)[0])
    weights = dict(learner.module.named_parameters())
    for n, p in weights.items():
        assert torch.allclose(learner._stiffness[n], 0.5 * first[n] + information[n])
        # at the anchor itself nothing pulls
        assert torch.allclose(learner._pull[n], learner._stiffness[n] * p)


def test_ewc_refuses_what_it_cannot_differentiate() -> None:
    system = systems.create("toreqprop", (1, 6, 6), 10, hidden=(8,))
    with pytest.raises(ConfigError, match=r"feedforward\(\)"):
        EWC(system)
    with pytest.raises(ConfigError, match="examples >= 1"):
        EWC(net(), examples=0)
    with pytest.raises(ConfigError, match="every >= 1"):
        OnlineEWC(net(), every=0)


@pytest.mark.parametrize("penalty", [1e-3, 10.0])
def test_recursive_ridge_is_the_batch_solution_after_every_batch(penalty: float) -> None:
    data = images(120)
    x, y = data.inputs("train", slice(None)), data.train_y
    learner = RecursiveRidge(36, 10, 50, penalty=penalty, frequency=3.0, seed=4)
    seen = 0
    for size in (1, 7, 64, 48):  # fewer examples than features, then more
        learner.observe(x[seen : seen + size], y[seen : seen + size])
        seen += size
        phi = learner.features(x[:seen])
        target = nn.functional.one_hot(y[:seen], 10).double()
        gram = phi.T @ phi + penalty * torch.eye(51, dtype=torch.float64)
        wanted = torch.linalg.solve(gram, phi.T @ target)
        assert torch.allclose(learner.weights, wanted, rtol=1e-8, atol=1e-10)
    assert torch.equal(learner.predict(x), (learner.features(x) @ wanted).argmax(1))
    assert learner.parameters() == 51 * 10
    assert learner.memory() == 51 * 51 + 36 * 50 + 50


def test_recursive_ridge_does_not_care_for_the_order() -> None:
    data = images(100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    learners = []
    for index in (order, data.train_y.argsort()):
        learner = RecursiveRidge(36, 10, 40)
        for part in index.split(16):
            learner.observe(data.inputs("train", part), data.train_y[part])
        learners.append(learner)
    assert torch.allclose(learners[0].weights, learners[1].weights, rtol=1e-7, atol=1e-9)


def test_random_features_stand_for_a_gaussian_kernel() -> None:
    x = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    phi = RecursiveRidge(36, 10, 3000, frequency=4.0).features(x)[:, :-1]
    distance = torch.cdist(x.flatten(1).double(), x.flatten(1).double())
    wanted = torch.exp(-(distance.square()) * 16 / (2 * 36))
    assert torch.allclose(2 * phi @ phi.T / 3000, wanted, atol=0.08)


def test_class_means_answer_the_nearest_and_no_class_that_they_have_not_seen() -> None:
    data = images(60)
    x, y = data.inputs("train", slice(None)), data.train_y
    known = y < 7
    learner = ClassMeans(36, 10)
    for part in torch.nonzero(known).flatten().split(9):
        learner.observe(x[part], y[part])
    means = torch.stack([x[y == c].flatten(1).double().mean(0) for c in range(7)])
    wanted = torch.tensor([int((means - one.flatten().double()).norm(dim=1).argmin()) for one in x])
    assert torch.equal(learner.predict(x), wanted)
    # a far image has the empty class's mean, zero, as its nearest
    assert int(learner.predict(torch.zeros(1, 1, 6, 6))) < 7


def test_a_system_is_a_learner_in_one_line() -> None:
    data = images(100)
    torch.manual_seed(0)
    learner = ModuleLearner(
        systems.create("toreqprop", (1, 6, 6), 10, hidden=(16,)), functools.partial(torch.optim.Adam, lr=1e-2)
    )
    x, y = data.inputs("train", slice(None)), data.train_y
    before = learner.predict(x)
    for _ in range(6):
        for part in torch.arange(100).split(20):
            learner.observe(x[part], y[part])
    test_x, test_y = data.inputs("test", slice(None)), data.test_y
    assert float((learner.predict(test_x) == test_y).double().mean()) > 0.8
    assert float((before == y).double().mean()) < 0.5
    assert learner.flops > 0


def test_operations_memory_and_parameters_are_those_counted_by_hand() -> None:
    learner = ModuleLearner(net(), SGD)
    learner.observe(*batch(12))
    learner.observe(*batch(5))
    # forward and the weight's gradient; the second layer passes a gradient on as well
    per_example = 2 * (2 * 36 * 8 + 3 * 8 * 10)
    assert learner.flops == 17 * per_example
    assert learner.parameters() == 36 * 8 + 8 + 8 * 10 + 10
    assert learner.memory() == 0
    adam = ModuleLearner(net())
    adam.observe(*batch(12))
    assert adam.memory() == 2 * adam.parameters() + 4  # two moments, and the step of each tensor


def test_the_products_inside_a_recurrent_kernel_are_counted() -> None:
    torch.manual_seed(0)
    module = Rows(6, 9, 10)
    x, y = batch(12)
    before = torch.get_rng_state()
    found = operations(module, x, y)
    # per row: input and recurrent products, forward and twice backward (no gradient to the input)
    least = 12 * 6 * 2 * 4 * 9 * (2 * 6 + 3 * 9) * 0.8
    assert least < found < 1.5 * least
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.backends.mkldnn.enabled
    assert all(p.grad is None for p in module.parameters())


def test_an_lstm_reads_rows_from_top_to_bottom() -> None:
    torch.manual_seed(0)
    module, (x, _) = Rows(6, 9, 10), batch(3)
    state = None
    for row in range(6):
        _, state = module.recurrent(x[:, 0, row : row + 1], state)
    assert state is not None
    assert torch.allclose(module(x), module.head(state[0][0]), atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_learner() -> None:
    learner = ModuleLearner(net(), SGD)
    x, y = batch(4)
    with pytest.raises(DivergenceError, match="after 0 batches"):
        learner.observe(x * torch.inf, y)
