"""Steps that the base systems take to settle, by solver, at several bounds on their couplings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from toreq import systems
from toreq.bench.timing import environment, ratio
from toreq.core.spectral import relaxation_radius
from toreq.core.state import detached
from toreq.data import load
from toreq.solvers import Anderson, Fading, FixedPoint, Relaxation, Solver

BOUNDS = (0.5, 0.8, 0.95)
TOLERANCE, BATCH, MAX_STEPS = 1e-3, 64, 1000
SOLVERS: dict[str, Solver] = {
    "plain": FixedPoint(),
    "gauss-seidel": FixedPoint(order="gauss_seidel"),
    "fading": FixedPoint(torus=Fading(alpha=0.3)),
    "heavy ball": FixedPoint(torus=Fading(alpha=-0.4, length=1)),
    "anderson": Anderson(),
}


@torch.no_grad()
def run(archs: Sequence[str] | None = None, bounds: Sequence[float] = BOUNDS, batch: int = BATCH) -> dict[str, Any]:
    """Mean field evaluations to a relative residual of 1e-3 on MNIST images, couplings at their norm bound.

    The couplings are scaled up before the bound is applied, so that it is tight; the radius is measured at equilibrium.

    Args:
        archs: architectures of ``toreqprop``; all of them when None.
        bounds: norm bounds of all couplings together.
        batch: images.
    """
    x = load("mnist").images("test", slice(0, batch))
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for arch in archs or systems.architectures("toreqprop"):
        for bound in bounds:
            torch.manual_seed(0)
            net = systems.create("toreqprop", (1, 28, 28), 10, arch=arch, norm_bound=bound, coupling_scale=2.0)
            net.eval()
            energy = net.equilibrium.dynamics
            bindings = detached(energy.bind(x))
            steps: dict[str, float | None] = {}
            radius = 0.0
            for name, solver in SOLVERS.items():
                solver = dataclasses.replace(solver, tolerance=TOLERANCE, max_steps=MAX_STEPS)
                solution = solver.solve(Relaxation(energy, bindings), energy.initial(bindings))
                steps[name] = float(solution.steps.double().mean()) if bool(solution.converged.all()) else None
                if steps[name] is not None:
                    radius = float(relaxation_radius(energy, bindings, solution.state).mean())
            for name, taken in steps.items():
                rows.append({"arch": arch, "bound": bound, "radius": radius, "solver": name, "steps": taken})
            plain, on = steps["plain"], steps["anderson"]
            if plain is not None and on is not None:
                ratios.append(ratio(f"{arch}, radius {radius:.2f}: anderson / plain", on / plain, 1.0))
    return {"bench": "systems", "environment": environment(), "rows": rows, "ratios": ratios}
