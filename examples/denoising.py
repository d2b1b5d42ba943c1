"""One network that classifies, denoises, completes and generates digits (DiffTorEqProp), trained by EqProp.

python examples/denoising.py [--train 20000] [--epochs 2] [--out digits.png]

The image pulls on a visible node that settles with the hidden layers. Training removes noise of every level from it and
names the digit; sampling walks the noise levels backwards on a ring.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from toreq import data, systems
from toreq.diagnostics.samples import grid, png
from toreq.systems import Anneal, DiffTorEqProp, Known, Seen


def complete(net: DiffTorEqProp, x: Tensor, levels: int) -> Tensor:
    """The images with their lower halves painted anew."""
    mask = torch.zeros(x.shape[1:], dtype=torch.bool)
    mask[:, : x.shape[2] // 2] = True
    low, high = net.span
    anneal = Anneal(levels=levels, high=high, low=low)
    return net.sample(len(x), anneal=anneal, known=Known(x, mask), batch=len(x))


def main(
    train: int = 20_000,
    test: int = 1000,
    epochs: int = 2,
    hidden: int = 512,
    memory: int = 500,
    levels: int = 50,
    out: str = "",
    seed: int = 0,
) -> tuple[float, float]:
    """Train; return the test accuracy in [0, 1], and the share of noise of 0.5 that denoising leaves (mean square)."""
    torch.manual_seed(seed)
    mnist = data.load("mnist").limit(train=train, test=test)

    # --8<-- [start:train]
    net = systems.create(
        "difftoreqprop", (1, 28, 28), 10, hidden=(hidden,), denoising=1.0, memory=memory, settings="fast"
    )
    net.observe(mnist.inputs("train", slice(None)))  # mean, covariance, first patterns: they are not learned
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for x, y in data.Batches(mnist.train_x, mnist.train_y, batch_size=64, seed=seed).epoch(epoch):
            optimizer.zero_grad()
            net.criterion(net(x), y).backward()  # the classes, and the noise that the criterion puts on x
            optimizer.step()
    net.eval()
    # --8<-- [end:train]

    assert isinstance(net, DiffTorEqProp)
    x, y = mnist.inputs("test", slice(None)), mnist.test_y
    noisy = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        accuracy = float((net(x).argmax(1) == y).double().mean())
        clean = net.denoise(Seen(noisy, torch.full((len(x),), 0.5)))
    left = float((clean - x).square().mean()) / 0.5**2
    print(f"test accuracy {accuracy:.2%}; of the noise's mean square {left:.1%} is left")
    if out:
        low, high = net.span
        classes = torch.arange(20) % 10
        drawn = net.sample(20, anneal=Anneal(levels=levels, high=high, low=low), labels=classes, batch=20)
        rows = [noisy[:10], clean[:10], x[:10], complete(net, x[:10], levels), drawn]
        Path(out).write_bytes(png(grid(torch.cat(rows), 10)))
        print(f"wrote {out}: noisy, denoised, clean, completed from the upper half, drawn by class")
    return accuracy, left


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=20_000, help="training images (default: 20000)")
    parser.add_argument("--test", type=int, default=1000, help="test images (default: 1000)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over them (default: 2)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden units (default: 512)")
    parser.add_argument("--memory", type=int, default=500, help="patterns of the memory, 0 for none (default: 500)")
    parser.add_argument("--levels", type=int, default=50, help="noise levels of sampling (default: 50)")
    parser.add_argument("--out", default="digits.png", help="the picture (default: digits.png)")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
