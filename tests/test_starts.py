"""Warm starts: the same equilibria in fewer steps, example by example."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import assert_close, gradients, quadratic
from toreq import Equilibrium, WarmStarts
from toreq.errors import ConfigError, DivergenceError
from toreq.estimators import Centered
from toreq.solvers import Anderson, FixedPoint, Solver
from zoo import case

SOLVERS: dict[str, Solver] = {
    "jacobi": FixedPoint(max_steps=500, tolerance=1e-6, damping=0.8),
    "gauss_seidel": FixedPoint(max_steps=500, tolerance=1e-6, order="gauss_seidel"),
    "anderson": Anderson(max_steps=500, tolerance=1e-6),
}
EACH_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def examples(name: str) -> tuple[Any, Tensor]:
    """A case of the zoo, and twelve examples of it."""
    c = case(name)
    return c, torch.cat([c.x, 0.5 * c.x, 2 * c.x, -c.x])


def steps(layer: Equilibrium) -> list[int]:
    assert layer.last.free is not None
    return layer.last.free.steps.tolist()


@EACH_SOLVER
@pytest.mark.parametrize("name", ["tanh_layers", "transformer", "convolutional", "field_pair"])
def test_the_second_visit_takes_one_step(solver: Solver, name: str) -> None:
    c, x = examples(name)
    layer = c.layer(solver=solver)
    starts = WarmStarts(layer, 20, dtype=torch.float64)
    index = torch.tensor([3, 19, 7, 0, 5, 11, 2, 14, 1, 9, 8, 4])
    first = layer.solve(x)
    assert int(first.steps.min()) > 1
    with starts(index):
        cold = layer.solve(x)
        warm = layer.solve(x)
    assert torch.equal(cold.steps, first.steps)
    assert warm.steps.tolist() == [1] * 12
    for n, t in first.state.items():
        torch.testing.assert_close(warm.state[n], t, rtol=1e-3, atol=1e-4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with starts(index[order]):
        assert layer.solve(x[order]).steps.tolist() == [1] * 12, "expected each example's own state"


def test_examples_that_are_new_start_as_before() -> None:
    c, x = examples("tanh_layers")
    layer = c.layer(solver=SOLVERS["jacobi"])
    starts = WarmStarts(layer, 12, dtype=torch.float64)
    cold = layer.solve(x)
    with starts(torch.arange(5)):
        layer.solve(x[:5])
    with starts(torch.arange(12)):
        found = layer.solve(x)
    assert found.steps[:5].tolist() == [1] * 5
    assert torch.equal(found.steps[5:], cold.steps[5:])
    for n, t in cold.state.items():
        assert torch.equal(found.state[n][5:], t[5:])
    assert starts.seen is not None
    assert bool(starts.seen.all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_digits_are_enough_to_start_from(dtype: torch.dtype) -> None:
    c, x = examples("tanh_layers")
    layer = c.layer(solver=SOLVERS["anderson"])
    starts = WarmStarts(layer, 12, dtype)
    with starts(torch.arange(12)):
        cold = layer.solve(x)
        warm = layer.solve(x)
    assert {t.dtype for t in starts.states.values()} == {dtype}
    assert {t.dtype for t in warm.state.values()} == {torch.float64}
    assert int(warm.steps.sum()) < int(cold.steps.sum())


def test_the_equilibrium_and_its_gradient_are_the_same() -> None:
    """After the weights have moved, the state that was kept is a start only."""
    c, x = examples("tanh_layers")
    layer = c.layer(Centered(beta=1e-4, tolerance=1e-9), FixedPoint(max_steps=3000, tolerance=1e-12))
    starts = WarmStarts(layer, 12)
    with starts(torch.arange(12)), torch.no_grad():
        layer(x)
        for p in layer.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype))
    wanted = gradients(layer, x, quadratic())
    cold = steps(layer)
    with starts(torch.arange(12)):
        found = gradients(layer, x, quadratic())
    assert sum(steps(layer)) < sum(cold)
    assert_close(found, wanted, rtol=1e-5)


def test_no_visit_lasts_longer_than_its_context() -> None:
    c, x = examples("tanh_layers")
    layer = c.layer(solver=SOLVERS["jacobi"])
    starts = WarmStarts(layer, 12)
    cold = layer.solve(x)
    with pytest.raises(ConfigError, match="batch of 4 examples, got 12"), starts(torch.arange(4)):
        layer.solve(x)
    assert layer.visit is None
    with starts(torch.arange(12)):
        layer.solve(x)
    assert torch.equal(layer.solve(x).steps, cold.steps)


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([0, 12]),
        torch.tensor([-1]),
        torch.tensor([0.0]),
        torch.tensor([[0]]),
        torch.tensor([1], dtype=torch.int32),
    ],
    ids=["too large", "negative", "floating", "two axes", "int32"],
)
def test_a_wrong_index_is_refused(index: Tensor) -> None:
    c, _ = examples("tanh_layers")
    layer = c.layer()
    refused = pytest.raises(ConfigError, match=r"WarmStarts: expected int64 indices \(B,\) below 12, got .*; pass")
    with refused, WarmStarts(layer, 12)(index):
        raise AssertionError
    assert layer.visit is None


@pytest.mark.parametrize("given", [1, 3])
def test_a_batch_of_another_size_is_refused_also_at_the_first_visit(given: int) -> None:
    c, x = examples("tanh_layers")
    layer = c.layer()
    starts = WarmStarts(layer, 12)
    with pytest.raises(ConfigError, match=rf"batch of {given} examples, got 2; "), starts(torch.arange(given)):
        layer.solve(x[:2])
    assert starts.seen is None


@pytest.mark.parametrize(("size", "dtype"), [(0, torch.float32), (5, torch.int64)])
def test_a_store_of_nothing_is_refused(size: int, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="size >= 1 and a floating dtype"):
        WarmStarts(case("tanh_layers").layer(), size, dtype)


def test_what_is_not_finite_is_forgotten() -> None:
    c, x = examples("tanh_layers")
    layer = c.layer(solver=SOLVERS["jacobi"])
    starts = WarmStarts(layer, 12, dtype=torch.float64)
    cold = layer.solve(x)
    bad = x.clone()
    bad[4] = torch.nan
    with starts(torch.arange(12)):
        layer.solve(x)
        with pytest.raises(DivergenceError):
            layer.solve(bad)
        assert starts.seen is not None
        assert starts.seen.tolist() == [i != 4 for i in range(12)]
        found = layer.solve(x)
    assert int(found.steps[4]) == int(cold.steps[4])
    assert bool(found.converged.all())


@pytest.mark.parametrize("way", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_of_a_layer_visits_nothing(way: Any) -> None:
    c, x = examples("tanh_layers")
    layer = c.layer(solver=replace(SOLVERS["jacobi"], tolerance=1e-4))
    with WarmStarts(layer, 12)(torch.arange(12)):
        layer.solve(x)
        assert layer.visit is not None
        assert way(layer).visit is None
        assert layer.visit is not None
