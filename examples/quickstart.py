"""Train a network that settles on a slice of MNIST, with an ordinary PyTorch loop.

python examples/quickstart.py [--train 6000] [--epochs 3]
"""

from __future__ import annotations

import argparse

import torch

import toreq
from toreq import data


def main(train: int = 6000, test: int = 10_000, epochs: int = 3, seed: int = 0) -> float:
    """Train and return the test accuracy in [0, 1]."""
    torch.manual_seed(seed)
    mnist = data.load("mnist").limit(train=train, test=test)
    net = toreq.systems.create("toreqprop", input_shape=mnist.input_shape, num_classes=mnist.num_classes)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)

    batches = data.Batches(mnist.train_x, mnist.train_y, batch_size=50, seed=seed)
    accuracy = 0.0
    for epoch in range(epochs):
        for x, y in batches.epoch(epoch):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x), y)  # the free phase
            loss.backward()  # both nudged phases, and their contrast as the gradient
            optimizer.step()
        free, nudged = net.equilibrium.last.free, net.equilibrium.last.nudged
        assert free is not None
        assert nudged is not None
        assert nudged.asym is not None
        with torch.no_grad():
            answers = net(mnist.inputs("test", slice(None))).argmax(1)
        accuracy = float((answers == mnist.test_y).float().mean())
        print(
            f"epoch {epoch + 1}: loss {float(loss.detach()):.3f}, test accuracy {accuracy:.2%}, "
            f"{free.steps.float().mean():.1f} free and {nudged.steps.float().mean():.1f} nudged steps, "
            f"asym {nudged.asym.mean():.3f}"
        )
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=6000, help="training images (default: 6000)")
    parser.add_argument("--test", type=int, default=10_000, help="test images (default: all)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
