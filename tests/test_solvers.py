"""Solvers against exactly solved linear networks, and what they promise about tolerance, batch and torus."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import EXACT, TIGHT, assert_close, assert_finite_differences, gradients, quadratic, residual_of
from toreq import Equilibrium, solvers
from toreq.core import Dense, Drive, Energy, Identity, Lateral, Node, SelfCoupling
from toreq.errors import ConfigError, ConvergenceWarning, DivergenceError
from toreq.estimators import Centered
from toreq.solvers import Anderson, Fading, FixedPoint, Relaxation, Solver, Step
from zoo import ALL, case, linear

TIGHT_SOLVERS: dict[str, Solver] = {
    "jacobi": TIGHT,
    "damped": FixedPoint(damping=0.6, max_steps=3000, tolerance=1e-13),
    "gauss_seidel": FixedPoint(order="gauss_seidel", max_steps=1000, tolerance=1e-13),
    "fading": FixedPoint(torus=Fading(alpha=0.3), max_steps=3000, tolerance=1e-13),
    "heavy_ball": FixedPoint(torus=Fading(alpha=-0.3, length=1), max_steps=3000, tolerance=1e-13),
    "fading_gauss_seidel": FixedPoint(order="gauss_seidel", torus=Fading(alpha=0.2), max_steps=3000, tolerance=1e-13),
    "anderson": Anderson(max_steps=1000, tolerance=1e-12),
    "anderson_jacobi": Anderson(order="jacobi", max_steps=1000, tolerance=1e-12),
    "anderson_damped": Anderson(length=3, damping=0.7, max_steps=1000, tolerance=1e-12),
}
EACH_SOLVER = pytest.mark.parametrize("solver", TIGHT_SOLVERS.values(), ids=TIGHT_SOLVERS.keys())


def spectrum(values: Tensor) -> tuple[Energy, Tensor]:
    """A linear network of one identity node whose Jacobian has these eigenvalues, with an input for three examples."""
    g = torch.Generator().manual_seed(0)
    n = values.numel()
    lateral = Dense(n, n, symmetric=True).double()
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    with torch.no_grad():
        lateral.weight.copy_(q @ torch.diag(values.double()) @ q.T)
    energy = Energy([Node("h", n, Identity())], [Drive("h", linear(n, n, g)), Lateral(lateral, "h")]).double()
    return energy, torch.randn(3, n, generator=g, dtype=torch.float64)


def exact_state(energy: Energy, x: Tensor, self_coupling: float = 0.0) -> Tensor:
    """``(I - M - s I)^-1 d`` by a direct solve."""
    drive, lateral = energy.couplings[0], energy.couplings[1]
    assert isinstance(drive, Drive)
    assert isinstance(lateral, Lateral)
    m = lateral.op.tensors()["weight"].detach()
    eye = torch.eye(m.shape[0], dtype=torch.float64)
    return torch.linalg.solve(eye - m - self_coupling * eye, drive.module(x).detach().T).T


@EACH_SOLVER
def test_linear_network_is_solved_exactly(solver: Solver) -> None:
    energy, x = spectrum(torch.linspace(-0.7, 0.8, 6))
    solution = Equilibrium(energy, solver).solve(x)
    torch.testing.assert_close(solution.h["h"], exact_state(energy, x), rtol=1e-9, atol=1e-10)
    assert bool(solution.converged.all())


@EACH_SOLVER
@pytest.mark.parametrize("name", ["tanh_layers", "transformer", "convolutional", "field_pair"])
def test_every_solver_reaches_the_same_equilibrium(solver: Solver, name: str) -> None:
    c = case(name)
    wanted, found = c.layer().solve(c.x), c.layer(solver=solver).solve(c.x)
    assert bool(found.converged.all())
    for n in wanted.state:
        torch.testing.assert_close(found.state[n], wanted.state[n], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(found.h[n], wanted.h[n], rtol=1e-8, atol=1e-9)


@EACH_SOLVER
def test_every_solver_gives_the_same_gradient(solver: Solver) -> None:
    """A torus in memory mode, momentum or Anderson change the way to the equilibrium, never the gradient there."""
    c, loss = case("tanh_layers"), quadratic()
    wanted = gradients(c.layer(), c.x, loss)
    assert_close(gradients(c.layer(EXACT, solver), c.x, loss), wanted, rtol=1e-7)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
@pytest.mark.parametrize("name", [n for n in ALL if n != "residual_mixed"])
@pytest.mark.parametrize("kind", ["jacobi", "gauss_seidel", "heavy_ball", "anderson"])
def test_tolerance_is_honest(kind: str, name: str, tolerance: float) -> None:
    """The residual of the state that is returned, recomputed from scratch, is within the tolerance asked for."""
    c = case(name)
    solver = replace(TIGHT_SOLVERS[kind], tolerance=tolerance)
    if isinstance(solver, FixedPoint) and isinstance(c.solver, FixedPoint) and c.solver.damping < 1:
        solver = FixedPoint(
            damping=c.solver.damping, order=solver.order, torus=solver.torus, max_steps=3000, tolerance=tolerance
        )
    solution = c.layer(solver=solver).solve(c.x)
    assert bool(solution.converged.all())
    assert bool((solution.residual <= tolerance).all())
    assert bool((residual_of(c.dynamics, c.x, solution.state) <= tolerance).all())


@EACH_SOLVER
@pytest.mark.parametrize("tolerance", [1e-3, 1e-9])
def test_an_example_does_not_see_the_rest_of_its_batch(solver: Solver, tolerance: float) -> None:
    c = case("tanh_layers")
    # from saturated (fast) to almost linear (slow): they stop at different steps
    x = torch.cat([c.x * 4, c.x, c.x * 0.05])
    layer = c.layer(solver=replace(solver, tolerance=tolerance))
    together = layer.solve(x)
    assert len(set(together.steps.tolist())) > 1, "expected examples that settle at different steps"
    for i in range(x.shape[0]):
        alone = layer.solve(x[i : i + 1])
        assert int(alone.steps[0]) == int(together.steps[i])
        torch.testing.assert_close(alone.residual[0], together.residual[i], rtol=1e-3, atol=1e-13)
        for n in alone.state:
            torch.testing.assert_close(alone.state[n][0], together.state[n][i], rtol=1e-10, atol=1e-12)


def test_a_settled_example_is_frozen() -> None:
    """A loose tolerance leaves the fast example where it stopped, however long a slow one goes on."""
    energy, x = spectrum(torch.full((4,), 0.9))
    exact = exact_state(energy, x)
    layer = Equilibrium(energy, FixedPoint(tolerance=1e-2, max_steps=500))
    start = layer.dynamics.initial(energy.bind(x))["h"].detach()
    assert float((start - exact).norm()) > 0.5
    alone = layer.solve(x[:1]).state["h"]
    slow = torch.cat([x[:1], x[1:2] * 0 + 1e3 * x[1:2]])
    together = layer.solve(slow).state["h"][:1]
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=0)
    assert float((alone - exact[:1]).norm()) > 1e-3, "must not have gone on to the exact equilibrium"


def test_an_overflowing_example_does_not_spoil_the_others() -> None:
    c = case("tanh_layers")
    x = c.x.clone()
    x[1] = torch.nan
    for solver in (TIGHT, TIGHT_SOLVERS["anderson"], TIGHT_SOLVERS["gauss_seidel"]):
        with torch.no_grad():
            bad, good = c.dynamics.bind(x), c.dynamics.bind(c.x)
            found = solver.solve(Relaxation(c.dynamics, bad), c.dynamics.initial(bad))
            wanted = solver.solve(Relaxation(c.dynamics, good), c.dynamics.initial(good))
        assert found.converged.tolist() == [True, False, True]
        for n in found.state:
            torch.testing.assert_close(found.state[n][[0, 2]], wanted.state[n][[0, 2]], rtol=1e-12, atol=1e-14)


def _rate(layer: Equilibrium, x: Tensor, start: int = 40, stop: int = 80) -> float:
    trace = layer.solve(x, record="states").trace
    assert trace is not None
    assert trace.states is not None
    assert isinstance(layer.dynamics, Energy)
    exact = exact_state(layer.dynamics, x)
    distance = [float((s["h"] - exact).norm()) for s in trace.states]
    return (distance[stop] / distance[start]) ** (1 / (stop - start))


def test_heavy_ball_speeds_a_wide_spectrum() -> None:
    """On eigenvalues in [-1.2, .95] the best damping alone gives .96 a step, momentum about .78."""
    energy, x = spectrum(torch.linspace(-1.2, 0.95, 24))
    best_damping = FixedPoint(damping=2 / (0.05 + 2.2), tolerance=0.0, max_steps=90)
    assert _rate(Equilibrium(energy, best_damping), x) == pytest.approx(0.956, abs=0.005)
    momentum = FixedPoint(torus=Fading(alpha=-0.6, length=1, decay=0.5), tolerance=0.0, max_steps=90)
    assert _rate(Equilibrium(energy, momentum), x) < 0.82


def test_heavy_ball_is_polyaks_momentum() -> None:
    """The iterates are those of ``a + gamma (f - a) + mu (a - a_before)`` with ``mu = -gamma alpha``."""
    energy, x = spectrum(torch.linspace(-0.8, 0.9, 5))
    gamma, alpha = 0.7, -0.5
    solver = FixedPoint(damping=gamma, torus=Fading(alpha=alpha, length=1, decay=0.5), tolerance=0.0, max_steps=12)
    solution = Equilibrium(energy, solver).solve(x, record="states")
    assert solution.trace is not None
    assert solution.trace.states is not None
    with torch.no_grad():
        bindings = energy.bind(x)
        a = before = energy.initial(bindings)["h"]
        for recorded in solution.trace.states:
            torch.testing.assert_close(recorded["h"], a, rtol=1e-12, atol=1e-13)
            f = energy.field({"h": a}, bindings)["h"]
            a, before = a + gamma * (f - a) - gamma * alpha * (a - before), a
    torch.testing.assert_close(solution.state["h"], a, rtol=1e-12, atol=1e-13)


def test_fading_torus_is_its_energy_term() -> None:
    """With a negative alpha: the field plus ``sum_r alpha decay^(r-1) (m_r - h)`` over the last R states."""
    energy, x = spectrum(torch.linspace(-0.8, 0.9, 5))
    alpha, decay, length = -0.3, 0.6, 3
    solver = FixedPoint(torus=Fading(alpha=alpha, decay=decay, length=length), tolerance=0.0, max_steps=12)
    solution = Equilibrium(energy, solver).solve(x, record="states")
    assert solution.trace is not None
    assert solution.trace.states is not None
    with torch.no_grad():
        bindings = energy.bind(x)
        a = energy.initial(bindings)["h"]
        past = [a] * length
        for recorded in solution.trace.states:
            torch.testing.assert_close(recorded["h"], a, rtol=1e-12, atol=1e-13)
            pull = sum(alpha * decay**r * (m - a) for r, m in enumerate(past))
            past = [a, *past[:-1]]
            a = energy.field({"h": a}, bindings)["h"] + pull


def test_fading_tames_what_diverges_without_it() -> None:
    """A radius of -1.2 overflows when undamped and settles under a positive alpha, to the same equilibrium."""
    energy, x = spectrum(torch.linspace(-1.2, 0.3, 6))
    with pytest.raises(DivergenceError, match="lower the damping"):
        Equilibrium(energy, FixedPoint(max_steps=6000, tolerance=1e-10)).solve(x)
    layer = Equilibrium(energy, FixedPoint(torus=Fading(alpha=0.3), max_steps=500, tolerance=1e-11))
    torch.testing.assert_close(layer.solve(x).state["h"], exact_state(energy, x), rtol=1e-7, atol=1e-8)
    assert layer.radius(x) == pytest.approx(1.2, rel=0.02)


@pytest.mark.parametrize("alpha", [0.15, -0.2])
def test_recurrent_torus_is_a_self_coupling(alpha: float) -> None:
    """Its equilibrium is that of the energy with the self-coupling, and its gradient that of finite differences."""
    energy, x = spectrum(torch.linspace(-0.5, 0.5, 5))
    torus = Fading(alpha=alpha, decay=0.5, length=3, mode="recurrent")
    assert torus.total == pytest.approx(alpha * 1.75)
    layer = Equilibrium(energy, FixedPoint(torus=torus, max_steps=500, tolerance=1e-13), EXACT)
    solution = layer.solve(x)
    torch.testing.assert_close(solution.state["h"], exact_state(energy, x, torus.total), rtol=1e-9, atol=1e-10)
    assert isinstance(layer.dynamics, Energy)
    assert any(isinstance(c, SelfCoupling) for c in layer.dynamics.couplings)
    assert not any(isinstance(c, SelfCoupling) for c in energy.couplings), "the caller's energy must stay as it was"
    assert float((solution.state["h"] - exact_state(energy, x)).norm()) > 1e-2
    found = gradients(layer, x, quadratic())
    assert_finite_differences(layer, x, quadratic(), found)
    layer.estimator = Centered(beta=1e-4, tolerance=1e-10)
    assert_close(gradients(layer, x, quadratic()), found, rtol=1e-5)


def test_recurrent_torus_runs_the_seeds_recursion() -> None:
    """The field gets ``alpha sum_r decay^(r-1) h(t-r)``: no self-coupling is seen before it has gone round the ring."""
    energy, x = spectrum(torch.linspace(-0.5, 0.5, 4))
    torus = Fading(alpha=0.2, decay=0.5, length=3, mode="recurrent")
    layer = Equilibrium(energy, FixedPoint(torus=torus, tolerance=0.0, max_steps=8))
    trace = layer.solve(x, record="states").trace
    assert trace is not None
    assert trace.states is not None
    with torch.no_grad():
        bindings = energy.bind(x)
        a = trace.states[0]["h"]
        past = [a] * 3
        for recorded in trace.states:
            torch.testing.assert_close(recorded["h"], a, rtol=1e-12, atol=1e-13)
            memory = sum(0.2 * 0.5**r * m for r, m in enumerate(past))
            past = [a, *past[:-1]]
            a = energy.field({"h": a}, bindings)["h"] + memory


def test_recurrent_torus_needs_an_energy() -> None:
    torus = FixedPoint(torus=Fading(mode="recurrent"))
    for name in ("field_mlp", "residual_loop"):
        with pytest.raises(ConfigError, match="recurrent torus"):
            Equilibrium(case(name).dynamics, torus)
    layer = Equilibrium(case("tanh_layers").dynamics)
    with pytest.raises(ConfigError, match="build a new layer"):
        layer.solver = torus


def test_gauss_seidel_needs_about_half_the_sweeps() -> None:
    c = case("convolutional")
    sweeps = {}
    for order in ("jacobi", "gauss_seidel"):
        solver = FixedPoint(order=order, tolerance=1e-8, max_steps=500, check_every=1)
        sweeps[order] = float(c.layer(solver=solver).solve(c.x).steps.double().mean())
    assert sweeps["gauss_seidel"] < 0.65 * sweeps["jacobi"]


def test_trace_and_callback() -> None:
    c = case("tanh_layers")
    seen: list[Step] = []
    solution = c.layer(solver=FixedPoint(tolerance=1e-8, max_steps=500, check_every=7)).solve(
        c.x, record="states", callback=seen.append
    )
    trace = solution.trace
    assert trace is not None
    assert trace.energy is not None
    assert trace.states is not None
    count = int(solution.steps.max())
    assert [s.index for s in seen] == list(range(1, count + 1))
    assert trace.residual.shape == trace.energy.shape == (count, 3)
    assert len(trace.states) == count
    assert count % 7 == 0
    for t in (0, 3, count - 1):
        torch.testing.assert_close(trace.residual[t], residual_of(c.dynamics, c.x, trace.states[t]))
        with torch.no_grad():
            energy = c.dynamics(trace.states[t], c.dynamics.bind(c.x))
        torch.testing.assert_close(trace.energy[t], energy)
    assert torch.equal(seen[0].state["h1"], trace.states[1]["h1"])
    plain = c.layer(solver=FixedPoint(tolerance=1e-8, max_steps=500, check_every=7)).solve(c.x)
    assert plain.trace is None
    assert torch.equal(plain.state["out"], solution.state["out"])
    field = case("field_mlp")
    recorded = field.layer().solve(field.x, record=True).trace
    assert recorded is not None
    assert recorded.energy is None
    assert recorded.states is None


def test_nudged_trace_holds_the_energy_that_descends() -> None:
    """The recorded energy of a nudged phase includes the nudge, else it would not descend."""
    c = case("tanh_layers")
    layer = c.layer(
        Centered(beta=0.1, tolerance=1e-9, max_halvings=0), FixedPoint(damping=0.1, tolerance=1e-10, max_steps=3000)
    )
    trace = layer.solve_nudged(c.x, torch.ones(3, 3, dtype=torch.float64), record=True).trace
    assert trace is not None
    assert trace.energy is not None
    assert trace.energy.shape[1] == 6
    assert bool((trace.energy[1:] - trace.energy[:-1] <= 1e-12).all())
    assert bool((trace.energy[-1] < trace.energy[0] - 1e-6).all())


def test_tolerance_zero_runs_all_steps_without_a_warning() -> None:
    c = case("tanh_layers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = c.layer(solver=FixedPoint(tolerance=0.0, max_steps=5)).solve(c.x)
    assert solution.steps.tolist() == [5, 5, 5]


def test_one_step_is_one_application_of_the_field() -> None:
    c = case("tanh_layers")
    solution = c.layer(solver=FixedPoint(tolerance=0.0, max_steps=1, damping=0.3)).solve(c.x)
    with torch.no_grad():
        bindings = c.dynamics.bind(c.x)
        a = c.dynamics.initial(bindings)
        f = c.dynamics.field(c.dynamics.activate(a, bindings), bindings)
    for n in a:
        torch.testing.assert_close(solution.state[n], 0.7 * a[n] + 0.3 * f[n])


def test_unsettled_examples_warn_with_a_remedy() -> None:
    c = case("tanh_layers")
    layer = c.layer(solver=FixedPoint(tolerance=1e-10, max_steps=4))
    with pytest.warns(ConvergenceWarning, match=r"free phase to settle, got 3 of 3 .* after 4 steps .* raise max"):
        layer(c.x)
    assert layer.last.free is not None
    assert not bool(layer.last.free.converged.any())
    quiet = c.layer(solver=FixedPoint(tolerance=1e-10, max_steps=4), warn=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(c.x)


@pytest.mark.parametrize("solver", [FixedPoint(max_steps=3000), FixedPoint(order="gauss_seidel", max_steps=3000)])
def test_overflow_stops_with_the_cause(solver: Solver) -> None:
    energy, x = spectrum(torch.tensor([3.0, 0.1]))
    with pytest.raises(DivergenceError, match=r"3 of 3 examples overflowing .* check the input"):
        Equilibrium(energy, solver)(x)


@pytest.mark.parametrize(
    ("kind", "bad", "message"),
    [
        (FixedPoint, {"damping": 0.0}, r"damping in \(0, 1\]"),
        (FixedPoint, {"damping": 1.5}, r"damping in \(0, 1\]"),
        (FixedPoint, {"damping": float("nan")}, r"damping in \(0, 1\]"),
        (FixedPoint, {"max_steps": 0}, "max_steps an integer >= 1"),
        (FixedPoint, {"tolerance": -1e-3}, r"tolerance in \[0, 1\)"),
        (FixedPoint, {"tolerance": 1.0}, r"tolerance in \[0, 1\)"),
        (FixedPoint, {"check_every": 0}, "check_every an integer >= 1"),
        (Fading, {"alpha": 0.0}, "alpha nonzero"),
        (Fading, {"decay": 1.0}, r"decay in \(0, 1\)"),
        (Fading, {"length": 0}, "length an integer >= 1"),
        (Anderson, {"length": 1}, "length an integer >= 2"),
        (Anderson, {"damping": 2.0}, r"damping in \(0, 1\]"),
        (Anderson, {"ridge": -1.0}, "ridge >= 0"),
        (Anderson, {"safeguard": 1.0}, "safeguard > 1"),
    ],
)
def test_options_out_of_range_are_refused(kind: Any, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"{kind.__name__}: expected {message}.*, got .*; "):
        kind(**bad)


def test_unknown_options_are_refused_and_names_are_listed() -> None:
    with pytest.raises(TypeError, match="dampening"):
        FixedPoint(dampening=0.5)  # type: ignore[call-arg]
    with pytest.raises(Exception, match="order"):
        FixedPoint(order="sideways")  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        FixedPoint().damping = 0.5  # type: ignore[misc]
    assert solvers.names() == ["anderson", "coarsetofine", "fixedpoint", "langevin", "spiking"]
