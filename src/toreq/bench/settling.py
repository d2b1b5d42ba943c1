"""Sweeps to settle, plain, by Gauss-Seidel, fading, as heavy ball and under Anderson, over the relaxation's radius."""

from __future__ import annotations

import cmath
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from toreq.bench.timing import environment
from toreq.bench.timing import threads as at_threads
from toreq.core import Bilinear, Dense, Drive, Energy, Identity, Lateral, Node
from toreq.core.state import detached, norm
from toreq.errors import ConfigError, nearest
from toreq.solvers import Anderson, Fading, FixedPoint, Relaxation, Solver

TOP = 0.95
"""Largest eigenvalue of the lateral coupling: the energy stays convex, so that every side has the same equilibrium."""
RADII = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.1, 1.2)
TOLERANCES = (1e-2, 1e-3, 1e-4)
PROBLEMS = ("lateral", "bipartite")
JUDGED_AT, JUDGED_FROM = 1e-3, 0.9


def run(
    seeds: Sequence[int] = (0, 1, 2),
    radii: Sequence[float] = RADII,
    tolerances: Sequence[float] = TOLERANCES,
    problems: Sequence[str] = PROBLEMS,
    width: int = 256,
    batch: int = 64,
    max_steps: int = 2000,
) -> dict[str, Any]:
    r"""Mean sweeps to each tolerance on quadratic energies; one evaluation of the field on every node is one sweep.

    ``lateral``: one node coupled to itself, eigenvalues uniform in [-radius, min(radius, 0.95)]. It has one colour, on
    which Gauss-Seidel is plain iteration, so that side is left out. ``bipartite``: two nodes joined by a matrix with
    singular values uniform in (0, radius], so that the coupling's eigenvalues are these and their negatives; from
    radius 1 on its energy has no minimum, only a saddle, and nothing is judged there.

    The parameters of fading and of heavy ball are the best of one grid of equal size for each, chosen on the known ends
    of the spectrum; the others are as shipped. A side that does not settle within ``max_steps`` has no number.

    Args:
        seeds: of the coupling and the drive.
        radii: spectral radii of the coupling.
        tolerances: relative residuals.
        problems: of ``lateral``, ``bipartite``.
        width: units of each node.
        batch: batch size.
        max_steps: most sweeps.

    Raises:
        ConfigError: for an unknown problem.
    """
    for problem in problems:
        if problem not in PROBLEMS:
            known = list(PROBLEMS)
            raise ConfigError(f"settling: expected problems of {known}, got {problem!r}; {nearest(problem, known)}")
    rows: list[dict[str, Any]] = []
    with at_threads(torch.get_num_threads()):
        for problem in problems:
            for radius in radii:
                ends = (-radius, min(radius, TOP) if problem == "lateral" else radius)
                setups = [quadratic(problem, ends, width, batch, seed) for seed in seeds]
                for name, solver in _sides(problem, ends, max_steps).items():
                    for tolerance in tolerances:
                        steps = [steps_to(solver, setup, tolerance) for setup in setups]
                        settled = [s for s in steps if s is not None]
                        mean = sum(settled) / len(settled) if len(settled) == len(steps) else None
                        row = {"problem": problem, "radius": radius, "side": name, "tolerance": tolerance}
                        rows.append({**row, "steps": mean})
        found = environment()
    return {"bench": "settling", "environment": found, "rows": rows, "ratios": _ratios(rows)}


def _sides(problem: str, ends: tuple[float, float], max_steps: int) -> dict[str, Solver]:
    grid = [(g, round(0.05 * k, 2)) for g in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0) for k in range(1, 20)]
    fading = min(grid, key=lambda p: max(fading_rate(*p, e) for e in ends))
    ball = min(grid, key=lambda p: max(ball_rate(*p, e) for e in ends))
    sides: dict[str, Solver] = {"plain": FixedPoint()}
    if problem == "bipartite":
        sides["gauss-seidel"] = FixedPoint(order="gauss_seidel")
    sides["fading"] = FixedPoint(damping=fading[0], torus=Fading(alpha=fading[1], length=4))
    sides["heavy ball"] = FixedPoint(damping=ball[0], torus=Fading(alpha=-ball[1], length=1))
    sides["anderson"] = Anderson()
    return {name: dataclasses.replace(solver, max_steps=max_steps) for name, solver in sides.items()}


