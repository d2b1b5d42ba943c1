"""What the fast engine must not change: origins of nudged phases, few digits, and who has settled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import TIGHT, cosine, residual_of
from toreq import Equilibrium
from toreq.core import Bilinear, Conv, Dense, Drive, Dynamics, Energy, Identity, Lateral, Node, Potential, ReLU, Tanh
from toreq.core.state import Bindings, State, added, detached, difference, leaves
from toreq.estimators import Centered, Estimator, Holomorphic, Implicit, NonConservative, OneSided
from toreq.estimators.base import FreePhase, LinearNudge
from toreq.solvers import Anderson, FixedPoint, Relaxation, Solver, Step
from toreq.solvers.problem import pair_difference, relative
from zoo import ALL, COUPLED, FIELDS, case, linear

SOLVERS: dict[str, Solver] = {
    "jacobi": FixedPoint(max_steps=300),
    "gauss_seidel": FixedPoint(order="gauss_seidel", max_steps=300),
    "anderson": Anderson(max_steps=300),
}
EACH_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def bound(dynamics: Dynamics, x: Tensor) -> Bindings:
    with torch.no_grad():
        return detached(dynamics.bind(x))


def states(dynamics: Dynamics, bindings: Bindings, seed: int = 0) -> State:
    """A random state, each node ``(3, *shape)``."""
    g = torch.Generator().manual_seed(seed)
    a = {n: torch.randn(3, *s, generator=g, dtype=torch.float64) for n, s in dynamics.shapes.items()}
    with torch.no_grad():
        return dynamics.activate(a, bindings)


def close(found: State, wanted: State, size: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for n, t in wanted.items():
        torch.testing.assert_close(found[n], t, rtol=size, atol=size)


def wide(seed: int = 0) -> tuple[Energy, Tensor]:
    """A float32 network whose matrices are large enough to be rounded, with an input of five examples."""
    g = torch.Generator().manual_seed(seed)
    nodes = [Node("h", 96, Tanh()), Node("k", 80, Tanh(2.0)), Node("out", 4, Identity())]
    terms = [
        Drive("h", linear(6, 96, g)),
        Drive("k", linear(6, 80, g)),
        Lateral(Dense(96, 96, symmetric=True, scale=0.025, generator=g), "h"),
        Bilinear(Dense(96, 80, scale=0.025, generator=g), "h", "k"),
        Bilinear(Dense(80, 4, scale=0.05, generator=g), "k", "out"),
    ]
    return Energy(nodes, terms).float(), torch.randn(5, 6, generator=g)


def layered(seed: int = 0) -> tuple[Energy, Tensor]:
    """A float32 convolution between two nodes of different size, in channels-last."""
    g = torch.Generator().manual_seed(seed)
    first = nn.Conv2d(1, 6, 3)
    with torch.no_grad():
        first.weight.copy_(torch.randn(6, 1, 3, 3, generator=g) * 0.4)
    nodes = [Node("c1", (6, 10, 10), Tanh()), Node("c2", (8, 4, 4), Tanh())]
    terms = [Drive("c1", first), Bilinear(Conv((6, 10, 10), 8, 3, 2, scale=0.06, generator=g), "c1", "c2")]
    energy = Energy(nodes, terms).float()
    energy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return energy, torch.randn(5, 1, 12, 12, generator=g)


NETS = {"wide": wide, "layered": layered}


# --- the origin


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("as_map", [False, True], ids=["field", "map"])
def test_an_origin_shifts_the_field_by_a_constant(name: str, as_map: bool) -> None:
    """``f0 + f(h) - f(h0)``, whatever the network, with forces beside it and on any of its nodes."""
    c = case(name)
    bindings = bound(c.dynamics, c.x)
    h0, h, f0, push = (states(c.dynamics, bindings, s) for s in range(4))
    force = {c.dynamics.names[-1]: push[c.dynamics.names[-1]]}
    plain = Relaxation(c.dynamics, bindings, as_map=as_map)
    with torch.no_grad():
        moved = added(added(f0, difference(plain.field(h), plain.field(h0))), force)
        shifted = Relaxation(c.dynamics, bindings, force, as_map=as_map, origin=(f0, h0))
        close(shifted.field(h), moved, 1e-11)
        close(shifted.field(h0), added(f0, force), 1e-11)
        for colour in shifted.colours():
            close(shifted.field(h, colour), {n: moved[n] for n in colour}, 1e-11)
        turning = Relaxation(
            c.dynamics, bindings, force, lambda s: {n: 0.3 * t for n, t in s.items()}, as_map, (f0, h0)
        )
        close(turning.field(h), added(moved, {n: 0.3 * t for n, t in h.items()}), 1e-11)


@pytest.mark.parametrize("name", ["tanh_layers", "gated", "springs", "circulant", "convolutional"])
def test_a_linear_network_at_its_origin_gives_back_the_field(name: str) -> None:
    """Nothing has moved: the bits of ``f0 + force``, and no product."""
    c = case(name)
    bindings = bound(c.dynamics, c.x)
    h0, f0, push = (states(c.dynamics, bindings, s) for s in range(3))
    problem = Relaxation(c.dynamics, bindings, push, origin=(f0, h0))
    assert problem.linear
    for n, t in problem.field(h0).items():
        assert torch.equal(t, f0[n] + push[n])


def test_a_small_response_keeps_its_digits() -> None:
    """In float32, and even with rounded couplings: products are formed of what has moved, not of the states."""
    energy, x = wide()
    bindings = bound(energy, x)
    with torch.no_grad():
        a = energy.initial(bindings)
        h0 = energy.activate(a, bindings)
        h = {n: t + 1e-5 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in h0.items()}
        exact = energy.double()
        both = bound(exact, x.double())
        dh = {n: h[n].double() - h0[n].double() for n in h}
        zero = {n: torch.zeros_like(t) for n, t in dh.items()}
        wanted = Energy.accumulate(exact.moving(both), dh, zero)
        energy.float()
        origin = ({n: torch.zeros_like(t) for n, t in a.items()}, h0)
        errors = {}
        for coarse in (False, True):
            found = Relaxation(energy, bindings, origin=origin, coarse=coarse).field(h)
            errors[coarse] = max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)
    assert errors[False] < 1e-5
    assert errors[True] < 1e-2


def badly_settled(c: Any, solver: Solver) -> FreePhase:
    """A free phase that stopped at a relative residual of about 1e-2."""
    solution = c.layer().solve(c.x)
    g = torch.Generator().manual_seed(7)
    bindings = bound(c.dynamics, c.x)
    a = {n: t + 0.01 * t.std() * torch.randn(t.shape, generator=g, dtype=t.dtype) for n, t in solution.state.items()}
    with torch.no_grad():
        h = c.dynamics.activate(a, bindings)
    assert bool((residual_of(c.dynamics, c.x, a) > 1e-3).all())
    assert bool((residual_of(c.dynamics, c.x, a) < 5e-2).all())
    return FreePhase(c.dynamics, bindings, solver, a, h)


def of_parameters(c: Any, estimator: Estimator, free: FreePhase, nudge: LinearNudge) -> Tensor:
    """The estimator's gradient of every parameter, in one vector."""
    with torch.no_grad():
        gradients = estimator.estimate(free, nudge).gradients
    pairs = [(t, g) for t, g in zip(leaves(c.dynamics.bind(c.x)), gradients, strict=True) if t.requires_grad]
    outputs = [(t, g) for t, g in pairs if g is not None]
    own = [p for p in c.dynamics.parameters() if p.requires_grad]
    grads = torch.autograd.grad([t for t, _ in outputs], own, [g for _, g in outputs], materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


CONTRASTS = (OneSided(beta=1e-4, tolerance=1e-3), Centered(), Holomorphic(), NonConservative())


@pytest.mark.parametrize("estimator", CONTRASTS, ids=lambda e: e.name)
@pytest.mark.parametrize("name", [n for n in (*COUPLED, *FIELDS) if n != "residual_mixed"])
def test_nudged_phases_measure_the_response_only(estimator: Estimator, name: str) -> None:
    """From a free phase that has not settled, the gradient is still the implicit one at the same state."""
    c = case(name)
    if not estimator.supports(c.dynamics) or not c.smooth:
        # a field has no energy to contrast, Holomorphic needs an analytic one, and a kink has no linear response
        pytest.skip("not supported, or a kink is crossed")
    free = badly_settled(c, replace(c.solver, tolerance=1e-10))
    last = c.dynamics.names[-1]
    v = LinearNudge({last: states(c.dynamics, free.bindings, 5)[last]})
    wanted = of_parameters(c, Implicit(tolerance=1e-11, max_steps=3000), free, v)
    aligned = cosine(of_parameters(c, estimator, free, v), wanted)
    assert aligned > 0.999, f"cosine {aligned:.5f}"
    with torch.no_grad():
        statistics = estimator.estimate(free, v).statistics
    if statistics.asym is not None:
        assert float(statistics.asym.max()) < 0.1, "what both phases move alike is the free phase's residual"
        assert statistics.halvings == 0


# --- few digits


@pytest.mark.parametrize("net", NETS)
@EACH_SOLVER
def test_mixed_precision_reaches_the_equilibrium_of_full_precision(net: str, solver: Solver) -> None:
    energy, x = NETS[net]()
    bindings = bound(energy, x)
    found = {}
    with torch.no_grad():
        for precision in ("full", "mixed", "rounded"):
            way = replace(solver, tolerance=3e-6, precision=precision)
            solution = way.solve(Relaxation(energy, bindings), energy.initial(bindings))
            found[precision] = torch.cat([t.flatten(1) for t in solution.state.values()], 1).double()
            assert precision == "rounded" or bool(solution.converged.all())
    size = found["full"].norm()
    mixed, rounded = (float((found[p] - found["full"]).norm() / size) for p in ("mixed", "rounded"))
    assert mixed < 3e-5
    assert 20 * mixed < rounded < 1e-2


@EACH_SOLVER
def test_mixed_precision_counts_each_step_once(solver: Solver) -> None:
    energy, x = wide()
    seen: list[Step] = []
    layer = Equilibrium(energy, replace(solver, tolerance=1e-5, precision="mixed"))
    solution = layer.solve(x, record="states", callback=seen.append)
    total = int(solution.steps.max())
    assert [s.index for s in seen] == list(range(1, len(seen) + 1))
    trace = solution.trace
    assert trace is not None
    assert trace.energy is not None
    assert trace.states is not None
    assert trace.residual.shape == trace.energy.shape == (len(seen), 5)
    assert len(trace.states) == len(seen)
    assert total <= len(seen) <= total + 1
    assert bool(solution.converged.all())
    quiet = layer.solve(x)
    assert torch.equal(quiet.steps, solution.steps)
    full = Equilibrium(energy, replace(solver, tolerance=1e-5)).solve(x)
    assert total <= int(full.steps.max()) + 4


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_mixed_precision_keeps_to_its_most_steps(most: int) -> None:
    energy, x = wide()
    layer = Equilibrium(energy, FixedPoint(tolerance=1e-7, max_steps=most, precision="mixed"), warn=False)
    assert layer.solve(x).steps.tolist() == [most] * 5


@pytest.mark.parametrize("name", ["tanh_layers", "transformer", "field_mlp", "residual_loop"])
@pytest.mark.parametrize("precision", ["mixed", "rounded"])
def test_nothing_is_rounded_in_float64(name: str, precision: Any) -> None:
    c = case(name)
    solver = FixedPoint(max_steps=500, tolerance=1e-6, damping=0.7)
    wanted, found = c.layer(solver=solver), c.layer(solver=replace(solver, precision=precision))
    for n, t in wanted.solve(c.x).state.items():
        assert torch.equal(found.solve(c.x).state[n], t)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("precision", ["mixed", "rounded"])
def test_vector_fields_are_relaxed_in_full(name: str, precision: Any) -> None:
    c = case(name)
    c.dynamics.float()
    solver = FixedPoint(max_steps=500, tolerance=1e-5, damping=0.7)
    wanted = c.layer(solver=solver).solve(c.x.float())
    found = c.layer(solver=replace(solver, precision=precision)).solve(c.x.float())
    for n, t in wanted.state.items():
        assert torch.equal(found.state[n], t)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("precision", ["mixed", "rounded"])
def test_a_nudged_phase_in_bfloat16_keeps_its_direction(net: str, precision: Any) -> None:
    energy, x = NETS[net]()
    bindings = bound(energy, x)
    with torch.no_grad():
        free = Anderson(tolerance=1e-6).solve(Relaxation(energy, bindings), energy.initial(bindings))
    last = energy.names[-1]
    v = LinearNudge({last: torch.randn(free.h[last].shape, generator=torch.Generator().manual_seed(2))})
    found = {}
    with torch.no_grad():
        for kind in ("full", precision):
            phase = FreePhase(energy, bindings, Anderson(max_steps=100, precision=kind), free.state, free.h)
            gradients = Centered(tolerance=1e-4).estimate(phase, v).gradients
            found[kind] = torch.cat([t.flatten() for t in gradients if t is not None])
    assert found[precision].dtype == torch.float32
    assert cosine(found["full"], found[precision]) > 0.9999
    assert not torch.equal(found["full"], found[precision]), "expected couplings that are rounded"


def test_the_contrast_of_a_field_that_is_not_linear_is_not_rounded() -> None:
    linear_net, x = wide()
    terms = [Drive("h", nn.Linear(6, 64)), Potential(Dense(64, 70, scale=0.02), "h")]
    for dynamics, rounds in ((linear_net, True), (Energy([Node("h", 64, Tanh())], terms), False)):
        bindings = bound(dynamics, x)
        assert any(t.dtype == torch.bfloat16 for b in dynamics.rounded(bindings).values() for t in b.shared.values())
        a = dynamics.initial(bindings)
        phase = FreePhase(dynamics, bindings, Anderson(precision="mixed"), a, dynamics.activate(a, bindings))
        dtypes = {t.dtype for b in phase.contrasted().values() for t in b.shared.values()}
        assert (torch.bfloat16 in dtypes) == rounds
        assert replace(phase, solver=Anderson()).contrasted() is bindings


@pytest.mark.parametrize("name", ["tanh_layers", "transformer", "residual_chain"])
def test_what_goes_on_from_a_field_counts_its_forces_once(name: str) -> None:
    """Going on around ``(f(h0), h0)`` is the same relaxation, with constant forces and forces that turn."""
    c = case(name)
    bindings = bound(c.dynamics, c.x)
    h0, h, force = (states(c.dynamics, bindings, s) for s in range(3))
    problem = Relaxation(c.dynamics, bindings, force, lambda s: {n: 0.3 * t * t for n, t in s.items()})
    with torch.no_grad():
        close(problem.around(problem.field(h0), h0).field(h), problem.field(h), 1e-11)


# --- who has settled


def diverging(scale: float) -> tuple[Energy, Tensor]:
    """A node that runs away where its drive is positive, and stays where it is negative: inputs +, -, -, +."""
    lateral = Dense(2, 2, symmetric=True)
    with torch.no_grad():
        lateral.weight.copy_(3 * torch.eye(2))
    energy = Energy([Node("h", 2, ReLU())], [Drive("h", nn.Identity()), Lateral(lateral, "h")])
    return energy, torch.tensor([[1.0, 1], [-1, -2], [-3, -0.5], [2, 1]]) * scale


@EACH_SOLVER
@pytest.mark.parametrize("scale", [1e-2, 1e3])
def test_an_overflow_never_counts_as_settled(solver: Solver, scale: float) -> None:
    """A finite residual over an infinite norm is zero: it must not pass for a settled one."""
    energy, x = diverging(scale)
    bindings = bound(energy, x)
    with torch.no_grad():
        found = solver.solve(Relaxation(energy, bindings), energy.initial(bindings))
    assert found.converged.tolist() == [False, True, True, False]
    assert isinstance(solver, Anderson) or not bool(torch.isfinite(found.residual[[0, 3]]).any())
    torch.testing.assert_close(found.state["h"][1:3], x[1:3])


@pytest.mark.parametrize("measure", [relative, pair_difference], ids=["relative", "pair_difference"])
def test_an_infinite_state_has_no_residual(measure: Any) -> None:
    inf = torch.full((2, 3), torch.inf)
    a = {"h": torch.cat([inf[:1], torch.ones(1, 3), -inf[:1], torch.zeros(1, 3)])}
    ratio = measure({"h": torch.arange(12.0).view(4, 3)}, a)
    assert not bool(torch.isfinite(ratio[[0, 2]]).any())
    assert bool(torch.isfinite(ratio[[1, 3]]).all())


def test_the_larger_colour_is_eliminated() -> None:
    """So that the extrapolation runs over the few units that are left."""
    for first, second, wanted in ((9, 4, "a"), (4, 9, "b")):
        energy = Energy(
            [Node("a", first, Tanh()), Node("b", second, Tanh())], [Bilinear(Dense(first, second), "a", "b")]
        )
        assert energy.eliminable() == {wanted}
    nodes = [Node("a", 9, Tanh()), Node("b", 4, Tanh())]
    reading = Energy(nodes, [Bilinear(Dense(9, 4), "a", "b"), Lateral(Dense(9, 9, symmetric=True), "a")])
    assert reading.eliminable() == {"b"}, "what reads itself cannot be recomputed from the others"


@pytest.mark.parametrize("name", ["convolutional", "softmax_output", "relu", "hard_sigmoid"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_settled_means_settled_on_every_node(name: str, tolerance: float) -> None:
    """Anderson reports the residual of the nodes that it moves; that of the state it returns is no larger."""
    c = case(name)
    problem = Relaxation(c.dynamics, bound(c.dynamics, c.x))
    solver = Anderson(tolerance=tolerance, max_steps=300)
    with torch.no_grad():
        a = c.dynamics.initial(problem.bindings)
        h = problem.activate(a)
        residual = solver.step(problem, a, h, solver.begin(problem, a, h))[2]
        solution = solver.solve(problem, a)
    assert residual.keys() == set(c.dynamics.names) - problem.eliminable()
    assert bool(solution.converged.all())
    assert bool((residual_of(c.dynamics, c.x, solution.state) <= 1.001 * tolerance).all())
    f = TIGHT.step(problem, a, h, None)[2]
    assert f.keys() == set(c.dynamics.names), "the plain iteration moves them all"
