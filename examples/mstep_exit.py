"""A pyramid of three levels on MNIST: train with a read-out on each level, then let easy digits leave early."""

import torch

from toreq import data
from toreq.systems.mstep import MultiScaleConv


def main(train: int = 4000, test: int = 1000, epochs: int = 2) -> dict[float, tuple[float, float]]:
    """Return, for each margin, the accuracy and the share of digits that were read on the finest level."""
    torch.manual_seed(0)
    mnist = data.load("mnist").limit(train, test)
    net = MultiScaleConv((1, 28, 28), 10, channels=(16, 32), exits=True, alone=True)
    net.equilibrium.hasten()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    x, y = mnist.inputs("train", slice(None)), mnist.train_y
    for index in (part for _ in range(epochs) for part in torch.randperm(len(y)).split(64)):
        net.criterion(net(x[index]), y[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for margin in (0.5, 0.9, 1.0):
        result = net.eval().predict(mnist.inputs("test", slice(None)), margin)
        found[margin] = ((result.logits.argmax(1) == mnist.test_y).float().mean().item(),
                         (result.level == 1).float().mean().item())  # fmt: skip
    return found


if __name__ == "__main__":
    for margin, (accuracy, finest) in main().items():
        print(f"margin {margin}: test accuracy {accuracy:.3f}, {finest:.0%} needed the finest level")
