"""Claim B6: each parameter's update follows from the states of the nodes that its coupling joins, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import gradients, quadratic
from toreq import Equilibrium, systems, wrap
from toreq.core import Bilinear, Dense, Drive, Dynamics, Energy, Identity, Node, Tanh
from toreq.diagnostics import locality
from toreq.diagnostics.locality import Blind, NonLocalError, against_local, local_updates
from toreq.errors import ConfigError
from toreq.estimators import Centered, Implicit, NonConservative, OneSided, Predictive
from toreq.solvers import FixedPoint
from zoo import COUPLED, ENERGIES, case


def _check(dynamics: Dynamics, x: Tensor, estimator: Any, allowed: float, tolerance: float = 1e-6) -> None:
    """Shipped gradients of a quadratic loss against those of the local rule."""
    layer = Equilibrium(dynamics, FixedPoint(damping=0.5, max_steps=3000, tolerance=tolerance), estimator)
    shipped = {n: g for n, g in gradients(layer, x, quadratic()).items() if n != "x"}
    out = layer(x).detach().requires_grad_()
    (v,) = torch.autograd.grad(quadratic()(out), out)
    rows = locality.compare(shipped, local_updates(layer, x, v))
    for row in rows:
        assert row.error <= (0 if row.zero else allowed), f"{row.parameter}: error {row.error:.2e}"
    assert not all(row.zero for row in rows)


CASES = pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])


@CASES
@pytest.mark.parametrize("name", ENERGIES)
def test_centered_update_is_local(name: str, dtype: torch.dtype, allowed: float) -> None:
    c = case(name)
    _check(c.dynamics.to(dtype), c.x.to(dtype), Centered(), allowed)


@pytest.mark.parametrize("name", COUPLED)
def test_one_sided_update_is_local(name: str) -> None:
    c = case(name)
    # tightly settled: the estimator refines the free state before it nudges
    _check(c.dynamics, c.x, OneSided(), 1e-7, tolerance=1e-14)


@pytest.mark.parametrize("name", ["residual_loop", "residual_chain"])
def test_predictive_update_is_local(name: str) -> None:
    """``-(1/beta) eps^T df/dtheta``: the error of the predicted node and the state of its source."""
    c = case(name)
    _check(c.dynamics, c.x, Predictive(), 1e-12)


@pytest.mark.parametrize("name", [*COUPLED, "field_mlp", "field_layer_norm"])
def test_nonconservative_update_is_local(name: str) -> None:
    """``-(1/2 beta) <h+ - h-, df/dtheta(h0)>``: differences and free states of the nodes that are joined."""
    c = case(name)
    _check(c.dynamics, c.x, NonConservative(), 1e-10)


def _batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(3, 1, 14, 14, generator=g).to(dtype), torch.randint(3, (3,), generator=g)


@CASES
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("mlp", {"hidden": (9, 7), "gated": True}),
        ("hopfield", {"hidden": (9, 7)}),
        ("hopfield", {"hidden": (9,), "output": "node"}),
        ("conv", {"channels": (3, 4), "kernel": 3}),
        ("transformer", {"features": 8, "heads": 2, "hidden": 8, "patch": 7}),
    ],
)
def test_every_parameter_of_a_system_is_local(
    arch: str, options: dict[str, Any], dtype: torch.dtype, allowed: float
) -> None:
    torch.manual_seed(0)
    net = systems.create("toreqprop", (1, 14, 14), 3, arch=arch, **options).to(dtype)
    rows = against_local(net, *_batch(dtype))
    assert {row.parameter for row in rows} == {n for n, p in net.named_parameters() if p.requires_grad}
    assert max(row.error for row in rows) <= allowed
    assert sum(not row.zero for row in rows) > len(rows) / 2


class Wrapped(nn.Module):
    """A wrapped block with a read-out of its own."""

    def __init__(self) -> None:
        super().__init__()
        inside = nn.Linear(196, 6), nn.Tanh(), nn.Linear(6, 196)
        block = nn.Sequential(nn.Flatten(), *inside, nn.Unflatten(1, (1, 14, 14)))
        self.equilibrium = wrap(block, (1, 14, 14), inject="add")
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(196, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.equilibrium(x))


@CASES
def test_a_wrapped_block_is_local(dtype: torch.dtype, allowed: float) -> None:
    torch.manual_seed(0)
    rows = against_local(Wrapped().to(dtype), *_batch(dtype))
    assert max(row.error for row in rows) <= allowed
    assert not any(row.zero for row in rows)


def test_a_network_without_a_layer_or_an_estimator_without_a_rule_is_refused() -> None:
    x, y = _batch(torch.float32)
    with pytest.raises(ConfigError, match="one Equilibrium layer, got 0"):
        against_local(nn.Sequential(nn.Flatten(), nn.Linear(196, 3)), x, y)
    net = systems.create("toreqprop", (1, 14, 14), 3, estimator=Implicit(), hidden=(5,))
    with pytest.raises(ConfigError, match="got Implicit"):
        against_local(net, x, y)


class Spy(Bilinear):
    """A coupling whose value depends on a node that it does not join."""

    def value(self, h: Any, bound: Any) -> Tensor:
        return super().value(h, bound) + 0 * h["c"].sum(1)


def test_a_coupling_that_looks_at_another_node_is_noticed() -> None:
    nodes = [Node(n, 3, Tanh()) for n in "ab"] + [Node("c", 3, Identity())]
    energy = Energy(nodes, [Drive("a", nn.Linear(4, 3)), Spy(Dense(3, 3), "a", "b"), Bilinear(Dense(3, 3), "b", "c")])
    layer = Equilibrium(energy, FixedPoint(damping=0.5))
    with pytest.raises(NonLocalError, match="look at node 'c'"):
        local_updates(layer, torch.randn(2, 4), torch.randn(2, 3))


def test_the_oracle_notices_a_look_at_another_node() -> None:
    state = {"a": torch.zeros(1), "b": torch.zeros(1)}
    blind = Blind(state, ("a",))
    assert blind["a"] is state["a"]
    with pytest.raises(NonLocalError, match="look at node 'b'"):
        blind["b"]
