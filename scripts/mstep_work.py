"""What settling a pyramid costs: a table of work by solver and by strength of the springs.

    python scripts/mstep_work.py                          # MNIST digits, all architectures
    python scripts/mstep_work.py --arch conv --size 64    # blobs of that size
    python scripts/mstep_work.py --arch sequence --tokens 1024

Work is counted in evaluations of the field on the finest level, by floating-point operations. Plain, Gauss-Seidel and
Anderson run with every damping given, and the best of each is shown; CoarseToFine runs as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from toreq import data
from toreq.core.state import detached
from toreq.diagnostics.work import Meter, Metered, fine_sweep
from toreq.solvers import Anderson, CoarseToFine, FixedPoint, Relaxation, Solver
from toreq.systems.mstep import MultiScale, MultiScaleConv, MultiScaleDense, MultiScaleSequence

DAMPINGS = (1.0, 0.6, 0.35, 0.2, 0.1, 0.05)


def solvers(tolerance: float, most: int) -> Iterator[tuple[str, Solver]]:
    """Every solver with the column it belongs to."""
    for d in DAMPINGS:
        yield "plain", FixedPoint(damping=d, tolerance=tolerance, max_steps=most)
        yield "Gauss-Seidel", FixedPoint(damping=d, order="gauss_seidel", tolerance=tolerance, max_steps=most)
        for length in (3, 6):
            yield "Anderson", Anderson(length=length, damping=d, tolerance=tolerance, max_steps=most)
    yield "coarse to fine", CoarseToFine(tolerance=tolerance, max_steps=most)
    yield "nested", CoarseToFine(tolerance=tolerance, max_steps=most, nested=2)
    yield "coarse twice", CoarseToFine(tolerance=tolerance, max_steps=most, coarse_sweeps=2, joint=False)
    yield "by level", CoarseToFine(tolerance=tolerance, max_steps=most, joint=False)


def network(arch: str, strength: float, size: int, tokens: int) -> MultiScale:
    """A fresh network of one architecture."""
    torch.manual_seed(0)
    shape = (1, size, size)
    if arch == "conv":
        return MultiScaleConv(shape, 10, strength=strength, channels=(16, 32)).eval()
    if arch == "dense":
        return MultiScaleDense(shape, 10, strength=strength, hidden=(256,)).eval()
    if tokens:
        return MultiScaleSequence((tokens,), 10, strength=strength, features=48, vocabulary=16, pool="mean").eval()
    return MultiScaleSequence(shape, 10, strength=strength, features=48, patch=7 if size == 28 else 8).eval()


def inputs(size: int, tokens: int, count: int) -> Tensor:
    """MNIST digits, blobs of another size, or random symbols."""
    g = torch.Generator().manual_seed(0)
    if tokens:
        return torch.randint(0, 16, (count, tokens), generator=g)
    if size == 28:
        return data.load("mnist").limit(count, 1).inputs("train", slice(None))
    coarse = torch.rand(count, 1, 8, 8, generator=g)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")


def measure(net: MultiScale, x: Tensor, tolerance: float, most: int) -> dict[str, float]:
    """The least work of each column; infinity where nothing settled."""
    dynamics = net.equilibrium.dynamics
    bindings = detached(dynamics.bind(x))
    unit, costs = fine_sweep(dynamics, bindings) * len(x), {}
    found: dict[str, float] = {}
    with torch.no_grad():
        for column, solver in solvers(tolerance, most):
            problem = Metered(Relaxation(dynamics, bindings, as_map=True), Meter(costs=costs))
            solution = solver.solve(problem, dynamics.initial(bindings))
            work = problem.meter.total / unit if bool(solution.converged.all()) else float("inf")
            found[column] = min(found.get(column, float("inf")), work)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=["conv", "dense", "sequence"])
    parser.add_argument("--strengths", nargs="*", type=float, default=[0.1, 1.0, 4.0])
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--examples", type=int, default=2)
    parser.add_argument("--most", type=int, default=150)
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    x = inputs(given.size, given.tokens, given.examples)
    header = False
    for arch in given.arch:
        for strength in given.strengths:
            row = measure(network(arch, strength, given.size, given.tokens), x, given.tolerance, given.most)
            if not header:
                print("| arch | strength |", " | ".join(row), "| saved |\n|", "--- |" * (len(row) + 3))
                header = True
            saved = min(row[k] for k in ("plain", "Gauss-Seidel", "Anderson")) / row["coarse to fine"]
            print(
                f"| {arch} | {strength:g} |",
                " | ".join(f"{v:.1f}" for v in row.values()),
                f"| {saved:.1f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
