"""CoarseToFine and what it is made of, against flat solves, closed forms, brute force and direct linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oracles import residual_of
from toreq import Equilibrium
from toreq.core import (
    Adjoint,
    Bilinear,
    Dense,
    Drive,
    Energy,
    HardSigmoid,
    Identity,
    Lateral,
    LayerNorm,
    Node,
    ReLU,
    Replicate,
    Resample,
    Softmax,
    Spring,
    Tanh,
)
from toreq.core.implicit import slope, solve_implicit
from toreq.core.nodes import Activation
from toreq.diagnostics.work import Metered, field_flops, fine_sweep
from toreq.errors import ConfigError
from toreq.solvers import Anderson, CoarseToFine, FixedPoint, Relaxation
from toreq.solvers.springs import chains
from zoo import ALL, case, linear

KINDS: dict[str, Activation] = {
    "identity": Identity(),
    "clamped identity": Identity(0.2),
    "tanh": Tanh(),
    "steep": Tanh(16.0),
    "hard_sigmoid": HardSigmoid(),
    "clamped hard_sigmoid": HardSigmoid(0.2),
    "relu": ReLU(),
    "steep relu": ReLU(16.0),
    "layer_norm": LayerNorm(6),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
TIGHT = CoarseToFine(max_steps=500, tolerance=1e-12)
DAMPED = FixedPoint(damping=0.1, max_steps=5000, tolerance=1e-12)


def ramp(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64) * scale


def bowl(
    kind: str = "tanh", strength: float = 2.0, mu: float | None = None, sizes: tuple[int, ...] = (8, 4, 2)
) -> Energy:
    """Three levels of one node each, coupled to themselves and joined by springs."""
    g = torch.Generator().manual_seed(3)
    nodes = [Node(f"l{i}", n, KINDS[kind]) for i, n in enumerate(sizes)]
    terms: list = []
    for i, n in enumerate(sizes):
        terms.append(Drive(f"l{i}", linear(5, n, g)))
        op = Dense(n, n, symmetric=True, generator=g, scale=0.25 / n**0.5)
        terms.append(Lateral(op, f"l{i}"))
        if i:
            up = Replicate((n,), 2, (-1,))
            terms.append(Spring(f"l{i - 1}", f"l{i}", up, strength, learnable=True))
            if mu is not None:
                terms.append(Spring(f"l{i}", f"l{i - 1}", Adjoint(up, 0.5), mu))
    return Energy(nodes, terms, [[n.name] for n in nodes]).double().eval()


@EACH_KIND
@pytest.mark.parametrize("s", [0.0, 0.3, 4.0, 300.0])
def test_implicit_solution_solves_its_equation(kind: str, s: float) -> None:
    f = KINDS[kind].double()
    strength = torch.tensor(s, dtype=torch.float64)
    z = torch.cat([ramp(4, 6), ramp(4, 6, scale=50, seed=1), torch.zeros(1, 6, dtype=torch.float64), s * ramp(2, 6)])
    a = solve_implicit(f, z, strength)
    torch.testing.assert_close(a + strength * f(a), z, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("kind", [name for name, f in KINDS.items() if f.analytic])  # kinks have no continuation
def test_implicit_solution_continues_into_the_complex_plane(kind: str) -> None:
    f, s = KINDS[kind].double(), torch.tensor(2.0, dtype=torch.float64)
    z = torch.complex(ramp(3, 6), 0.01 * ramp(3, 6, seed=2))
    a = solve_implicit(f, z, s)
    torch.testing.assert_close(a + s * f(a), z, rtol=1e-10, atol=1e-10)


def test_implicit_solution_in_float32_is_as_good_as_its_digits() -> None:
    z = ramp(5, 6, scale=3).float()
    a = solve_implicit(Tanh(16.0), z, torch.tensor(4.0))
    torch.testing.assert_close(a + 4 * torch.tanh(16 * a), z, rtol=2e-6, atol=2e-6)


def test_softmax_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="got Softmax"):
        solve_implicit(Softmax(), torch.zeros(1, 3), torch.ones(()))


@EACH_KIND
def test_slope_is_the_derivative(kind: str) -> None:
    f = KINDS[kind].double()
    a = ramp(4, 6)
    w, d = slope(f, a, f(a)), ramp(4, 6, seed=1)
    if kind == "layer_norm":  # across the token's direction and without its mean
        centred = a - a.mean(-1, keepdim=True)
        d = d - d.mean(-1, keepdim=True)
        d = d - centred * ((d * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True))
    torch.testing.assert_close(w * d, (f(a + 1e-7 * d) - f(a - 1e-7 * d)) / 2e-7, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("axes", [(-1,), (-2,), (-2, -1)])
def test_replicate_and_its_adjoint(axes: tuple[int, ...]) -> None:
    up = Replicate((3, 4, 2), 2, axes)
    u, w = ramp(2, 3, 4, 2), ramp(2, *up.out_shape, seed=1)
    assert torch.allclose((up(u) * w).sum(), (u * up.adjoint(w)).sum())
    assert up.gram is not None
    torch.testing.assert_close(up.adjoint(up(u)), up.gram[0] * u)
    complex_u = torch.complex(u, -u)
    torch.testing.assert_close(up(complex_u).imag, -up(u))
    torch.testing.assert_close(up.adjoint(torch.complex(w, w)).imag, up.adjoint(w))


def test_replicate_undoes_the_average_of_resample() -> None:
    up, down = Replicate((3, 4, 2)), Resample((3, 8, 4))
    u = ramp(2, 3, 4, 2)
    torch.testing.assert_close(down(up(u)), u)
    torch.testing.assert_close(Adjoint(up, 0.25)(ramp(2, 3, 8, 4)), down(ramp(2, 3, 8, 4)))


def test_known_spectra_are_those_of_the_matrix() -> None:
    up = Replicate((2, 3), 2, (-2, -1))
    for op in (up, Adjoint(up, 0.25)):
        eye = torch.eye(int(torch.tensor(op.in_shape).prod()), dtype=torch.float64).reshape(-1, *op.in_shape)
        gram = torch.stack([op.adjoint(op(e[None]))[0].flatten() for e in eye])
        values = torch.linalg.eigvalsh(gram)
        assert op.gram == pytest.approx((float(values[0]), float(values[-1])), abs=1e-12)


def test_bad_operators_and_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match="distinct negative axes"):
        Replicate((4, 4), 2, (0,))
    with pytest.raises(ConfigError, match="without weights"):
        Adjoint(Dense(3, 3))
    with pytest.raises(ConfigError, match="hold each of"):
        Energy([Node("a", 2, Tanh()), Node("b", 2, Tanh())], [], [["a"]])
    with pytest.raises(ConfigError, match="level_damping"):
        CoarseToFine(level_damping=(2.0,))
    with pytest.raises(ConfigError, match="rounds"):
        CoarseToFine(rounds=0)


def test_elimination_is_a_direct_solve() -> None:
    """The tree solve against the dense matrix I + S W, with own pulls of a second spring."""
    energy = bowl(mu=0.7)
    problem = Relaxation(energy, energy.bind(ramp(3, 5)))
    (chain,) = chains(problem)
    r = {n: ramp(3, *energy.shapes[n], seed=i) for i, n in enumerate(chain.nodes)}
    slopes = {n: torch.rand_like(t) + 0.1 for n, t in r.items()}
    d = chain.eliminated(r, slopes)

    def flat(state: dict[str, Tensor]) -> Tensor:
        return torch.cat([state[n] for n in chain.nodes], 1)

    widths = [energy.shapes[n][0] for n in chain.nodes]
    eye = torch.eye(sum(widths), dtype=torch.float64)
    curvature = flat(chain.stretched(dict(zip(chain.nodes, eye.split(widths, 1), strict=True))))
    for b in range(3):
        matrix = eye + curvature @ torch.diag(flat(slopes)[b])
        torch.testing.assert_close(flat(d)[b], torch.linalg.solve(matrix, flat(r)[b]))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "layer_norm"])  # tokens: see test_mstep.py
@pytest.mark.parametrize(
    "solver", [TIGHT, CoarseToFine(max_steps=2000, tolerance=1e-12, joint=False)], ids=["joint", "by_level"]
)
def test_same_equilibrium_as_a_flat_solve(kind: str, solver: CoarseToFine) -> None:
    energy, x = bowl(kind.removeprefix("steep ").replace("steep", "tanh"), mu=0.5), ramp(3, 5)
    wanted = Equilibrium(energy, DAMPED).solve(x)
    found = Equilibrium(energy, solver).solve(x)
    assert bool(found.converged.all())
    assert bool(wanted.converged.all())
    for n in wanted.h:
        torch.testing.assert_close(found.h[n], wanted.h[n], rtol=1e-8, atol=1e-9)


def test_stiff_springs_cost_no_more_sweeps() -> None:
    x = ramp(3, 5)
    steps = [
        int(Equilibrium(bowl(strength=s), CoarseToFine(tolerance=1e-6, max_steps=200)).solve(x).steps.max())
        for s in (0.1, 1.0, 10.0, 100.0)
    ]
    assert max(steps) <= steps[0] + 3
    flat = Equilibrium(bowl(strength=10.0), Anderson(tolerance=1e-6, max_steps=200, damping=0.02)).solve(x)
    assert int(flat.steps.max()) > 2 * max(steps)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
@pytest.mark.parametrize("options", [{}, {"joint": False}, {"accelerated": False}, {"nested": 2}], ids=str)
def test_tolerance_is_honest(tolerance: float, options: dict) -> None:
    energy, x = bowl(), ramp(4, 5)
    solver = CoarseToFine(tolerance=tolerance, max_steps=500, **options)
    solution = Equilibrium(energy, solver).solve(x)
    assert bool(solution.converged.all())
    assert bool((residual_of(energy, x, solution.state) <= tolerance).all())


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("residual_mixed",)])
def test_without_levels_it_is_an_ordinary_solver(name: str) -> None:
    c = case(name)
    wanted = c.layer().solve(c.x)
    found = c.layer(solver=CoarseToFine(max_steps=3000, tolerance=1e-12, damping=0.7)).solve(c.x)
    for n in wanted.h:
        torch.testing.assert_close(found.h[n], wanted.h[n], rtol=1e-8, atol=1e-8)


def test_one_level_without_acceleration_is_gauss_seidel() -> None:
    c = case("tanh_layers")
    plain = CoarseToFine(accelerated=False, tolerance=0, max_steps=7, order="jacobi")
    found = c.layer(solver=plain).solve(c.x)
    wanted = c.layer(solver=FixedPoint(order="gauss_seidel", tolerance=0, max_steps=7)).solve(c.x)
    for n in wanted.h:
        assert torch.equal(found.h[n], wanted.h[n])


def test_one_level_takes_the_steps_of_anderson() -> None:
    g = torch.Generator().manual_seed(0)
    nodes = [Node("a", 8, Tanh()), Node("b", 4, Tanh())]
    terms = [Drive("a", linear(5, 8, g)), Bilinear(Dense(8, 4, generator=g), "a", "b")]
    energy, x = Energy(nodes, terms).double(), ramp(3, 5)
    wanted = Equilibrium(energy, Anderson(tolerance=1e-10)).solve(x)
    found = Equilibrium(energy, CoarseToFine(tolerance=1e-10)).solve(x)
    assert torch.equal(found.steps, wanted.steps)


def test_an_example_does_not_see_the_rest_of_its_batch() -> None:
    layer = Equilibrium(bowl(), CoarseToFine(tolerance=1e-5, nested=1))
    x = ramp(3, 5) * torch.tensor([[4.0], [1.0], [0.05]], dtype=torch.float64)
    together = layer.solve(x)
    for i in range(3):
        alone = layer.solve(x[i : i + 1])
        assert int(alone.steps) == int(together.steps[i])
        for n in alone.h:
            torch.testing.assert_close(alone.h[n][0], together.h[n][i], rtol=1e-12, atol=1e-13)


def test_restricted_relaxation_is_the_sub_network() -> None:
    energy, x = bowl(), ramp(2, 5)
    problem = Relaxation(energy, energy.bind(x))
    part = problem.restricted(frozenset({"l1", "l2"}))
    assert part is not None
    assert part.levels() == [frozenset({"l1"}), frozenset({"l2"})]
    small = Energy(
        [Node(n, energy.shapes[n], Tanh()) for n in ("l1", "l2")],
        [c for _, c in energy.terms() if set(c.nodes) <= {"l1", "l2"}],
    )
    h = {n: ramp(2, *energy.shapes[n]) for n in ("l1", "l2")}
    wanted = small.field(h, small.bind(x))
    for n, t in part.field(h).items():
        torch.testing.assert_close(t, wanted[n])


def test_work_counts_real_evaluations() -> None:
    energy, x = bowl(), ramp(4, 5).float()
    energy = energy.float()
    bindings = energy.bind(x)
    # each level multiplies by one square matrix
    assert field_flops(energy, bindings) == 4 * 2 * (8 * 8 + 4 * 4 + 2 * 2)
    assert fine_sweep(energy, bindings) == 2 * 8 * 8
    metered = Metered(Relaxation(energy, bindings))
    with torch.no_grad():
        FixedPoint(max_steps=3, tolerance=0).solve(metered, energy.initial(bindings))
    assert metered.meter.total == 3 * field_flops(energy, bindings)
