"""The equilibrium layer as an nn.Module: state_dict, copies, pickle, autocast, functional_call, inference."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import toreq
from oracles import assert_aligned, assert_close, gradients
from toreq import Equilibrium
from toreq.core import Bilinear, Dense, Drive, Energy, Lateral, Node, Tanh
from toreq.estimators import Centered, Implicit
from toreq.solvers import FixedPoint
from zoo import linear


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


def test_state_dict_round_trip() -> None:
    x, _ = _data()
    a, b = Classifier(seed=0), Classifier(seed=5)
    assert not torch.equal(a(x), b(x))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(a(x), b(x))


def test_deepcopy_is_independent() -> None:
    x, _ = _data()
    net = Classifier()
    net(x).sum().backward()
    twin = copy.deepcopy(net)
    assert net.body.last.free is not None
    assert twin.body.last.free is None
    before = net(x).detach().clone()
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    assert torch.equal(net(x), before)
    assert not torch.equal(twin(x), before)
    twin.body.estimator = Implicit()
    assert isinstance(net.body.estimator, Centered)


def test_pickle_leaves_the_statistics_behind() -> None:
    x, _ = _data()
    layer = _net()
    layer(x).sum().backward()
    assert layer.last.free is not None
    assert layer.last.nudged is not None
    again = pickle.loads(pickle.dumps(layer))
    assert again.last.free is None
    assert again.last.nudged is None
    assert torch.equal(again(x), layer(x))
    assert again.estimator == layer.estimator
    assert again.solver == layer.solver
    assert layer.last.free is not None, "pickling must not change the layer itself"


def test_statistics_are_detached_and_complete() -> None:
    x, _ = _data()
    layer = _net()
    assert layer.last.free is None
    out = layer(x)
    free = layer.last.free
    assert free is not None
    assert layer.last.nudged is None
    assert free.steps.shape == free.residual.shape == free.converged.shape == (6,)
    assert free.steps.dtype == torch.int64
    assert free.converged.dtype == torch.bool
    out.sum().backward()
    nudged = layer.last.nudged
    assert nudged is not None
    for t in (nudged.steps, nudged.residual, nudged.converged, nudged.asym, nudged.beta, nudged.response):
        assert t is not None
        assert t.shape == (6,)
        assert not t.requires_grad
    assert bool(nudged.converged.all())


def test_autocast_runs_and_stays_close() -> None:
    x, y = _data(16)
    wanted = gradients(Classifier().float(), x.float(), lambda out: nn.functional.cross_entropy(out, y))
    net = Classifier().float()
    leaf = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(leaf)
        loss = nn.functional.cross_entropy(out.float(), y)
    loss.backward()
    found = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert leaf.grad is not None
    assert_aligned({**found, "x": leaf.grad}, wanted, least=0.99, ratio=0.1)
    assert net.body.last.nudged is not None
    assert bool(net.body.last.nudged.converged.all()), "the contrast needs more digits than bfloat16 has"


def test_bfloat16_weights_run() -> None:
    layer = _net().bfloat16()
    x, _ = _data()
    out = layer(x.bfloat16())
    assert bool(torch.isfinite(out).all())
    out.float().square().sum().backward()
    for p in layer.parameters():
        assert p.grad is not None
        assert p.grad.dtype == torch.bfloat16
        assert bool(torch.isfinite(p.grad).all())


def test_functional_call() -> None:
    x, _ = _data()
    layer, other = _net(0), _net(7)
    params = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    out = functional_call(layer, params, (x,))
    torch.testing.assert_close(out, other(x))
    out.square().sum().backward()
    other(x).square().sum().backward()
    for n, p in other.named_parameters():
        torch.testing.assert_close(params[n].grad, p.grad)
    assert all(p.grad is None for p in layer.parameters())


def test_inference_stores_no_graph() -> None:
    x, _ = _data()
    layer = _net()
    with_graph = layer(x)
    with torch.no_grad():
        out = layer(x)
    assert not out.requires_grad
    torch.testing.assert_close(out, with_graph)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), out)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    solution = _net().solve(x)
    assert not any(t.requires_grad for t in [*solution.state.values(), *solution.h.values()])


def test_outputs_may_be_overwritten_before_backward() -> None:
    x, _ = _data()
    layer = _net()
    wanted = gradients(layer, x, lambda out: (2 * out).sum())
    found = gradients(layer, x, lambda out: out.mul_(2).sum())
    assert_close(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("arch", toreq.systems.architectures("toreqprop"))
def test_shipped_systems_pickle(arch: str) -> None:
    """Their couplings are parametrized by norm control, which torch alone refuses to pickle."""
    torch.manual_seed(0)
    net = toreq.systems.create("toreqprop", (1, 28, 28), 10, arch=arch, gated=True).eval()
    copied = pickle.loads(pickle.dumps(net))
    x = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(net(x), copied(x))
    copied.train()
    copied.criterion(copied(x), torch.arange(2)).backward()
    assert all(p.grad is not None for p in copied.parameters())
