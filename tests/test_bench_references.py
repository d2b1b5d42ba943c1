"""The references are what they claim: their gradients are those of backprop through the equilibrium, and they learn."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from toreq.bench.references import AutogradEP, DEQTrainer, LayeredNet, RedBlackEP, Trainer, conv, mlp
from toreq.errors import ConfigError

Build = Callable[[LayeredNet], AutogradEP | RedBlackEP]
# Small, since a unit that lies within beta of a kink of the hard sigmoid crosses it in the nudged phase.
BETA = 1e-4
NETS: dict[str, Callable[[], LayeredNet]] = {
    "mlp": lambda: mlp((1, 4, 4), (9, 7), 3),
    "conv": lambda: conv((1, 9, 9), (4, 5), 3, 2, 3),
}
TRAINERS: dict[str, Build] = {
    "autograd": lambda net: AutogradEP(net, 150, 60, beta=BETA, lr=1e-3),
    "red-black": lambda net: RedBlackEP(net, 80, 40, beta=BETA, lr=1e-3),
}


def problem(net: str) -> tuple[LayeredNet, Tensor, Tensor]:
    torch.manual_seed(1)
    made = NETS[net]().double()
    with torch.no_grad():
        # positive biases keep most units away from the flat parts of the hard sigmoid
        for layer in made.layers:
            layer.bias.fill_(0.2)  # type: ignore[operator, union-attr]
    return made, torch.rand(6, *made.input_shape, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])


def backprop_gradient(net: LayeredNet, x: Tensor, y: Tensor) -> Tensor:
    """The oracle: autograd through 150 synchronous steps of the plain iteration, written out here."""
    states = net.start(x)
    for _ in range(150):
        fields = []
        for i in range(len(states)):
            below, shape = (x if i == 0 else states[i - 1]), net.shapes[i]
            field = net.up(i, below)
            if i + 1 < len(states):
                # the transpose by autograd, not by the code under test
                probe = torch.zeros(len(x), *shape, dtype=x.dtype, requires_grad=True)
                image = net.up(i + 1, probe)
                (back,) = torch.autograd.grad(image, probe, states[i + 1], create_graph=True)
                field = field + back
            fields.append(field)
        states = [f.clamp(0, 1) for f in fields[:-1]] + fields[-1:]
    target = torch.nn.functional.one_hot(y, net.classes).to(x.dtype)
    cost = 0.5 * (states[-1] - target).square().sum(1).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(cost, list(net.parameters()))])


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", TRAINERS)
def test_gradient_is_that_of_backprop_through_the_equilibrium(net: str, kind: str) -> None:
    made, x, y = problem(net)
    want = backprop_gradient(made, x, y)
    TRAINERS[kind](made).gradient(x, y)
    got = torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])
    assert float(torch.cosine_similarity(got, want, dim=0)) > 0.999
    assert abs(float(got.norm() / want.norm()) - 1) < 0.01


@pytest.mark.parametrize("net", NETS)
def test_predictions_of_both_are_the_free_equilibrium(net: str) -> None:
    made, x, _ = problem(net)
    autograd, red_black = (build(made).predict(x) for build in TRAINERS.values())
    torch.testing.assert_close(autograd, red_black, rtol=1e-6, atol=1e-8)


def test_prediction_takes_the_same_steps_as_training() -> None:
    made, x, _ = problem("conv")
    trainer = AutogradEP(made, 3, 1, beta=0.5, lr=1e-3)
    start = [s.requires_grad_() for s in made.start(x)]
    torch.testing.assert_close(trainer.predict(x), trainer._relax(x, start, 3, None)[-1].detach())


def two_classes(count: int) -> tuple[Tensor, Tensor]:
    """Bright upper or lower halves."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 2
    x = 0.3 * torch.rand(count, 1, 4, 4, generator=generator)
    x[y == 0, :, :2] += 0.5
    x[y == 1, :, 2:] += 0.5
    return x, y


def sides() -> dict[str, Callable[[], Trainer]]:
    shape = (1, 4, 4)
    found: dict[str, Callable[[], Trainer]] = {
        "autograd": lambda: AutogradEP(mlp(shape, (16,), 2), 10, 5, beta=0.5, lr=1e-2),
        "red-black": lambda: RedBlackEP(mlp(shape, (16,), 2), 6, 4, beta=0.5, lr=1e-2),
    }
    if importlib.util.find_spec("torchdeq"):
        found["torchdeq"] = lambda: DEQTrainer(shape, 16, 2, lr=1e-2)
    return found


@pytest.mark.parametrize("name", ["autograd", "red-black", "torchdeq"])
def test_every_reference_learns_and_resumes_exactly(name: str) -> None:
    build = sides().get(name)
    if build is None:
        # an extra: the development environment has it, a bare install has not
        pytest.skip("torchdeq is not installed")
    x, y = two_classes(64)
    torch.manual_seed(0)
    trainer = build()
    for _ in range(20):
        trainer.step(x, y)
    saved = copy.deepcopy(trainer.state())
    for _ in range(20):
        trainer.step(x, y)
    assert float(trainer.predict(x).argmax(1).eq(y).float().mean()) > 0.95
    torch.manual_seed(1)
    again = build()
    again.restore(saved)
    for _ in range(20):
        again.step(x, y)
    for p, q in zip(trainer.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_layer_that_the_papers_do_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="LayeredNet: expected Linear or Conv2d layers"):
        LayeredNet([torch.nn.ReLU()], (3,))
