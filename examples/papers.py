"""The papers' network: 784-512-10 with the output units inside the energy, nudged by the cost itself.

python examples/papers.py [--train 5000] [--epochs 2]

Centered Equilibrium Propagation as in Laborieux et al. (2021): squared error to one-hot targets, force
-beta dC/dh at the moving output, an absolute beta.
"""

from __future__ import annotations

import argparse

import torch

import toreq
from toreq import data
from toreq.core import State
from toreq.estimators import Centered


def main(train: int = 5000, test: int = 2000, epochs: int = 2, beta: float = 0.5, seed: int = 0) -> float:
    """Train and return the test accuracy in [0, 1]."""
    torch.manual_seed(seed)
    mnist = data.load("mnist").limit(train=train, test=test)
    net = toreq.systems.create(
        "toreqprop",
        input_shape=mnist.input_shape,
        num_classes=mnist.num_classes,
        arch="hopfield",
        hidden=(512,),
        nonlinearity="hard_sigmoid",
        output="node",
        estimator=Centered(nudge="cost", beta=beta),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    batches = data.Batches(mnist.train_x, mnist.train_y, batch_size=100, seed=seed)
    accuracy = 0.0
    for epoch in range(epochs):
        for x, y in batches.epoch(epoch):
            target = torch.nn.functional.one_hot(y, 10).to(x.dtype)

            def cost(out: State, target: torch.Tensor = target) -> torch.Tensor:
                return 0.5 * (out["output"] - target).square().sum(1)  # (B,): one cost per example

            optimizer.zero_grad()
            net.equilibrium.loss(x, cost).backward()
            optimizer.step()
        with torch.no_grad():
            answers = net(mnist.inputs("test", slice(None))).argmax(1)
        accuracy = float((answers == mnist.test_y).float().mean())
        print(f"epoch {epoch + 1}: test accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=5000, help="training images (default: 5000)")
    parser.add_argument("--test", type=int, default=2000, help="test images (default: 2000)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over them (default: 2)")
    parser.add_argument("--beta", type=float, default=0.5, help="strength of the nudge (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
