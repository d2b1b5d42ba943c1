"""An ordinary transformer block as an equilibrium layer: patches of MNIST as tokens, h* = block(h* + x).

python examples/wrap_block.py [--train 1000] [--epochs 3]

`toreq.wrap` makes the prediction-error energy E = 1/2 |h - block(h + x)|^2 of any deterministic module, and trains it
by one nudged phase. The block must contract. A post-norm block whose last layer norm starts with a small gain does; a
pre-norm block adds its input to its output, which puts eigenvalues near 1 into the loop. Nothing bounds an ordinary
block in training, so longer runs may leave single examples unsettled: the layer then warns, and `last` counts them.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import toreq
from toreq import data
from toreq.estimators import Implicit


class PatchTransformer(nn.Module):
    """Sixteen patches of 7 x 7 pixels, embedded, settled by one block and read out by a linear head."""

    def __init__(self, features: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(49, features)
        self.position = nn.Parameter(torch.randn(16, features))
        block = nn.TransformerEncoderLayer(features, 4, 2 * features, dropout=0.0, batch_first=True)
        nn.init.constant_(block.norm2.weight, 0.3)
        solver = toreq.solvers.Anderson(tolerance=3e-4, max_steps=300)
        self.settle = toreq.wrap(block, (16, features), inject="add", solver=solver)
        self.head = nn.Linear(16 * features, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, 7, 7).unfold(3, 7, 7).reshape(-1, 16, 49)
        return self.head(self.settle(self.embed(patches) + self.position).flatten(1))


def gradient(net: PatchTransformer, x: Tensor, y: Tensor) -> Tensor:
    """All gradients of the loss as one vector."""
    net.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def main(train: int = 1000, test: int = 1000, epochs: int = 3, seed: int = 0) -> tuple[float, float]:
    """Train; return the cosine of the first gradient with the implicit one, and the test accuracy in [0, 1]."""
    torch.manual_seed(seed)
    mnist = data.load("mnist").limit(train=train, test=test)
    net = PatchTransformer()
    shipped = net.settle.estimator
    x, y = mnist.inputs("train", slice(0, 32)), mnist.train_y[:32]
    own = gradient(net, x, y)
    net.settle.estimator = Implicit()
    cosine = float(nn.functional.cosine_similarity(own, gradient(net, x, y), dim=0))
    net.settle.estimator = shipped
    print(f"cosine of {shipped.name} with implicit: {cosine:.6f}")

    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    batches = data.Batches(mnist.train_x, mnist.train_y, batch_size=50, seed=seed)
    accuracy = 0.0
    for epoch in range(epochs):
        for x, y in batches.epoch(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            answers = net(mnist.inputs("test", slice(None))).argmax(1)
        accuracy = float((answers == mnist.test_y).float().mean())
        free = net.settle.last.free
        assert free is not None
        print(
            f"epoch {epoch + 1}: test accuracy {accuracy:.2%}, {free.steps.float().mean():.1f} steps, "
            f"{free.converged.float().mean():.0%} settled"
        )
    return cosine, accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1000, help="training images (default: 1000)")
    parser.add_argument("--test", type=int, default=1000, help="test images (default: 1000)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
