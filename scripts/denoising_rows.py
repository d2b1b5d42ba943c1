"""Train a denoising DiffTorEqProp on MNIST and print what it leaves of the best linear filter's error, by noise level.

    python scripts/denoising_rows.py --steps 300 --rate 0.03 --set gain=0.0625 label_gain=128
    python scripts/denoising_rows.py --steps 2800 --settings fast --samples 1000 --out digits.png

1 is the filter alone. With ``--samples`` also the digit FID of as many samples beside that of training images.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from toreq import systems
from toreq.cli.parsing import literal
from toreq.data import Dataset
from toreq.diagnostics.samples import grid, png
from toreq.evidence.base import nets as shared
from toreq.evidence.difftoreqprop import nets
from toreq.evidence.difftoreqprop.features import Moments, classes_found, digit_fid, shipped
from toreq.systems import Anneal, DiffTorEqProp, Seen

LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
TESTED = 500


@torch.no_grad()
def left(net: DiffTorEqProp, data: Dataset) -> list[float]:
    """Mean square error of denoising test images over that of the linear filter, at each of ``LEVELS``."""
    assert net.filter is not None
    x, g, found = data.inputs("test", slice(0, TESTED)), torch.Generator().manual_seed(9), []
    for s in LEVELS:
        level = torch.full((len(x),), s)
        clean = net.denoise(Seen(x + s * torch.randn(x.shape, generator=g), level))
        found.append(float((clean - x).square().mean() / net.filter.left(level)[0]))
    return found


def main(
    steps: int, rate: float, batch: int, channels: int, dense: int, settings: str, options: list[str],
    samples: int, out: str, seed: int,
) -> list[float]:  # fmt: skip
    """Train, print and perhaps draw; returns what :func:`left` gives."""
    torch.set_flush_denormal(True)
    data = shared.mnist(60_000, 2_000)
    x, y = data.inputs("train", slice(None)), data.train_y
    torch.manual_seed(seed)
    more = {k: literal(v) for k, v in (o.split("=") for o in options)}
    net = nets.quiet(
        systems.create(
            "difftoreqprop", nets.SHAPE, nets.CLASSES, arch="conv", channels=(channels,), dense=(dense,) * (dense > 0),
            denoising=1.0, settings=settings, **more,
        )
    )  # fmt: skip
    assert isinstance(net, DiffTorEqProp)
    net.observe(x)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 30) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    g, started = torch.Generator().manual_seed(seed + 1), time.perf_counter()
    net.train()
    for i in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=g)
        optimizer.zero_grad()
        loss = net.criterion(net(x[chosen]), y[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if i % 100 == 99:
            print(f"{i + 1}: loss {float(loss.detach()):.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    net.eval()
    found = left(net, data)
    print("left of the filter's error:", ", ".join(f"{v:.3f} at {s:g}" for s, v in zip(LEVELS, found, strict=True)))
    tx, ty = nets.shown(data, "cpu")
    with torch.no_grad():
        right = float((net(tx).argmax(1) == ty).double().mean())
    print(f"test accuracy {right:.2%} (2,000 images), radius {net.radius(tx[:32]):.2f}")
    if samples:
        reference = Moments.of(shipped().features(x))
        low, high = net.span
        drawn = net.sample(
            samples, anneal=Anneal(levels=25, high=high, low=low), batch=100, generator=torch.Generator().manual_seed(3)
        ).clamp(0, 1)
        classes = torch.bincount(classes_found(drawn), minlength=nets.CLASSES).tolist()
        floor = digit_fid(x[:samples], reference)
        print(f"digit FID {digit_fid(drawn, reference):.1f} (as many training images: {floor:.1f}), classes {classes}")
        if out:
            Path(out).write_bytes(png(grid(drawn[:64], 8)))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=0.03, help="Adam's, at the top of a half cosine (default: 0.03)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--channels", type=int, default=24)
    parser.add_argument("--dense", type=int, default=512, help="width of the dense layer, 0 for none (default: 512)")
    parser.add_argument("--settings", choices=("exact", "fast"), default="exact")
    parser.add_argument("--set", dest="options", nargs="*", default=[], metavar="KEY=VALUE", help="of the system")
    parser.add_argument("--samples", type=int, default=0, help="to draw and judge (default: none)")
    parser.add_argument("--out", default="", help="a picture of 64 samples")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
