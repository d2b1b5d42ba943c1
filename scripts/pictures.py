"""Draw docs/images/settling.png: a relaxation step by step, and learning curves beside backprop.

    python scripts/pictures.py [--out docs/images]

A short live run: toreqprop mlp on 10,000 images of the bundled MNIST, five epochs, three sides, one thread; then the
trained network's relaxation on 64 test images. Takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from toreq import Equilibrium, data, training
from toreq.solvers import Anderson, FixedPoint, Solver

ROOT = Path(__file__).resolve().parent.parent
IMAGES, EPOCHS, SHOWN, STEPS = 10_000, 5, 64, 16
SIDES = {"eqprop": "EqProp", "bp-eq": "implicit gradient", "bp-ff": "backprop, feed-forward twin"}
# Okabe and Ito's colours, distinct also in lightness
COLOURS, STYLES = ("#0072B2", "#D55E00", "#009E73"), ("-", "--", "-.")


def learn(folder: Path) -> tuple[dict[str, list[float]], Equilibrium, Tensor, Tensor]:
    """Train each side; return test accuracies by side, and the trained layer with test images and a cotangent."""
    curves: dict[str, list[float]] = {}
    for side in SIDES:
        config = training.config_for(
            "toreqprop", epochs=EPOCHS, limit_train=IMAGES, side=side, threads=1, out=str(folder / side)
        )
        training.train(config)
        lines = training.load_run(folder / side).folder.metrics()
        curves[side] = [100 * line["test_accuracy"] for line in lines if line["kind"] == "epoch"]
    net = training.load_run(folder / "eqprop").net.eval()
    mnist = data.load("mnist")
    x, y = mnist.inputs("test", slice(0, SHOWN)), mnist.test_y[:SHOWN]
    with torch.no_grad():
        h = net.equilibrium(x)
    h = h.requires_grad_()
    (cotangent,) = torch.autograd.grad(net.criterion(net.head(h), y), h)
    return curves, net.equilibrium, x, cotangent


def residuals(layer: Equilibrium, solver: Solver, x: Tensor, cotangent: Tensor | None = None) -> Tensor:
    """Median relative residual of each step, ``(T,)``: of the free phase, or of the nudged one."""
    layer.solver = dataclasses.replace(solver, tolerance=0.0, max_steps=STEPS)
    if cotangent is None:
        solution = layer.solve(x, record=True)
    else:
        layer.estimator = dataclasses.replace(layer.estimator, tolerance=0.0, max_halvings=0)  # type: ignore[type-var]
        solution = layer.solve_nudged(x, cotangent, record=True)
    assert solution.trace is not None
    return solution.trace.residual.median(1).values


def draw(curves: dict[str, list[float]], layer: Equilibrium, x: Tensor, cotangent: Tensor) -> Figure:
    """Three panels: residuals, energy, accuracies."""
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)

    def plot(axes: Axes, index: int, values: list[float], label: str) -> None:
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, STYLES[index], color=COLOURS[index], label=label, lw=1.6)

    floor = 2e-8  # float32 holds no smaller residual
    for i, (label, solver, v) in enumerate(
        [
            ("free, plain iteration", FixedPoint(), None),
            ("free, Anderson", Anderson(), None),
            ("nudged, Anderson", Anderson(), cotangent),
        ]
    ):
        plot(left, i, residuals(layer, solver, x, v).clamp_min(floor).tolist(), label)
    left.set(yscale="log", xlabel="step", title="relative residual (median)")
    left.legend()

    layer.solver = FixedPoint(tolerance=0.0, max_steps=STEPS)
    trace = layer.solve(x, record=True).trace
    assert trace is not None
    assert trace.energy is not None
    above = (trace.energy - trace.energy[-1]).median(1).values
    plot(middle, 0, above[: STEPS // 2].tolist(), "free, plain iteration")
    middle.set(xlabel="step", title="energy above its end (median)")
    middle.set_ylim(bottom=0)

    for i, (side, label) in enumerate(SIDES.items()):
        plot(right, i, curves[side], label)
    right.set(xlabel="epoch", title=f"test accuracy, % ({IMAGES:,} images)")
    right.legend(loc="lower right")
    for axes in (left, middle, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#d5d9de", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> int:
    """Draw; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder of the picture")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    settings = {"font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8, "legend.frameon": False}
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(settings):
        figure = draw(*learn(Path(folder)))
        out.mkdir(parents=True, exist_ok=True)
        # no metadata: it would name the version of matplotlib and change the file without a change of the picture
        figure.savefig(out / "settling.png", dpi=120, metadata={"Software": None})
    print(f"{out / 'settling.png'} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
