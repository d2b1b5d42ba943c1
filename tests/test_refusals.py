"""What the systems refuse, and that the message says what was wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import toreq
from toreq.core import Bilinear, Dense, Drive, Energy, Node, Tanh
from toreq.errors import ConfigError
from toreq.options import check_types


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"hidden": "abc"}, "hidden of type"),
        ({"gated": "maybe"}, "gated of type bool"),
        ({"arch": "transformer", "norm_bound": -1.0}, "norm_bound"),
        ({"arch": "transformer", "patch": 0}, "patch"),
        ({"arch": "transformer", "vocabulary": -3}, "vocabulary"),
        ({"arch": "conv", "padding": -1}, "padding"),
        ({"arch": "hopfield", "gain": -1.0}, "gain"),
        ({"arch": "mpl"}, "'mlp'"),
        ({"hiden": (3,)}, "'hidden'"),
    ],
)
def test_options(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        toreq.systems.create("toreqprop", (1, 28, 28), 10, **options)


def test_one_width_may_be_a_number() -> None:
    net = toreq.systems.create("toreqprop", (1, 6, 6), 3, hidden=5)
    assert net(torch.rand(2, 1, 6, 6)).shape == (2, 3)


@pytest.mark.parametrize("make", [toreq.solvers.FixedPoint, toreq.solvers.Anderson])
def test_solver_types(make: Any) -> None:
    # a TypeError where annotations are checked at run time
    with pytest.raises((ConfigError, TypeError), match="max_steps"):
        make(max_steps=10.5)


def test_option_types_are_checked_without_annotations_at_run_time_too() -> None:
    annotations = {"steps": "int", "rate": "float | None", "sizes": "Sequence[int]", "on": "bool", "other": "Tensor"}
    check_types("here", {"steps": 3, "rate": None, "sizes": (1, 2), "on": True, "other": "anything"}, annotations)
    for name, value in {"steps": 1.5, "rate": "fast", "sizes": (1, "2"), "on": 1}.items():
        with pytest.raises(ConfigError, match=f"here: expected {name} of type"):
            check_types("here", {name: value}, annotations)


def test_labels_and_inputs() -> None:
    net = toreq.systems.create("toreqprop", (1, 6, 6), 3, hidden=5)
    x = torch.rand(2, 1, 6, 6)
    with pytest.raises(ConfigError, match=r"labels in \[0, 3\), got 0 to 3"):
        net.criterion(net(x), torch.tensor([0, 3]))
    with pytest.raises(ConfigError, match="int64 labels"):
        net.criterion(net(x), torch.tensor([0.0, 1.0]))
    with pytest.raises(ConfigError, match=r"float32.*float64"):
        net(x.double())
    symbols = toreq.systems.create(
        "toreqprop", (4,), 3, arch="transformer", vocabulary=5, features=8, heads=2, hidden=8
    )
    with pytest.raises(ConfigError, match=r"symbols in \[0, 5\)"):
        symbols(torch.tensor([[0, 1, 2, 5]]))


def test_operator_shapes() -> None:
    nodes = [Node("a", 4, Tanh()), Node("b", 3, Tanh())]
    with pytest.raises(ConfigError, match=r"operator on \(4,\) for node 'a' in Bilinear"):
        Energy(nodes, [Drive("a", nn.Identity()), Bilinear(Dense(5, 3), "a", "b")])


def test_read_outs() -> None:
    energy = Energy([Node("a", 4, Tanh())], [Drive("a", nn.Identity())])
    for readout in ([], ["a", "a"]):
        with pytest.raises(ConfigError, match="distinct read-out"):
            toreq.Equilibrium(energy, readout=readout)
