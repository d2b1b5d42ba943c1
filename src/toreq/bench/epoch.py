"""Seconds of a training epoch of every side, all sides in turn on the same batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from toreq.bench import nets as catalogue
from toreq.bench.accuracy import accuracy
from toreq.bench.nets import Sizes
from toreq.bench.references import Trainer
from toreq.bench.timing import Timing, environment, ratio, threads
from toreq.data import Batches, Dataset, load
from toreq.errors import ConfigError, nearest

BATCH = 128
LIMIT = 180.0
"""Seconds of an epoch above which a side runs only some of its batches."""
SAMPLED = 30
WARM_STEPS = 3

RATIOS: tuple[tuple[str, str, str, float | None, bool], ...] = (
    ("mlp", "autograd", "toreq", 15.0, False),
    ("mlp", "torchdeq", "toreq", 8.0, False),
    ("mlp", "red-black", "toreq", None, False),
    ("mlp", "unrolled", "toreq", None, False),
    ("mlp", "toreq", "backprop", 1.8, True),
    ("mlp", "toreq-exact", "backprop", None, True),
    ("lateral", "unrolled", "toreq", None, False),
    ("lateral", "toreq", "backprop", 4.0, True),
    ("lateral", "toreq-exact", "backprop", None, True),
    ("conv", "autograd", "toreq", 25.0, False),
    ("conv", "red-black", "toreq", 8.0, False),
    ("conv", "unrolled", "toreq", None, False),
    ("conv", "toreq", "backprop", 8.0, True),
    ("conv", "toreq-exact", "backprop", None, True),
)
"""Net, side above, side below, target (nothing is judged without one), and whether the ratio is to be at most that."""

ACCURACY_GAP = {"mlp": 0.2}
"""Net -> points of test accuracy by which toreq may stay below backprop after the epoch."""


@dataclass
class _Run:
    """A side with what has been measured of it."""

    trainer: Trainer
    wanted: frozenset[int]  # numbers of the batches it runs
    wall: dict[int, float] = field(default_factory=dict)  # batch number -> seconds
    cpu: dict[int, float] = field(default_factory=dict)
    images: int = 0
    settling: list[dict[str, float | None]] = field(default_factory=list)


def run(
    nets: Sequence[str] = ("mlp", "lateral", "conv"),
    sides: Sequence[str] | None = None,
    threads: Sequence[int] = (1, 2),
    batches: int | None = None,
    sampled: int = SAMPLED,
    limit: float = LIMIT,
    batch_size: int = BATCH,
    data: Dataset | None = None,
    sizes: Sizes | None = None,
) -> dict[str, Any]:
    """Time training steps (relaxation, gradient, Adam) over an epoch of 60,000 images, each side in turn on each batch.

    A throw-away copy of every side warms up first. Sides whose epoch would then take longer than ``limit`` run only
    ``sampled`` batches, evenly spread over the epoch, and are extrapolated, which is fair to them since their numbers
    of steps are fixed. A ratio compares two sides on the batches that both have run. Reading a batch is not counted.

    Args:
        nets: which of ``mlp``, ``lateral``, ``conv``.
        sides: which sides; all of each net when None.
        threads: thread counts; every one trains anew.
        batches: only this many of the epoch's batches, its first ones; all when None.
        sampled: batches of a slow side.
        limit: seconds of an epoch above which a side is slow.
        batch_size: images in a batch, the same for all sides.
        data: MNIST when None.
        sizes: of the networks.

    Raises:
        ConfigError: for an unknown net or side, or a count below 1.
    """
    _check(nets, sides, batches, sampled)
    data = load("mnist") if data is None else data
    stream = Batches(*data.split("train"), batch_size, seed=0)
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for net in nets:
        for count in threads:
            runs = _timed(net, sides, count, stream, batches, sampled, limit, data, sizes)
            found = [_row(net, side, count, done, stream, data) for side, done in runs.items()]
            rows += found
            ratios += _ratios(net, count, runs)
            if count == threads[0]:
                ratios += _gaps(net, found)
    return {"bench": "epoch", "environment": environment(), "batch_size": batch_size, "rows": rows, "ratios": ratios}


def _check(nets: Sequence[str], sides: Sequence[str] | None, batches: int | None, sampled: int) -> None:
    known = sorted({side for net in nets for side in catalogue.names(net)})
    for side in sides or ():
        if side not in known:
            raise ConfigError(f"epoch: expected sides of {', '.join(nets)}, got {side!r}; {nearest(side, known)}")
    if sampled < 1 or (batches is not None and batches < 1):
        raise ConfigError(f"epoch: expected counts of at least 1, got sampled={sampled} and batches={batches}")


def _timed(
    net: str,
    sides: Sequence[str] | None,
    count: int,
    stream: Batches,
    batches: int | None,
    sampled: int,
    limit: float,
    data: Dataset,
    sizes: Sizes | None,
) -> dict[str, _Run]:
    total = len(stream) if batches is None else min(batches, len(stream))
    with threads(count):
        runs: dict[str, _Run] = {}
        for side in catalogue.names(net):
            if sides is not None and side not in sides:
                continue
            seconds = _warm(catalogue.build(net, side, data.input_shape, data.num_classes, sizes), stream)
            slow = seconds * len(stream) > limit and sampled < total
            wanted = torch.linspace(0, total - 1, sampled).round().int().tolist() if slow else range(total)
            trainer = catalogue.build(net, side, data.input_shape, data.num_classes, sizes)
            runs[side] = _Run(trainer, frozenset(wanted))
        for number, (images, labels) in enumerate(stream.epoch(0)):
            if number >= total:
                break
            for done in runs.values():
                if number not in done.wanted:
                    continue
                started, used = time.perf_counter(), time.process_time()
                done.trainer.step(images, labels)
                done.wall[number] = time.perf_counter() - started
                done.cpu[number] = time.process_time() - used
                done.images += len(labels)
                done.settling.append(catalogue.settling(done.trainer))
    return runs


def _warm(trainer: Trainer, stream: Batches) -> float:
    """Seconds of a step: the median of a few, the first of which pays for what is set up once."""
    images, labels = next(stream.epoch(0))
    taken = []
    for _ in range(WARM_STEPS):
        started = time.perf_counter()
        trainer.step(images, labels)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _row(net: str, side: str, count: int, done: _Run, stream: Batches, data: Dataset) -> dict[str, Any]:
    wall = list(done.wall.values())
    whole = len(wall) == len(stream)
    return {
        "net": net,
        "side": side,
        "threads": count,
        # the last batch is smaller than the others, so that images count
        "seconds_per_epoch": sum(wall) / done.images * len(stream.x),
        "mean_ms": statistics.fmean(wall) * 1e3,
        **Timing.of(wall, list(done.cpu.values())).milliseconds(),
        "batches": len(wall),
        "extrapolated": not whole,
        "accuracy": accuracy(done.trainer, data) if whole else None,
        **{name: _mean([s[name] for s in done.settling]) for name in done.settling[0]},
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _ratios(net: str, count: int, runs: dict[str, _Run]) -> list[dict[str, Any]]:
    lines = []
    for of, above, below, target, at_most in RATIOS:
        if of != net or above not in runs or below not in runs:
            continue
        both = runs[above].wall.keys() & runs[below].wall.keys()
        value = sum(runs[above].wall[n] for n in both) / sum(runs[below].wall[n] for n in both)
        lines.append(ratio(f"{net}: {above} / {below}, {count} thread(s)", value, target, at_most))
    return lines


def _gaps(net: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = {row["side"]: row["accuracy"] for row in rows}
    own, other = found.get("toreq"), found.get("backprop")
    if net not in ACCURACY_GAP or own is None or other is None:
        return []
    name = f"{net}: points of accuracy below backprop after the epoch"
    return [ratio(name, 100 * (other - own), ACCURACY_GAP[net])]
