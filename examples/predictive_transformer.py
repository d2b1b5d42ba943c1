"""Plain PyTorch transformer blocks trained by local error nodes (TPEqProp) in ten lines, on MNIST patches.

python examples/predictive_transformer.py [--train 2000] [--epochs 2]

Each block is a level of the energy E = 1/2 sum_l |h_l - f_l(h_{l-1})|^2. The forward pass is the ordinary one; backward
runs one nudged phase, in which each level's error node gets J^T eps from the level above, and every block learns from
its own error and the state below it. On a chain that is the gradient of backprop, which the example prints beside it.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from toreq import data
from toreq.systems.tpeqprop import chain


class Patches(nn.Module):
    """Sixteen patches of 7 x 7 pixels as tokens ``(B, 16, features)``, with learned positions."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.embed = nn.Linear(49, features)
        self.position = nn.Parameter(torch.randn(16, features) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x.unfold(2, 7, 7).unfold(3, 7, 7).reshape(-1, 16, 49)) + self.position


def cosine(net: nn.Module, plain: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of the network's gradient with that of backprop through the same modules."""
    found = []
    for model in (net, plain):
        net.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        found.append(torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]))
    return float(nn.functional.cosine_similarity(*found, dim=0))


def main(train: int = 2000, test: int = 1000, epochs: int = 2, seed: int = 0) -> tuple[float, float]:
    """Train; return the cosine of the first gradient with backprop's, and the test accuracy in [0, 1]."""
    torch.manual_seed(seed)
    mnist = data.load("mnist").limit(train=train, test=test)
    x, y = mnist.inputs("train", slice(0, 32)), mnist.train_y[:32]

    # --8<-- [start:ten]
    options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    blocks = [nn.TransformerEncoderLayer(32, 4, 64, **options) for _ in range(2)]
    embed, head = Patches(32), nn.Sequential(nn.Flatten(), nn.Linear(16 * 32, 10))
    net = nn.Sequential(chain(embed, *blocks, example=x[:1]), head)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()  # one nudged phase of local errors
        optimizer.step()

    # --8<-- [end:ten]
    agreement = cosine(net, nn.Sequential(embed, *blocks, head), x, y)
    print(f"cosine with backprop: {agreement:.7f}")
    batches = data.Batches(mnist.train_x, mnist.train_y, batch_size=50, seed=seed)
    accuracy = 0.0
    for epoch in range(epochs):
        for part in batches.epoch(epoch):
            step(*part)
        with torch.no_grad():
            answers = net(mnist.inputs("test", slice(None))).argmax(1)
        accuracy = float((answers == mnist.test_y).float().mean())
        print(f"epoch {epoch + 1}: test accuracy {accuracy:.2%}")
    return agreement, accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2000, help="training images (default: 2000)")
    parser.add_argument("--test", type=int, default=1000, help="test images (default: 1000)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over them (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
