"""Anderson acceleration against its definition, linear systems and hard starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from test_solvers import exact_state, spectrum
from toreq import Equilibrium
from toreq.core import Energy
from toreq.core.couplings import Only
from toreq.core.state import State
from toreq.solvers import Anderson, FixedPoint
from zoo import case


class Affine:
    """``a -> M a + d``, real or complex, as a solver sees it."""

    def __init__(self, m: Tensor, d: Tensor) -> None:
        self.m, self.d = m, d

    def activate(self, a: State, only: Only = None) -> State:
        return dict(a)

    def field(self, h: State, only: Only = None) -> State:
        return {"h": h["h"] @ self.m.T + self.d}

    def colours(self) -> list[frozenset[str]]:
        return [frozenset(["h"])]

    def eliminable(self) -> frozenset[str]:
        return frozenset()

    def energy(self, a: State, h: State) -> Tensor | None:
        return None


def _reference(field, start: Tensor, length: int, damping: float, ridge: float, steps: int) -> list[Tensor]:
    """Anderson by its definition, one example at a time, the constrained least squares by its KKT system."""
    out = []
    for b in range(start.shape[0]):
        a, xs, gs, path = start[b], [], [], []
        for _ in range(steps):
            g = field(a, b) - a
            xs, gs = [*xs, a][-length:], [*gs, g][-length:]
            r = len(gs)
            rows = torch.stack(gs)
            gram = rows @ rows.T
            gram = gram + ridge * gram.trace() * torch.eye(r, dtype=gram.dtype)
            kkt = torch.zeros(r + 1, r + 1, dtype=gram.dtype)
            kkt[:r, :r], kkt[:r, r], kkt[r, :r] = gram / gram.trace(), 1, 1
            right = torch.zeros(r + 1, dtype=gram.dtype)
            right[r] = 1
            c = torch.linalg.solve(kkt, right)[:r]
            a = sum(ci * (x + damping * gi) for ci, x, gi in zip(c, xs, gs, strict=True))
            path.append(a)
        out.append(torch.stack(path))
    return list(torch.stack(out, 1))


@pytest.mark.parametrize(("length", "damping"), [(2, 1.0), (3, 1.0), (5, 0.6)])
def test_iterates_are_those_of_the_definition(length: int, damping: float) -> None:
    """More steps than slots, so that the ring wraps; a ridge large enough to be seen."""
    c, ridge, steps = case("tanh_layers"), 1e-3, 9
    seen: list[Tensor] = []
    options = {"ridge": ridge, "safeguard": 1e9, "tolerance": 0.0, "max_steps": steps}
    solver = Anderson(length=length, damping=damping, order="jacobi", **options)  # type: ignore[arg-type]
    c.layer(solver=solver).solve(c.x, callback=lambda s: seen.append(_flat(s.state)))
    with torch.no_grad():
        bindings = c.dynamics.bind(c.x)
        start = _flat(c.dynamics.initial(bindings))

    def field(a: Tensor, b: int) -> Tensor:
        sizes = [7, 5, 3]
        state = dict(zip(("h1", "h2", "out"), a[None].split(sizes, 1), strict=True))
        with torch.no_grad():
            one = c.dynamics.bind(c.x[b : b + 1])
            f = c.dynamics.field(c.dynamics.activate(state, one), one)
        return _flat({n: f[n] for n in state})[0]

    wanted = _reference(field, start, length, damping, ridge, steps)
    for found, w in zip(seen, wanted, strict=True):
        torch.testing.assert_close(found, w, rtol=1e-7, atol=1e-8)


def _flat(state: State) -> Tensor:
    return torch.cat([t.flatten(1) for t in state.values()], 1)


def test_small_linear_systems_are_solved_in_their_dimension() -> None:
    """With more slots than unknowns it is GMRES: n + 1 steps, also where the plain iteration diverges."""
    energy, x = spectrum(torch.tensor([-1.5, -0.6, 0.4, 0.95]))
    solver = Anderson(length=6, ridge=1e-14, tolerance=1e-9, max_steps=9, check_every=1, safeguard=1e6)
    solution = Equilibrium(energy, solver).solve(x)
    assert int(solution.steps.max()) <= 7
    torch.testing.assert_close(solution.state["h"], exact_state(energy, x), rtol=1e-6, atol=1e-7)


def test_complex_systems_need_no_more_steps_than_real_ones() -> None:
    """The holomorphic estimator relaxes complex states: the coefficients must be those of the complex least squares."""
    g = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.complex128)).Q
    eigenvalues = torch.tensor([0.9j, -0.8 + 0.3j, 0.7 - 0.4j, 0.5], dtype=torch.complex128)
    m = q @ torch.diag(eigenvalues) @ q.conj().T
    d = torch.randn(2, 4, generator=g, dtype=torch.complex128)
    solver = Anderson(length=6, ridge=1e-14, tolerance=1e-9, max_steps=9, check_every=1, safeguard=1e6)
    solution = solver.solve(Affine(m, d), {"h": torch.zeros_like(d)})
    exact = torch.linalg.solve(torch.eye(4, dtype=torch.complex128) - m, d.T).T
    assert int(solution.steps.max()) <= 7, f"took {solution.steps.tolist()} steps"
    torch.testing.assert_close(solution.state["h"], exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("radius", "factor"), [(0.9, 0.6), (0.95, 0.45)])
def test_fewer_steps_than_the_plain_iteration(radius: float, factor: float) -> None:
    g = torch.Generator().manual_seed(1)
    energy, x = spectrum((torch.rand(40, generator=g) * 2 - 1) * radius)
    steps = {}
    for name, solver in (("plain", FixedPoint(max_steps=500, check_every=1)), ("anderson", Anderson(check_every=1))):
        steps[name] = float(Equilibrium(energy, solver).solve(x).steps.double().mean())
    assert steps["anderson"] < factor * steps["plain"], steps


def test_hard_start_is_safeguarded() -> None:
    """From a start far away, and with a radius above 1, every example still settles."""
    energy, x = spectrum(torch.linspace(-1.3, 0.9, 12))
    solution = Equilibrium(energy, Anderson(tolerance=1e-8, max_steps=300)).solve(1e3 * x)
    assert bool(solution.converged.all())
    c = case("transformer")
    with torch.no_grad():
        bindings = c.dynamics.bind(c.x)
        far = {n: 50 * t for n, t in c.dynamics.initial(bindings).items()}
    from toreq.solvers import Relaxation

    found = Anderson(tolerance=1e-8, max_steps=300).solve(Relaxation(c.dynamics, bindings), far)
    assert bool(found.converged.all())
    for n, t in c.layer().solve(c.x).state.items():
        torch.testing.assert_close(found.state[n].detach(), t, rtol=1e-4, atol=1e-5)


def test_a_restart_forgets_the_history() -> None:
    """After the residual grows beyond the safeguard, the next step is one plain damped step."""

    class Jump(Affine):
        """An affine map whose offset jumps at the fourth evaluation, which makes the residual grow."""

        calls = 0

        def field(self, h: State, only: Only = None) -> State:
            self.calls += 1
            return {"h": h["h"] @ self.m.T + (self.d if self.calls < 4 else 1e3 * self.d)}

    g = torch.Generator().manual_seed(0)
    m = torch.diag(torch.tensor([0.5, -0.4, 0.3], dtype=torch.float64))
    d = torch.randn(2, 3, generator=g, dtype=torch.float64)
    states: list[Tensor] = []
    solver = Anderson(length=3, damping=0.8, safeguard=4.0, tolerance=0.0, max_steps=4)
    solver.solve(Jump(m, d), {"h": torch.zeros_like(d)}, callback=lambda s: states.append(s.state["h"]))
    before = states[2]
    plain = before + 0.8 * (before @ m.T + 1e3 * d - before)
    torch.testing.assert_close(states[3], plain, rtol=1e-10, atol=1e-10)


def test_float32_settles_to_its_default_tolerance() -> None:
    c = case("tanh_layers")
    layer = Equilibrium(c.dynamics.float(), Anderson())
    solution = layer.solve(c.x.float())
    assert bool(solution.converged.all())
    assert solution.state["h1"].dtype == torch.float32
    assert isinstance(c.dynamics, Energy)
