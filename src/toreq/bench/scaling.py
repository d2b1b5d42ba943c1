"""How the time of a training step grows with the batch and with the width."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from toreq.bench.nets import Sizes, build
from toreq.bench.timing import environment, interleaved, ratio
from toreq.bench.timing import threads as at_threads
from toreq.data import Batches, load
from toreq.errors import ConfigError, nearest

NETS = ("mlp", "lateral")
SIDES = ("toreq", "backprop")


def run(
    nets: Sequence[str] = NETS,
    batches: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024),
    widths: Sequence[int] = (128, 256, 512, 1024, 2048),
    width: int = 512,
    batch: int = 128,
    threads: Sequence[int] = (1, 2),
    warm: int = 30,
    repetitions: int = 11,
) -> dict[str, Any]:
    """Time training steps (forward, backward, Adam) on MNIST of toreq and of its feed-forward twin by backprop, both
    in the settings of :mod:`toreq.bench.nets`.

    Every side first trains for ``warm`` steps. The exponent is the slope of log time against log size by least squares
    over the upper half of the sizes (the middle one included), where fixed costs matter least.

    Args:
        nets: of ``mlp`` (784-width-10, the output node inside the energy), ``lateral`` (ToroidalMLP).
        batches: batch sizes, at width ``width``.
        widths: widths, at batch ``batch``.
        width: see ``batches``.
        batch: see ``widths``.
        threads: thread counts.
        warm: training steps before the timing.
        repetitions: counted steps of each side.

    Raises:
        ConfigError: for an unknown net, or fewer than two sizes.
    """
    for net in nets:
        if net not in NETS:
            raise ConfigError(f"scaling: expected nets of {NETS}, got {net!r}; {nearest(net, NETS)}")
    if min(len(batches), len(widths)) < 2:
        raise ConfigError(f"scaling: expected two sizes or more, got {batches} and {widths}; an exponent needs two")
    rows: list[dict[str, Any]] = []
    for net in nets:
        for against, points in (
            ("batch", [(width, size) for size in batches]),
            ("width", [(size, batch) for size in widths]),
        ):
            for wide, many in points:
                with at_threads(1):
                    sides = _sides(net, wide, many)
                    for _ in range(warm):
                        for step in sides.values():
                            step()
                for count in threads:
                    with at_threads(count):
                        timings = interleaved(sides, repetitions, warmup=1)
                    for side, timing in timings.items():
                        row = {"net": net, "against": against, "width": wide, "batch": many, "threads": count}
                        rows.append({**row, "side": side, **timing.milliseconds()})
    fits = _fits(rows)
    ratios = [
        ratio(
            f"{f['net']}, {f['threads']} thread(s): exponent of {f['side']} in {f['against']} ({f['points']})",
            f["exponent"],
            None,
        )
        for f in fits
    ]
    return {"bench": "scaling", "environment": environment(), "rows": rows, "fits": fits, "ratios": ratios}


def exponent(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    r"""Least squares of :math:`\log t = p\log n + c` over the upper half of the sizes, the middle one included.

    Args:
        sizes: n, ascending, at least two.
        times: t, above 0.

    Returns:
        p, c, and the share :math:`r^2` of the variance that the line explains (1 when all times are equal).
    """
    x = [math.log(n) for n in sizes[_start(sizes) :]]
    y = [math.log(t) for t in times[_start(sizes) :]]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
    total = sum((b - my) ** 2 for b in y)
    left = sum((b - my - slope * (a - mx)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, my - slope * mx, 1 - left / total if total else 1.0


def _start(sizes: Sequence[float]) -> int:
    """Where the upper half of the sizes starts; it has two at least."""
    return min((len(sizes) - 1) // 2, len(sizes) - 2)


def _fits(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    series: dict[tuple[str, str, str, int], list[tuple[int, float]]] = {}
    for row in rows:
        key = row["net"], row["against"], row["side"], row["threads"]
        series.setdefault(key, []).append((row[row["against"]], row["median_ms"]))
    fits = []
    for (net, against, side, count), points in series.items():
        sizes, times = zip(*sorted(points), strict=True)
        slope, offset, r2 = exponent(sizes, times)
        used = [int(n) for n in sizes[_start(sizes) :]]
        fit = {"net": net, "against": against, "side": side, "threads": count, "exponent": slope, "r2": r2}
        fits.append({**fit, "points": f"{used[0]} to {used[-1]}", "log_offset": offset})
    return fits


def _sides(net: str, width: int, batch: int) -> dict[str, Callable[[], None]]:
    data = load("mnist")
    x, y = data.split("train")
    sides: dict[str, Callable[[], None]] = {}
    for side in SIDES:
        trainer = build(net, side, data.input_shape, data.num_classes, Sizes(width=width))
        stream = _stream(x, y, batch)
        sides[side] = lambda trainer=trainer, stream=stream: trainer.step(*next(stream))
    return sides


def _stream(x: Tensor, y: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    batches = Batches(x, y, batch, seed=0, drop_last=True)
    return (pair for epoch in itertools.count() for pair in batches.epoch(epoch))
