"""How errors travel through deep TPEqProp networks: the size of each level's error by depth and branch scaling.

    python scripts/tpeqprop_depth.py [--depths 2 8 32 128] [--scalings sqrt linear] [--width 64] [--steps 100]

For each depth and each scaling of the residual branches (by the root of their number, by their number, not at all),
at initialisation and after some steps of Adam on MNIST: the size of the error node at the first level and in the
middle relative to the last one (1: errors neither vanish nor explode), the size of the last level's state relative to
the first one's, the cosine of the float32 gradient with the implicit one in float64 (the smallest over parameters),
and the loss on the training batches.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor

from toreq import data
from toreq.errors import DivergenceError
from toreq.estimators import Implicit
from toreq.systems.tpeqprop import DEPTH_SCALES, TPEqProp
from toreq.systems.tpeqprop_nets import PredictiveResidual


def gradients(net: TPEqProp, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradient of the criterion for every parameter."""
    net.zero_grad()
    net.criterion(net(x), y).backward()
    return {n: p.grad.detach().clone() for n, p in net.named_parameters() if p.grad is not None}


def smallest_cosine(net: TPEqProp, x: Tensor, y: Tensor) -> float:
    """Of the net's own gradient with the implicit one in float64, over parameters."""
    exact = copy.deepcopy(net).double()
    exact.equilibrium.estimator = Implicit(tolerance=1e-13, max_steps=1000)
    wanted, found = gradients(exact, x.double(), y), gradients(net, x, y)
    cosines = [
        torch.nn.functional.cosine_similarity(g.double().flatten(), wanted[n].flatten(), dim=0)
        for n, g in found.items()
    ]
    return float(torch.stack(cosines).min())


def measured(net: TPEqProp, x: Tensor, y: Tensor) -> list[str]:
    """One row of the table without its first columns."""
    errors = list(net.errors(x, y).values())
    last = errors[-1]
    states = list(net.equilibrium.solve(x).h.values())
    growth = (states[-1].flatten(1).norm(dim=1) / states[0].flatten(1).norm(dim=1)).median()
    ratios = [float((errors[i] / last).nanmedian()) for i in (0, len(errors) // 2)]
    off = 1 - smallest_cosine(net, x, y)
    return [f"{ratios[0]:.3g}", f"{ratios[1]:.3g}", f"{float(growth):.3g}", f"{off:.1e}"]


def trained(net: TPEqProp, mnist: data.Dataset, steps: int, rate: float) -> float:
    """Train in place; return the mean loss of the last 20 batches."""
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    losses = []
    for i in range(steps):
        part = slice(100 * i, 100 * (i + 1))
        optimizer.zero_grad()
        loss = net.criterion(net(mnist.inputs("train", part)), mnist.train_y[part])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / len(losses[-20:])


def study(depths: list[int], scalings: list[str], width: int, steps: int, rate: float, seed: int) -> None:
    """Print the table."""
    mnist = data.load("mnist").limit(train=100 * steps + 100, test=1)
    head = ("levels", "scaling", "when", "first/last", "middle/last", "state growth", "1 - cosine", "loss")
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for depth in depths:
        for scaling in scalings:
            torch.manual_seed(seed)
            net = PredictiveResidual(mnist.input_shape, 10, width=width, levels=depth, depth_scale=scaling)
            x, y = mnist.inputs("train", slice(0, 32)), mnist.train_y[:32]
            with torch.no_grad():
                loss = float(net.criterion(net(x), y))
            print(
                "| " + " | ".join([str(depth), scaling, "init", *measured(net, x, y), f"{loss:.3g}"]) + " |", flush=True
            )
            start = [str(depth), scaling, f"after {steps}"]
            try:
                mean = trained(net, mnist, steps, rate)
                row = [*start, *measured(net, x, y), f"{mean:.3g}"]
            except DivergenceError:
                row = [*start, "-", "-", "-", "-", "diverged"]
            print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--scalings", nargs="+", default=list(DEPTH_SCALES), choices=list(DEPTH_SCALES))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    study(given.depths, given.scalings, given.width, given.steps, given.rate, given.seed)


if __name__ == "__main__":
    main()