def ball_rate(damping: float, alpha: float, eigenvalue: float) -> float:
    # a' = (1 - g + g e + g alpha) a - g alpha a_previous: the larger root of its quadratic
    trace, product = 1 - damping + damping * eigenvalue + damping * alpha, damping * alpha
    root = cmath.sqrt(trace * trace - 4 * product)
    return max(abs(trace + root), abs(trace - root)) / 2


def fading_rate(damping: float, alpha: float, eigenvalue: float, decay: float = 0.5, length: int = 4) -> float:
    r"""Rate of :math:`a' = (1-\gamma)\,a + \gamma\,(e\,a + \sum_r\alpha\rho^r a_{-r})/(1+\sum_r\alpha\rho^r)`, with
    :math:`r = 0 .. R-1`."""
    weights = [alpha * decay**r for r in range(length)]
    whole = 1 + sum(weights)
    companion = torch.zeros(length, length, dtype=torch.float64)
    companion[0] = torch.tensor([damping * w / whole for w in weights], dtype=torch.float64)
    companion[0, 0] += 1 - damping + damping * eigenvalue / whole
    companion[1:, :-1] = torch.eye(length - 1, dtype=torch.float64)
    return float(torch.linalg.eigvals(companion).abs().max())


def quadratic(
    problem: str, ends: tuple[float, float], width: int, batch: int, seed: int
) -> tuple[Energy, torch.Tensor]:
    """A quadratic energy whose coupling has the given ends of its spectrum, and its drives."""
    generator = torch.Generator().manual_seed(seed)
    double = torch.float64
    left, right = (torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=double))[0] for _ in range(2))
    low, high = ends
    op = Dense(width, width, symmetric=problem == "lateral").double()
    names = ["h"] if problem == "lateral" else ["h1", "h2"]
    with torch.no_grad():
        if problem == "lateral":
            op.weight.copy_(left @ torch.diag(torch.linspace(low, high, width, dtype=double)) @ left.T)
        else:
            values = torch.linspace(high / width, high, width, dtype=double)
            op.weight.copy_(left @ torch.diag(values) @ right.T)
    nodes = [Node(name, width, Identity()) for name in names]
    joined = Lateral(op, "h") if problem == "lateral" else Bilinear(op, *names)
    # only the first node is driven: the start is the drive, and one pass gives the other node
    energy = Energy(nodes, [Drive(names[0], nn.Identity()), joined])
    return energy, torch.randn(batch, width, generator=generator, dtype=double)


def steps_to(solver: Solver, setup: tuple[Energy, torch.Tensor], tolerance: float) -> float | None:
    energy, x = setup
    with torch.no_grad():
        bindings = detached(energy.bind(x))
        problem = Relaxation(energy, bindings)
        solution = dataclasses.replace(solver, tolerance=tolerance).solve(problem, energy.initial(bindings))
    # a diverging state whose norm overflows has a relative residual of zero
    settled = solution.converged & torch.isfinite(norm(solution.state))
    return float(solution.steps.double().mean()) if bool(settled.all()) else None


def _ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At every radius from 0.9 on with an equilibrium: sweeps of each side over those of plain iteration (below 1
    holds)."""
    out = []
    table = {(r["problem"], r["radius"], r["side"]): r["steps"] for r in rows if r["tolerance"] == JUDGED_AT}
    for (problem, radius, side), on in table.items():
        if side == "plain" or radius < JUDGED_FROM or (problem == "bipartite" and radius >= 1):
            continue
        plain = table[problem, radius, "plain"]
        # a side that settles where plain iteration does not is better without a finite ratio
        value = None if on is None or plain is None else on / plain
        holds = on is not None and (plain is None or on < plain)
        name = f"{problem}, radius {radius}: {side} / plain" + (" (which does not settle)" if plain is None else "")
        out.append({"name": name, "value": value, "target": 1.0, "holds": holds})
    return out
