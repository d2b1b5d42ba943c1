"""The equilibrium layer as an ordinary PyTorch module: losses, heads, optimizers, copies, stacks, bad input."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toreq
from oracles import EXACT, TIGHT, assert_close, assert_finite_differences, gradients, precise, quadratic
from toreq import Equilibrium
from toreq.core import Bilinear, Dense, Drive, Energy, Lateral, Node, Tanh
from toreq.errors import ConfigError
from toreq.estimators import Centered, Implicit, Unrolled
from toreq.solvers import Anderson, FixedPoint
from zoo import case, linear


def _net(seed: int = 0, estimator: Any = None, n_in: int = 4, dtype: torch.dtype = torch.float64) -> Equilibrium:
    g = torch.Generator().manual_seed(seed)
    energy = Energy(
        [Node("h", 8, Tanh()), Node("out", 5, Tanh())],
        [
            Drive("h", linear(n_in, 8, g)),
            Lateral(Dense(8, 8, symmetric=True, scale=0.1, generator=g), "h"),
            Bilinear(Dense(8, 5, scale=0.2, generator=g), "h", "out"),
        ],
    )
    return Equilibrium(energy.to(dtype), FixedPoint(tolerance=1e-6, max_steps=2000), estimator)


def _data(n: int = 6, n_in: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, n_in, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


class Classifier(nn.Module):
    """An equilibrium under an ordinary head."""

    def __init__(self, estimator: Any = None, seed: int = 0) -> None:
        super().__init__()
        self.body = _net(seed, estimator)
        self.head = nn.Sequential(linear(5, 7, torch.Generator().manual_seed(9)), nn.ReLU())
        self.last = linear(7, 3, torch.Generator().manual_seed(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(self.body(x)))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": nn.functional.cross_entropy,
    "sum": lambda out, y: nn.functional.cross_entropy(out, y, reduction="sum"),
    "mse": lambda out, y: nn.functional.mse_loss(out, nn.functional.one_hot(y, 3).to(out)),
    "margin": lambda out, y: nn.functional.multi_margin_loss(out, y),
    "contrast of examples": lambda out, y: (out @ out.T).logsumexp(1).mean() - out.pow(3).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_and_any_head(name: str) -> None:
    x, y = _data()

    def loss(out: Tensor) -> Tensor:
        return LOSSES[name](out, y)

    wanted = gradients(Classifier(Implicit(tolerance=1e-9)), x, loss)
    found = gradients(Classifier(precise(Centered())), x, loss)
    assert_close(found, wanted, rtol=1e-3)


def test_input_gradients_against_finite_differences() -> None:
    c, loss = case("tanh_layers"), quadratic()
    layer = c.layer(precise(Centered()))
    found = gradients(layer, c.x, loss)
    assert_finite_differences(layer, c.x, loss, {"x": found["x"], **found}, rtol=1e-4)
    # only the input needs a gradient
    for p in layer.parameters():
        p.requires_grad_(False)
        p.grad = None
    x = c.x.clone().requires_grad_()
    loss(layer(x)).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, found["x"], rtol=1e-9, atol=1e-10)
    assert all(p.grad is None for p in layer.parameters())


def test_several_read_outs() -> None:
    c, loss = case("tanh_layers"), quadratic()
    for names in (("out", "h1"), ("h2",), ("h1", "h2", "out")):
        layer = c.layer(precise(Centered()), readout=names)
        out = layer(c.x)
        assert list(out) == list(names)
        for n, t in out.items():
            torch.testing.assert_close(t, layer.solve(c.x).h[n])
        assert_close(gradients(layer, c.x, loss), gradients(c.layer(EXACT, readout=names), c.x, loss), rtol=1e-4)
    single = c.layer(EXACT, readout="h2")
    assert single(c.x).shape == (3, 5)


def test_a_loss_may_use_only_one_of_several_read_outs() -> None:
    c = case("tanh_layers")
    both, one = c.layer(precise(Centered()), readout=("h2", "out")), c.layer(EXACT, readout="out")
    found = gradients(both, c.x, lambda out: out["out"].square().sum())
    assert_close(found, gradients(one, c.x, lambda out: out.square().sum()), rtol=1e-4)


def test_solve_nudged_takes_one_cotangent_or_a_dictionary() -> None:
    c = case("tanh_layers")
    layer = c.layer(Centered(), readout=("out", "h1"))
    v = torch.ones(3, 3, dtype=torch.float64)
    a, b = layer.solve_nudged(c.x, v), layer.solve_nudged(c.x, {"out": v})
    assert torch.equal(a.h["out"], b.h["out"])
    assert a.h["out"].shape == (6, 3)
    free = layer.solve(c.x).h["out"]
    # a cost <v, h> is lower after the positive nudge
    assert bool(((a.h["out"][:3] - free) * v).sum(1).lt(0).all())
    assert bool(((a.h["out"][3:] - free) * v).sum(1).gt(0).all())


def test_gradient_accumulation_equals_the_joint_batch() -> None:
    x, y = _data(8)
    net = Classifier()
    nn.functional.cross_entropy(net(x), y).backward()
    joint = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    for part in (slice(0, 2), slice(2, 3), slice(3, 8)):
        n = len(y[part])
        (nn.functional.cross_entropy(net(x[part]), y[part]) * n / 8).backward()
    split = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(joint) == len(split) == len(list(net.parameters()))
    for a, b in zip(joint, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, 0.01),
        lambda p: torch.optim.AdamW(p, 0.01),
        lambda p: torch.optim.RMSprop(p, 0.003),
        lambda p: torch.optim.Adagrad(p, 0.02),
        lambda p: torch.optim.NAdam(p, 0.01),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam"],
)
def test_any_optimizer_with_clipping_learns_like_backprop(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    x, y = _data(16)
    losses: dict[str, list[float]] = {}
    for name, estimator in (("eqprop", None), ("implicit", Implicit())):
        net = Classifier(estimator)
        optimizer, losses[name] = make(net.parameters()), []
        for _ in range(12):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            assert float(nn.utils.clip_grad_norm_(net.parameters(), 0.5)) > 0
            optimizer.step()
            losses[name].append(float(loss.detach()))
    assert losses["eqprop"][-1] < losses["eqprop"][0] - 0.05
    # later on the two trainings part, since a small difference grows with the couplings
    first, second = (torch.tensor(losses[n][:5]) for n in ("eqprop", "implicit"))
    torch.testing.assert_close(first, second, rtol=5e-3, atol=1e-3)


def test_lbfgs_closure() -> None:
    x, y = _data(16)
    net = Classifier()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.3, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    first = float(closure().detach())
    optimizer.step(closure)
    assert float(closure().detach()) < first


class Stack(nn.Module):
    """Two equilibria with an ordinary layer between."""

    def __init__(self, estimator: Any) -> None:
        super().__init__()
        self.first = _net(0, estimator)
        self.between = nn.Sequential(linear(5, 4, torch.Generator().manual_seed(3)), nn.GELU())
        self.second = _net(1, estimator)
        self.first.solver = self.second.solver = FixedPoint(tolerance=1e-12, max_steps=500)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)) + 0.1 * x)


@pytest.mark.parametrize("reference", [EXACT, Unrolled(steps=200)], ids=["implicit", "unrolled"])
def test_layer_on_layer(reference: Any) -> None:
    x, _ = _data()
    loss = quadratic()
    wanted = gradients(Stack(reference), x, loss)
    net = Stack(precise(Centered()))
    found = gradients(net, x, loss)
    assert_close(found, wanted, rtol=1e-4)
    assert_finite_differences(net, x, loss, found, rtol=1e-4)


def test_one_layer_used_twice() -> None:
    x, _ = _data(n_in=5)
    loss = quadratic()

    class Twice(nn.Module):
        def __init__(self, estimator: Any) -> None:
            super().__init__()
            self.layer = _net(0, estimator, n_in=5)
            self.layer.solver = TIGHT

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.layer(x))

    assert_close(gradients(Twice(precise(Centered())), x, loss), gradients(Twice(EXACT), x, loss), rtol=1e-4)


def test_double_backward_is_refused_and_unrolled_supports_it() -> None:
    x, _ = _data()
    for estimator in (None, Implicit()):
        layer = _net(estimator=estimator)
        leaf = x.clone().requires_grad_()
        out = layer(leaf).square().sum()
        with pytest.raises(RuntimeError, match=r"single backward.*Unrolled"):
            torch.autograd.grad(out, leaf, create_graph=True)
    unrolled = _net(estimator=Unrolled(steps=60))

    def penalty(module: nn.Module, at: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_()
        (g,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
        return g.square().sum()

    weight = next(unrolled.parameters())
    (found,) = torch.autograd.grad(penalty(unrolled, x), weight)
    d, eps = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * eps * d)
        values.append(float(penalty(unrolled, x).detach()))
        with torch.no_grad():
            weight.sub_(sign * eps * d)
    assert float((found * d).sum()) == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5)


@pytest.mark.parametrize("solver", [FixedPoint(), Anderson(), Anderson(order="jacobi", length=3)])
@pytest.mark.parametrize("steps", [None, 40])
def test_unrolled_differentiates_any_solver(solver: Any, steps: int | None) -> None:
    c, loss = case("tanh_layers"), quadratic()
    tight = replace(solver, tolerance=1e-10, max_steps=400)
    layer = c.layer(Unrolled(steps=steps), tight)
    found = gradients(layer, c.x[1:], loss)
    assert_close(found, gradients(c.layer(), c.x[1:], loss), rtol=1e-4)


def test_backward_twice_needs_retain_graph() -> None:
    x, _ = _data()
    layer = _net()
    out = layer(x).square().sum()
    out.backward(retain_graph=True)
    first = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    out.backward()
    for g, p in zip(first, layer.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 2 * g)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_weights_changed_between_forward_and_backward_are_noticed() -> None:
    """Nudging another network than the one that settled would be silently wrong."""
    x, _ = _data()
    layer = _net()
    out = layer(x).sum()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_estimator_is_that_of_the_forward_pass() -> None:
    x, _ = _data()
    layer = _net(estimator=Centered())
    out = layer(x).square().sum()
    layer.estimator = Implicit()
    out.backward()
    assert layer.last.nudged is not None
    assert layer.last.nudged.asym is not None, "the forward pass was of Centered"


def test_cost_parameters_are_learnt_or_refused() -> None:
    """A cost with parameters of its own must not lose their gradient in silence."""
    x, y = _data()
    head = linear(5, 3, torch.Generator().manual_seed(3))
    layer = _net(estimator=Centered())

    def cost(out: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(head(out["out"]), y[: out["out"].shape[0]], reduction="none")

    try:
        layer.loss(x, cost).backward()
    except ConfigError:
        return
    assert head.weight.grad is not None
    nn_loss = nn.functional.cross_entropy(head(layer(x).detach()), y)
    (wanted,) = torch.autograd.grad(nn_loss, head.weight)
    torch.testing.assert_close(head.weight.grad, wanted)


def test_two_instances_do_not_interact() -> None:
    x, _ = _data()
    a, b = _net(0), _net(1)
    alone = gradients(a, x, quadratic())
    out_a, out_b = a(x), b(2 * x)
    quadratic()(out_b).backward()
    b(x)
    a.zero_grad()
    quadratic()(out_a).backward()
    for n, p in a.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, alone[n])


def test_a_layer_keeps_nothing_of_its_batch_alive() -> None:
    x, _ = _data()
    layer = _net()
    out = layer(x)
    probe = weakref.ref(out.grad_fn)  # type: ignore[arg-type]
    out.sum().backward()
    del out
    gc.collect()
    assert probe() is None


def test_equilibria_lists_them_in_order() -> None:
    net = Stack(None)
    assert toreq.equilibria(net) == [net.first, net.second]
    assert toreq.equilibria(net.first) == [net.first]
    assert toreq.equilibria(nn.Linear(2, 2)) == []


def test_representation_names_solver_and_estimator() -> None:
    text = repr(_net())
    assert "FixedPoint(" in text
    assert "Centered(" in text
    assert "readout=['out']" in text
