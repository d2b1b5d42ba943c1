"""Settled examples leave the batch: whatever moves on alone arrives where it would have arrived together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from test_engine import bound, diverging, layered
from toreq.core import Dynamics
from toreq.core.state import Bindings, State
from toreq.estimators import Centered, NonConservative, OneSided
from toreq.estimators.base import CostNudge, FreePhase, LinearNudge, Nudge
from toreq.estimators.pairs import Paired
from toreq.solvers import Anderson, Fading, FixedPoint, Problem, Relaxation, Solution, Solver, loop
from toreq.solvers.problem import displacement_from, pair_difference, reduced
from zoo import case

SOLVERS: dict[str, Solver] = {
    "jacobi": FixedPoint(max_steps=500),
    "gauss_seidel": FixedPoint(order="gauss_seidel", max_steps=500),
    "fading": FixedPoint(torus=Fading(alpha=0.3), max_steps=500),
    "heavy_ball": FixedPoint(torus=Fading(alpha=-0.3, length=1), max_steps=500),
    "anderson": Anderson(max_steps=500),
    "anderson_restarting": Anderson(max_steps=500, length=3, safeguard=1.05),
    "anderson_jacobi": Anderson(order="jacobi", length=2, max_steps=500),
    "every_second": FixedPoint(order="gauss_seidel", max_steps=500, check_every=2),
}
EACH_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


class Departures:
    """How large the batches were that went on without their settled examples."""

    def __init__(self) -> None:
        self.sizes: list[int] = []


@pytest.fixture
def departures(monkeypatch: pytest.MonkeyPatch) -> Departures:
    seen = Departures()
    select = Relaxation.selected

    def selected(self: Relaxation, index: Tensor) -> Relaxation | None:
        part = select(self, index)
        if part is not None:
            seen.sizes.append(index.shape[0])
        return part

    monkeypatch.setattr(loop, "WORTH_COMPACTING", 0)
    monkeypatch.setattr(Relaxation, "selected", selected)
    return seen


def mixed(x: Tensor) -> Tensor:
    """Nine examples that settle at different steps, not in their order."""
    return torch.cat([x * 0.05, x * 4, x])[torch.tensor([4, 0, 8, 3, 1, 6, 5, 2, 7])]


def same(found: Solution, wanted: Solution, size: float = 1e-12) -> None:
    assert torch.equal(found.steps, wanted.steps)
    assert torch.equal(found.converged, wanted.converged)
    torch.testing.assert_close(found.residual, wanted.residual, rtol=1e-6, atol=size, equal_nan=True)
    for pair in ((found.state, wanted.state), (found.h, wanted.h)):
        for n, t in pair[1].items():
            torch.testing.assert_close(pair[0][n], t, rtol=size, atol=size, equal_nan=True)


def both(solver: Solver, problem: Relaxation, a: State, share: float, **kwargs: Any) -> tuple[Solution, Solution]:
    with torch.no_grad():
        whole = replace(solver, compaction=0.0).solve(problem, a, **kwargs)
        return whole, replace(solver, compaction=share).solve(problem, a, **kwargs)


@EACH_SOLVER
@pytest.mark.parametrize("share", [0.01, 0.3])
@pytest.mark.parametrize("name", ["tanh_layers", "transformer", "convolutional"])
def test_who_leaves_does_not_matter(solver: Solver, share: float, name: str, departures: Departures) -> None:
    c = case(name)
    bindings = bound(c.dynamics, mixed(c.x))
    with torch.no_grad():
        start = c.dynamics.initial(bindings)
        start = {
            n: t * torch.linspace(0.1, 3, 9, dtype=t.dtype).view(9, *[1] * (t.dim() - 1)) for n, t in start.items()
        }
    whole, parts = both(replace(solver, tolerance=1e-7), Relaxation(c.dynamics, bindings), start, share)
    assert departures.sizes, "expected examples that leave"
    assert departures.sizes == sorted(departures.sizes, reverse=True)
    assert len(set(whole.steps.tolist())) > 1
    assert bool(whole.converged.all())
    same(parts, whole)


@pytest.mark.parametrize("name", ["field_mlp", "field_pair", "field_layer_norm"])
def test_vector_fields_let_examples_leave(name: str, departures: Departures) -> None:
    c = case(name)
    bindings = bound(c.dynamics, mixed(c.x))
    with torch.no_grad():
        start = c.dynamics.initial(bindings)
    solver = FixedPoint(max_steps=500, tolerance=1e-7, damping=0.7)
    whole, parts = both(solver, Relaxation(c.dynamics, bindings, as_map=True), start, 0.2)
    assert departures.sizes
    same(parts, whole)


def test_no_examples_leave_a_small_batch_or_a_share_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("tanh_layers")
    bindings = bound(c.dynamics, mixed(c.x))
    monkeypatch.setattr(Relaxation, "selected", None)
    with torch.no_grad():
        start = c.dynamics.initial(bindings)
        for share, worth in ((0.0, 0), (0.1, loop.WORTH_COMPACTING)):
            monkeypatch.setattr(loop, "WORTH_COMPACTING", worth)
            FixedPoint(tolerance=1e-7, compaction=share).solve(Relaxation(c.dynamics, bindings), start)


def test_a_recorded_relaxation_keeps_its_batch(departures: Departures) -> None:
    c = case("tanh_layers")
    problem = Relaxation(c.dynamics, bound(c.dynamics, mixed(c.x)))
    solver = FixedPoint(tolerance=1e-7, compaction=0.1)
    with torch.no_grad():
        start = c.dynamics.initial(problem.bindings)
        trace = solver.solve(problem, start, record="states").trace
        solver.solve(problem, start, callback=lambda step: None)
    assert trace is not None
    assert trace.states is not None
    assert {t.shape[0] for s in trace.states for t in s.values()} == {9}
    assert not departures.sizes


# --- nudged phases


def free_phase(dynamics: Dynamics, bindings: Bindings, solver: Solver) -> FreePhase:
    with torch.no_grad():
        free = replace(solver, compaction=0.0, tolerance=1e-10, max_steps=3000).solve(
            Relaxation(dynamics, bindings, as_map=True), dynamics.initial(bindings)
        )
    return FreePhase(dynamics, bindings, solver, free.state, free.h)


def cotangent(dynamics: Dynamics, size: int, seed: int = 3) -> LinearNudge:
    """A random cotangent of the last node, zero for the examples 1 and 4."""
    last = dynamics.names[-1]
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(size, *dynamics.shapes[last], generator=g, dtype=torch.float64)
    v[[1, 4]] = 0
    return LinearNudge({last: v})


def pairs(estimator: Paired, free: FreePhase, nudge: Nudge, share: float) -> tuple[Solution, Tensor]:
    phase = replace(free, solver=replace(free.solver, compaction=share))
    with torch.no_grad():
        v = nudge.cotangent(free.h)
        active = estimator.active(v)
        return estimator.pair(phase, nudge, estimator.betas(free, v), active, False), active


@EACH_SOLVER
@pytest.mark.parametrize("name", ["tanh_layers", "transformer"])
def test_the_two_phases_of_an_example_leave_together(solver: Solver, name: str, departures: Departures) -> None:
    """Also beside examples without a cotangent, which have settled by definition."""
    c = case(name)
    free = free_phase(c.dynamics, bound(c.dynamics, mixed(c.x)), solver)
    estimator, nudge = Centered(tolerance=1e-6, max_steps=500), cotangent(c.dynamics, 9)
    whole, active = pairs(estimator, free, nudge, 0.0)
    assert not departures.sizes
    parts, _ = pairs(estimator, free, nudge, 0.15)
    assert active.tolist() == [True, False, True, True, False, True, True, True, True]
    assert departures.sizes
    assert all(size % 2 == 0 for size in departures.sizes)
    assert torch.equal(parts.steps[:9], parts.steps[9:])
    assert not bool(parts.residual[[1, 4, 10, 13]].any())
    same(parts, whole)


@pytest.mark.parametrize("name", ["tanh_layers", "transformer"])
def test_one_nudged_phase_lets_examples_leave(name: str, departures: Departures) -> None:
    c = case(name)
    free = free_phase(c.dynamics, bound(c.dynamics, mixed(c.x)), Anderson())
    found = {}
    for share in (0.0, 0.15):
        phase = replace(free, solver=replace(free.solver, compaction=share))
        with torch.no_grad():
            found[share] = OneSided(tolerance=1e-6).estimate(phase, cotangent(c.dynamics, 9)).solution
    assert departures.sizes
    same(found[0.15], found[0.0])


def test_forces_that_know_their_batch_keep_it(departures: Departures) -> None:
    """The non-conservative correction and a cost at the moving state are functions of all examples."""
    c = case("tanh_layers")
    last = c.dynamics.names[-1]
    target = torch.randn(9, *c.dynamics.shapes[last], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cost = CostNudge(lambda out: (out[last] - target).square().sum(1), (last,))
    free = free_phase(c.dynamics, bound(c.dynamics, mixed(c.x)), Anderson())
    linear = cotangent(c.dynamics, 9)
    sides: list[tuple[Paired, Nudge]] = [(NonConservative(), linear), (Centered(nudge="cost", beta=1e-3), cost)]
    for estimator, nudge in sides:
        strict = replace(estimator, tolerance=1e-6)
        same(pairs(strict, free, nudge, 0.1)[0], pairs(strict, free, nudge, 0.0)[0])
    assert not departures.sizes
    problem = Relaxation(c.dynamics, free.bindings, extra=lambda h: {last: -h[last]})
    assert problem.selected(torch.tensor([0, 2])) is None


# --- what an example takes along


def test_an_overflowing_example_leaves_the_others_alone(departures: Departures) -> None:
    c = case("tanh_layers")
    x = mixed(c.x)
    x[2] = torch.nan
    for solver in SOLVERS.values():
        bindings = bound(c.dynamics, x)
        with torch.no_grad():
            start = c.dynamics.initial(bindings)
        whole, parts = both(replace(solver, tolerance=1e-7), Relaxation(c.dynamics, bindings), start, 0.2)
        assert parts.converged.tolist() == [i != 2 for i in range(9)]
        same(parts, whole)
    energy, drive = diverging(1.0)
    bindings = bound(energy, drive)
    whole, parts = both(FixedPoint(max_steps=300), Relaxation(energy, bindings), energy.initial(bindings), 0.2)
    assert parts.converged.tolist() == [False, True, True, False]
    same(parts, whole)
    assert departures.sizes


def test_examples_take_their_memory_format_along(departures: Departures) -> None:
    """Channels-first, the rest of the relaxation would be several times slower."""
    energy, x = layered()
    x = torch.cat([x * 0.05, x * 5])
    bindings = bound(energy, x)
    formats: list[bool] = []
    problem = Relaxation(energy, bindings)
    with torch.no_grad():
        start = energy.initial(bindings)
        part = problem.selected(torch.tensor([7, 0, 3]))
        assert part is not None
        for t in (*part.static.values(), *part.field({n: h[:3] for n, h in problem.activate(start).items()}).values()):
            formats.append(t.is_contiguous(memory_format=torch.channels_last))
        for solver in (Anderson(tolerance=1e-5), FixedPoint(tolerance=1e-5)):
            whole, parts = both(solver, problem, start, 0.2)
            same(parts, whole, 1e-5)
            for t in (*parts.state.values(), *parts.h.values()):
                formats.append(t.is_contiguous(memory_format=torch.channels_last))
        ring = FixedPoint(torus=Fading()).begin(problem, start, problem.activate(start))
        assert ring is not None
        kept = ring["c1"].selected(torch.tensor([7, 0, 3]))
        formats += [t.is_contiguous(memory_format=torch.channels_last) for t in (kept[0], kept.fading_sum)]
    assert departures.sizes
    assert all(formats), formats


def test_every_solver_can_let_examples_leave() -> None:
    """What is carried is carried on for the examples that stay, slot by slot."""
    c = case("tanh_layers")
    bindings = bound(c.dynamics, mixed(c.x))
    index = torch.tensor([8, 2, 3])
    for solver in SOLVERS.values():
        problem = Relaxation(c.dynamics, bindings)
        part = problem.selected(index)
        assert part is not None
        with torch.no_grad():
            a = c.dynamics.initial(bindings)
            h = problem.activate(a)
            carry = solver.begin(problem, a, h)
            for _ in range(7):
                a, h, _ = solver.step(problem, a, h, carry)
            few = ({n: t[index] for n, t in a.items()}, {n: t[index] for n, t in h.items()})
            kept = solver.select(carry, index)
            for _ in range(4):
                a, h, _ = solver.step(problem, a, h, carry)
                few = solver.step(part, *few, kept)[:2]
        for n, t in a.items():
            torch.testing.assert_close(few[0][n], t[index], rtol=1e-9, atol=1e-11)


def test_measures_follow_their_examples() -> None:
    g = torch.Generator().manual_seed(0)
    r, a = ({"h": torch.randn(6, 4, generator=g, dtype=torch.float64)} for _ in range(2))
    index = torch.tensor([5, 1, 2])
    few = {"h": r["h"][index]}, {"h": a["h"][index]}
    moved = displacement_from({"h": torch.rand(6, 4, generator=g, dtype=torch.float64)})
    torch.testing.assert_close(reduced(moved, index)(*few), moved(r, a)[index])
    assert reduced(pair_difference, index) is pair_difference


class Plain(Solver):
    """A solver of one's own that carries nothing and knows nothing of leaving."""

    def begin(self, problem: Problem, a: State, h: State) -> None:
        return None

    def step(self, problem: Problem, a: State, h: State, carry: None) -> tuple[State, State, State]:
        new = problem.field(h)
        return new, problem.activate(new), {n: t - a[n] for n, t in new.items()}


def test_a_solver_without_select_keeps_the_whole_batch(departures: Departures) -> None:
    c = case("tanh_layers")
    problem = Relaxation(c.dynamics, bindings := bound(c.dynamics, mixed(c.x)))
    with torch.no_grad():
        a = c.dynamics.initial(bindings)
        solver = Plain(max_steps=500, compaction=0.1)
        same(solver.solve(problem, a), FixedPoint(max_steps=500, compaction=0.0).solve(problem, a))
    assert not departures.sizes
