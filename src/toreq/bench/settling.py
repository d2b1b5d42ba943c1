"""Steps to settle with the torus off, fading, as heavy ball, and under Anderson, over the relaxation's radius."""

from __future__ import annotations

import cmath
from typing import Any

import torch
from torch import nn

from toreq.bench.timing import environment
from toreq.core import Dense, Drive, Energy, Identity, Lateral, Node
from toreq.core.state import detached
from toreq.solvers import Anderson, Fading, FixedPoint, Relaxation, Solver

TOP = 0.95
"""Largest eigenvalue of the coupling: the energy stays convex, so that every side has the same equilibrium."""
RADII = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.1, 1.2)
TOLERANCES = (1e-2, 1e-3, 1e-4)
WIDTH, BATCH, MAX_STEPS = 256, 64, 2000


def run(seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """Mean steps to each tolerance on a quadratic energy whose coupling has eigenvalues uniform in [-radius,
    min(radius, 0.95)].

    The parameters of fading and of heavy ball are the best of one grid of equal size for each, chosen on the known ends
    of the spectrum; Anderson is as shipped. A side that does not settle within 2000 steps has no number.

    Args:
        seeds: of the coupling and the drive.
    """
    rows: list[dict[str, Any]] = []
    for radius in RADII:
        low, high = -radius, min(radius, TOP)
        for name, solver in _sides(low, high).items():
            for tolerance in TOLERANCES:
                steps = [_steps(solver, low, high, tolerance, seed) for seed in seeds]
                settled = [s for s in steps if s is not None]
                mean = sum(settled) / len(settled) if len(settled) == len(steps) else None
                rows.append({"radius": radius, "side": name, "tolerance": tolerance, "steps": mean})
    return {"bench": "settling", "environment": environment(), "rows": rows, "ratios": _ratios(rows)}


def _sides(low: float, high: float) -> dict[str, Solver]:
    grid = [round(0.05 * k, 2) for k in range(1, 20)]
    damping = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    fading = min(
        ((g, a) for g in damping for a in grid), key=lambda p: max(_fading_rate(p[0], p[1], e) for e in (low, high))
    )
    ball = min(
        ((g, a) for g in damping for a in grid), key=lambda p: max(_ball_rate(p[0], p[1], e) for e in (low, high))
    )
    return {
        "off": FixedPoint(max_steps=MAX_STEPS),
        "fading": FixedPoint(damping=fading[0], torus=Fading(alpha=fading[1], length=4), max_steps=MAX_STEPS),
        "heavy ball": FixedPoint(damping=ball[0], torus=Fading(alpha=-ball[1], length=1), max_steps=MAX_STEPS),
        "anderson": Anderson(max_steps=MAX_STEPS),
    }


def _ball_rate(damping: float, alpha: float, eigenvalue: float) -> float:
    # a' = (1 - g + g e + g alpha) a - g alpha a_previous: the larger root of its quadratic
    trace, product = 1 - damping + damping * eigenvalue + damping * alpha, damping * alpha
    root = cmath.sqrt(trace * trace - 4 * product)
    return max(abs(trace + root), abs(trace - root)) / 2


def _fading_rate(damping: float, alpha: float, eigenvalue: float, decay: float = 0.5, length: int = 4) -> float:
    weights = [alpha * decay**r for r in range(length)]
    companion = torch.zeros(length + 1, length + 1, dtype=torch.float64)
    companion[0, 0] = 1 - damping + damping * (eigenvalue - sum(weights))
    companion[0, 1:] = torch.tensor([damping * w for w in weights], dtype=torch.float64)
    companion[1:, :-1] = torch.eye(length, dtype=torch.float64)
    return float(torch.linalg.eigvals(companion).abs().max())


def _steps(solver: Solver, low: float, high: float, tolerance: float, seed: int) -> float | None:
    import dataclasses

    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
    op = Dense(WIDTH, WIDTH, symmetric=True).double()
    with torch.no_grad():
        op.weight.copy_(basis @ torch.diag(torch.linspace(low, high, WIDTH, dtype=torch.float64)) @ basis.T)
    energy = Energy([Node("h", WIDTH, Identity())], [Drive("h", nn.Identity()), Lateral(op, "h")])
    x = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        bindings = detached(energy.bind(x))
        problem = Relaxation(energy, bindings)
        solution = dataclasses.replace(solver, tolerance=tolerance).solve(problem, energy.initial(bindings))
    return float(solution.steps.double().mean()) if bool(solution.converged.all()) else None


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At every radius from 0.9 on: steps of the best torus over steps with it off (below 1 holds)."""
    out = []
    table = {(r["radius"], r["side"], r["tolerance"]): r["steps"] for r in rows}
    for radius in (r for r in RADII if r >= 0.9):
        for side in ("fading", "heavy ball", "anderson"):
            off, on = table[radius, "off", 1e-3], table[radius, side, 1e-3]
            # a side that settles where the other does not is better without a finite ratio
            value = None if on is None or off is None else on / off
            holds = on is not None and (off is None or on < off)
            out.append({"name": f"radius {radius}: {side} / off", "value": value, "target": 1.0, "holds": holds})
    return out
