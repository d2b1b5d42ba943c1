"""Train the small network of the digit FID and write its weights into the package.

    python scripts/digit_features.py [--epochs 3] [--seed 0] [--out FILE]

All of MNIST's training images, Adam at 1e-3 over one cycle, batches of 128. Prints the test accuracy and the floor: the
distance between the features of the training and of the test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from toreq import data
from toreq.data import Batches
from toreq.evidence.difftoreqprop import features
from toreq.evidence.difftoreqprop.features import DigitFeatures, Moments, frechet

RATE, BATCH = 2e-3, 128


def train(epochs: int, seed: int) -> DigitFeatures:
    """The trained network."""
    torch.manual_seed(seed)
    net = DigitFeatures()
    mnist = data.load("mnist")
    batches = Batches(*mnist.split("train"), BATCH, seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * len(batches), pct_start=0.1)
    for epoch in range(epochs):
        for x, y in batches.epoch(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            cycle.step()
        print(f"epoch {epoch + 1} of {epochs}", flush=True)
    return net.eval()


def main(epochs: int, seed: int, out: Path) -> None:
    net = train(epochs, seed)
    held = {name: t.half().contiguous() for name, t in net.state_dict().items()}
    safetensors.torch.save_file(held, out, metadata={"epochs": str(epochs), "seed": str(seed)})
    net.load_state_dict({name: t.float() for name, t in held.items()})
    mnist = data.load("mnist")
    with torch.no_grad():
        found = torch.cat([net(part).argmax(1) for part in mnist.inputs("test", slice(None)).split(500)])
    parts = [Moments.of(net.features(mnist.inputs(part, slice(None)))) for part in ("train", "test")]
    print(f"test accuracy {100 * float((found == mnist.test_y).double().mean()):.2f}%")
    print(f"distance of test from training images {frechet(*parts):.3f}")
    print(f"wrote {out}, {out.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training images (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=features.WEIGHTS, help="where the weights go")
    main(**vars(parser.parse_args()))
