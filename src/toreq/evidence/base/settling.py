"""B4: the torus stabilises and speeds settling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from toreq.bench import settling as bench
from toreq.bench.settling import ball_rate, fading_rate
from toreq.evidence.base import nets
from toreq.evidence.claim import Claim, Criterion, Outcome, Picture, Quantity, Trial
from toreq.solvers import Anderson, Fading, FixedPoint, Solver

TOLERANCE, JUDGED_FROM = 1e-3, 0.9
RING, DECAY = 4, 0.5
OFF = "off"
SIDES = {
    OFF: "undamped iteration without a torus (the ablation)",
    "gauss-seidel": "one colour of nodes after the other, without a torus",
    "fading": "a fading torus of four slots, alpha > 0",
    "heavy ball": "a torus of one slot, alpha < 0: momentum",
    "anderson": "Anderson over the ring, as shipped",
}
TORUS = ("fading", "heavy ball", "anderson")


def run(trial: Trial) -> Outcome:
    """Sweeps to a relative residual of 1e-3 over the relaxation's radius, on quadratic energies."""
    radii = trial.budget.pick((0.5, 0.9), bench.RADII, bench.RADII)
    width, batch = trial.budget.pick((8, 2), (96, 16), (256, 64))
    most = trial.budget.pick(200, 1000, 2000)
    metrics: dict[str, Quantity] = {}
    curves: dict[str, list[tuple[float, float | None]]] = {problem: [] for problem in bench.PROBLEMS}
    saved: list[float] = []
    notes = [f"a side that has not settled counts {most} sweeps where it is compared"]
    for problem in bench.PROBLEMS:
        for radius in radii:
            ends = (-radius, min(radius, bench.TOP) if problem == "lateral" else radius)
            setup = bench.quadratic(problem, ends, width, batch, trial.seed)
            taken = bench.steps_to(_solver(trial.side, problem, ends, most), setup, TOLERANCE)
            curves[problem].append((radius, taken))
            metrics[f"steps, {problem}, radius {radius:g}"] = Quantity(taken, "sweeps")
            if radius < JUDGED_FROM or (problem == "bipartite" and radius >= 1):
                continue  # from radius 1 on the bipartite energy has no minimum
            plain = bench.steps_to(_solver(OFF, problem, ends, most), setup, TOLERANCE)
            saved.append(100 * (1 - (most if taken is None else taken) / (most if plain is None else plain)))
    metrics["steps saved at the worst radius"] = Quantity(min(saved), "%")
    metrics["steps saved, mean over radii"] = Quantity(sum(saved) / len(saved), "%")
    return Outcome(metrics, curves, notes=tuple(notes))


def _solver(side: str, problem: str, ends: tuple[float, float], most: int) -> Solver:
    """A side's solver; fading and heavy ball at the best of one grid of equal size for the ends of the spectrum."""
    if side == OFF:
        found: Solver = FixedPoint()
    elif side == "gauss-seidel":
        # on one node it is the plain iteration
        found = FixedPoint(order="gauss_seidel")
    elif side == "anderson":
        found = Anderson()
    elif side == "fading":
        damping, alpha = _best(fading_rate, ends)
        found = FixedPoint(damping=damping, torus=Fading(alpha=alpha, length=RING, decay=DECAY))
    else:
        damping, alpha = _best(ball_rate, ends)
        found = FixedPoint(damping=damping, torus=Fading(alpha=-alpha, length=1))
    return dataclasses.replace(found, max_steps=most)


def _best(rate: Callable[[float, float, float], float], ends: tuple[float, float]) -> tuple[float, float]:
    grid = [(g / 20, a / 20) for g in range(10, 21) for a in range(1, 20)]
    return min(grid, key=lambda p: max(rate(*p, e) for e in ends))


CLAIM = Claim(
    id="B4",
    system="toreqprop",
    seed_file=nets.SEED_FILE,
    sentence="The torus stabilises and speeds settling.",
    criteria=tuple(
        Criterion(
            f"{side}: steps saved at the worst radius",
            "steps saved at the worst radius",
            "%",
            "at_least",
            side,
            words="stabilises and speeds",
            aim=0.0,
            versus=(OFF,),
            beside=("gauss-seidel",),
        )
        for side in TORUS
    ),
    protocol="""
    Sweeps (one evaluation of the field on every node) to a relative residual of 1e-3, on two quadratic energies: one
    node coupled to itself with eigenvalues in [-radius, min(radius, 0.95)], and two nodes joined by a matrix (below
    radius 1, beyond which that energy has no minimum). Radii 0.5 to 1.2; judged from 0.9 on, at the radius where a side
    saves least against iteration without a torus. A side that does not settle counts as the most sweeps allowed. The
    two parameters of fading and of heavy ball are the best of one grid of equal size, chosen on the known ends of the
    spectrum; the other solvers are as shipped.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Sweeps to settle, one node coupled to itself",
        x_label="spectral radius of the coupling",
        y_label="sweeps to 1e-3",
        curves=("lateral",),
        log_y=True,
    ),
    exclusive=False,
)
