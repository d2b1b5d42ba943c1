"""What a layer does with input that it cannot settle or learn from."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from toreq import Equilibrium
from toreq.core import Bilinear, Dense, Drive, Energy, Lateral, Node, Tanh
from toreq.errors import ConfigError, DivergenceError
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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("solver", [FixedPoint(), FixedPoint(order="gauss_seidel"), Anderson()])
def test_input_that_is_not_finite_is_refused(bad: float, solver: Any) -> None:
    names = ["tanh_layers", "transformer"]
    if bad != bad:  # a saturating block turns an infinite input into a finite state, but never a NaN
        names += ["hard_sigmoid", "residual_loop", "field_mlp"]
    for name in names:
        c = case(name)
        x = c.x.clone()
        x[1].view(-1)[0] = bad
        with pytest.raises(DivergenceError, match=r"1 of 3 examples .* check the input"):
            c.layer(Implicit(), solver)(x)


def test_infinite_drive_of_a_saturating_unit_is_refused_too() -> None:
    c = case("hard_sigmoid")
    x = c.x.clone()
    x[1, 0] = torch.inf
    with pytest.raises(DivergenceError):
        c.layer(Implicit(), FixedPoint())(x)


def test_empty_batch_is_empty_or_refused() -> None:
    layer = _net()
    x = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    for solver in (FixedPoint(), Anderson()):
        layer.solver = solver
        try:
            out = layer(x)
        except (ConfigError, ValueError) as error:
            assert "batch" in str(error)  # noqa: PT017
            continue
        assert out.shape == (0, 5)
        layer.zero_grad()
        out.sum().backward()
        assert all(p.grad is None or float(p.grad.abs().sum()) == 0 for p in layer.parameters())


def test_shapes_dtypes_and_read_outs() -> None:
    layer = _net()
    with pytest.raises(RuntimeError):
        layer(torch.zeros(3, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        layer(torch.zeros(3, 4, dtype=torch.float32))
    c = case("tanh_layers")
    with pytest.raises(ConfigError, match=r"read-out among \['h1', 'h2', 'out'\], got 'hidden'"):
        c.layer(readout="hidden")
    with pytest.raises(ConfigError, match="got 'nope'"):
        c.layer(readout=("out", "nope"))
    unrolled = c.layer(Unrolled())
    with pytest.raises(RuntimeError, match="Unrolled has none"):
        unrolled.solve_nudged(c.x, torch.ones(3, 3, dtype=torch.float64))


def test_a_cotangent_of_the_wrong_shape_is_refused() -> None:
    c = case("tanh_layers")
    layer = c.layer(Centered())
    with pytest.raises((ConfigError, RuntimeError, ValueError)):
        layer.solve_nudged(c.x, torch.ones(3, 4, dtype=torch.float64))
    with pytest.raises((ConfigError, RuntimeError, ValueError, KeyError)):
        layer.solve_nudged(c.x, {"nope": torch.ones(3, 3, dtype=torch.float64)})


def test_warnings_can_be_silenced_and_statistics_stay() -> None:
    c = case("tanh_layers")
    layer = c.layer(replace(Centered(), max_steps=1), FixedPoint(max_steps=1), warn=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(c.x).sum().backward()
    assert layer.last.free is not None
    assert layer.last.nudged is not None
    assert not bool(layer.last.free.converged.any())
    assert not bool(layer.last.nudged.converged.any())
