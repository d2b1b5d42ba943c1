"""What makes TEP-SSR learn the rows of MNIST quickly: one epoch with a part of it changed, and its backprop twin.

python scripts/tepssr_rows.py [--epochs 1] [--twin] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch import nn

from toreq.data import Batches, Dataset, load
from toreq.diagnostics.relaxation import predictions
from toreq.layer import equilibria
from toreq.systems.tepssr_nets import StateSpaceClassifier

BASE: dict[str, Any] = {"selective": False, "attention": "none"}
VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped, time-invariant, no attention": {},
    "window=1": {"window": 1},
    'pool="mean"': {"pool": "mean"},
    "layers=0": {"layers": 0},
    "gain=1": {"gain": 1.0},
    "layers=2, gain=4": {"layers": 2, "gain": 4.0},
}
RATE, BATCH, WARMUP = 5e-3, 64, 50


def train(net: StateSpaceClassifier, twin: bool, data: Dataset, epochs: int, seed: int) -> tuple[float, float, float]:
    """Train by Adam with a rate that falls as a cosine; return test accuracy in percent, processor seconds, and the
    mean number of free and nudged steps together (0 for the twin)."""
    model: nn.Module = net.feedforward() if twin else net
    for layer in equilibria(model):
        layer.hasten()
        layer.warn = False
    batches = Batches(*data.split("train"), BATCH, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    total, step, taken = epochs * len(batches), 0, 0.0
    started = time.process_time()
    for epoch in range(epochs):
        for x, y in batches.epoch(epoch):
            rate = RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            net.criterion(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            for layer in equilibria(model):
                for phase in (layer.last.free, layer.last.nudged):
                    taken += 0.0 if phase is None else float(phase.steps.double().mean())
    seconds = time.process_time() - started
    found = predictions(model.eval(), data.inputs("test", slice(None)))
    return 100 * float((found == data.test_y).double().mean()), seconds, taken / step


def main() -> None:
    """Print a row for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--twin", action="store_true", help="one upward pass of the same network, by backprop")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = load("mnist")
    for name in args.only:
        torch.manual_seed(args.seed)
        net = StateSpaceClassifier((1, 28, 28), 10, **{**BASE, **VARIANTS[name]})
        accuracy, seconds, steps = train(net, args.twin, data, args.epochs, args.seed)
        print(f"{name:42} {accuracy:6.2f}%  {seconds:6.1f} s of the processor  {steps:5.1f} steps", flush=True)


if __name__ == "__main__":
    main()
