"""Seconds to a test accuracy: learning curves in batches, times the seconds of a batch.

A side's accuracy is a function of the batches it has seen, not of the machine. So each side learns once, in a process
of its own that may be killed and resumed (``python -m toreq.bench.accuracy learn NET SIDE --out DIR``), and ``run``
multiplies its curve by the seconds of a batch, measured for all sides in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from toreq.bench import nets as catalogue
from toreq.bench.references import Trainer
from toreq.bench.timing import environment, interleaved, threads
from toreq.data import Batches, Dataset, load
from toreq.errors import CheckpointError, ConfigError, ToreqError
from toreq.io import atomic_path, atomic_write_json

TARGETS = {"mlp": (0.97, 0.98), "conv": (0.985,)}
"""Net -> test accuracies to reach, ascending."""
BUDGET = 20 * 60.0
"""Seconds of training that a side may take, at one thread, evaluations not counted."""
BATCH = 128
EVALUATED = 10_000
EARLY, OFTEN, SELDOM = 940, 60, 235
"""Up to ``EARLY`` batches the accuracy is taken every ``OFTEN`` of them, then every ``SELDOM``."""
SAVE_EVERY = 20
"""Batches between two saved states."""
CURVES = Path("evidence/results/bench/curves")


def due(batch: int) -> bool:
    """Whether the accuracy is taken after this many batches."""
    return batch % (OFTEN if batch <= EARLY else SELDOM) == 0


def learn(
    net: str,
    side: str,
    out: Path | str,
    max_batches: int | None = None,
    data: Dataset | None = None,
    sizes: catalogue.Sizes | None = None,
    batch_size: int = BATCH,
    check: Callable[[int], bool] = due,
    report: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Train one side until its net's last target, and write its curve; goes on from a saved state.

    The curve is ``out/NET-SIDE.json``: batches and accuracies, and whether it is complete. The state beside it
    (``.pt``) is saved every few batches; a resumed run sees the batches that an unbroken one would have seen.

    Args:
        net, side: see :data:`toreq.bench.nets.SIDES`.
        out: folder of the curve and the state.
        max_batches: where to stop when the target is not reached; no limit when None.
        data: MNIST when None; the first 10,000 test images are used.
        sizes: of the network.
        batch_size: images in a batch.
        check: after which batches the accuracy is taken; it also is after the last one.
        report: told each accuracy.

    Returns:
        the curve as written.

    Raises:
        ConfigError: for an unknown net or side, or one without targets.
        CheckpointError: for a damaged state.
    """
    target = _targets(net)[-1]
    folder = Path(out)
    curve_path, state_path = folder / f"{net}-{side}.json", folder / f"{net}-{side}.pt"
    data = load("mnist") if data is None else data
    trainer = catalogue.build(net, side, data.input_shape, data.num_classes, sizes)
    batches = Batches(*data.split("train"), batch_size, seed=0, drop_last=True)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    settings = catalogue.settings(net, side)
    done, points = _resume(state_path, trainer, settings)
    while not (points and points[-1]["accuracy"] >= target) and (max_batches is None or done < max_batches):
        for images, labels in batches.epoch(done // len(batches), start=done % len(batches)):
            trainer.step(images, labels)
            done += 1
            last = max_batches is not None and done >= max_batches
            if check(done) or last:
                points.append({"batches": done, "accuracy": accuracy(trainer, data)})
                report(f"{net} {side}: {done} batches, {100 * points[-1]['accuracy']:.2f}%")
                atomic_write_json(curve_path, _curve(net, side, batch_size, points, target, complete=False))
            if check(done) or last or done % SAVE_EVERY == 0:
                _save(state_path, trainer, done, points, settings)
            if last or (points and points[-1]["accuracy"] >= target):
                break
    curve = _curve(net, side, batch_size, points, target, complete=True)
    atomic_write_json(curve_path, curve)
    return curve


def accuracy(trainer: Trainer, data: Dataset, count: int = EVALUATED, batch_size: int = 500) -> float:
    """Share of the first ``count`` test images that a side gets right."""
    labels = data.test_y[:count]
    starts = range(0, len(labels), batch_size)
    parts = [trainer.predict(data.images("test", slice(s, min(s + batch_size, len(labels))))) for s in starts]
    return float((torch.cat(parts).argmax(1) == labels).double().mean())


def _curve(
    net: str, side: str, batch_size: int, points: list[dict[str, Any]], target: float, complete: bool
) -> dict[str, Any]:
    reached = bool(points) and points[-1]["accuracy"] >= target
    return {
        "net": net,
        "side": side,
        "batch_size": batch_size,
        "settings": catalogue.settings(net, side),
        "target": target,
        "reached": reached,
        "complete": complete,
        "points": points,
    }


def _save(path: Path, trainer: Trainer, done: int, points: list[dict[str, Any]], settings: str) -> None:
    state = {
        "settings": settings,
        "trainer": trainer.state(),
        "rng": torch.get_rng_state(),
        "batches": done,
        "points": points,
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _resume(path: Path, trainer: Trainer, settings: str) -> tuple[int, list[dict[str, Any]]]:
    if not path.exists():
        return 0, []
    try:
        saved = torch.load(path, weights_only=True)
        same = saved["settings"] == settings
        if same:
            trainer.restore(saved["trainer"])
            torch.set_rng_state(saved["rng"])
    except Exception as error:  # a damaged file makes torch.load raise anything: named, and raised again
        raise CheckpointError(
            f"learn: expected a state of this side in {path.name}, got {type(error).__name__}; delete it to start anew"
        ) from error
    if not same:
        raise CheckpointError(
            f"learn: expected a state of {settings} in {path.name}, got one of {saved['settings']}; delete it to start "
            "anew"
        )
    return saved["batches"], saved["points"]


def _targets(net: str) -> tuple[float, ...]:
    catalogue.names(net)
    if net not in TARGETS:
        raise ConfigError(f"time-to-accuracy: expected one of {', '.join(TARGETS)}, got {net!r}; choose among these")
    return TARGETS[net]


def batches_to(points: Sequence[dict[str, Any]], target: float) -> int | None:
    """Batches after which a curve first is at the target, None when it never is."""
    return next((p["batches"] for p in points if p["accuracy"] >= target), None)


def run(
    curves: Path | str = CURVES,
    nets: Sequence[str] = tuple(TARGETS),
    epoch: Path | str | None = None,
    budget: float = BUDGET,
    repetitions: int = 5,
) -> dict[str, Any]:
    """Seconds to each target, at one thread, from the curves of :func:`learn`.

    Args:
        curves: folder that holds them; a side without a curve has a row that says so.
        nets: which nets.
        epoch: JSON of the bench ``epoch``, whose seconds per batch at one thread are used. When None they are measured
            here, with the weights that the curves ended with where the states lie beside them, since settling takes
            longer in a network that has learned.
        budget: seconds a side may take.
        repetitions: steps of each side that are timed here, in turn.
    """
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for net in nets:
        found = {side: _read_curve(Path(curves) / f"{net}-{side}.json") for side in catalogue.names(net)}
        sides = [side for side, curve in found.items() if curve is not None]
        seconds = (
            _from_epoch(Path(epoch), net) if epoch is not None else _measured(net, sides, Path(curves), repetitions)
        )
        for target in _targets(net):
            taken: dict[str, float | None] = {}
            for side, curve in found.items():
                row = _row(net, side, target, curve, seconds.get(side), budget)
                taken[side] = row["seconds"]
                rows.append(row)
            ratios += _ratios(net, target, taken)
    return {
        "bench": "time-to-accuracy",
        "environment": environment(),
        "budget_seconds": budget,
        "rows": rows,
        "ratios": ratios,
    }


def _row(
    net: str, side: str, target: float, curve: dict[str, Any] | None, batch_seconds: float | None, budget: float
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "net": net,
        "side": side,
        "target": target,
        "batches": None,
        "batch_seconds": batch_seconds,
        "seconds": None,
        "verdict": "no curve",
        "best_in_budget": None,
        "batches_seen": None,
    }
    if curve is None or batch_seconds is None:
        return row
    points = curve["points"]
    affordable = [p for p in points if p["batches"] * batch_seconds <= budget]
    row["batches"] = batches_to(points, target)
    row["batches_seen"] = points[-1]["batches"] if points else 0
    row["best_in_budget"] = max((p["accuracy"] for p in affordable), default=None)
    within = batches_to(affordable, target)
    if within is not None:
        return {**row, "seconds": within * batch_seconds, "verdict": "reached"}
    # a curve that ends before its budget does says nothing about the rest of it
    spent = row["batches_seen"] * batch_seconds >= budget
    return {**row, "verdict": "> budget" if spent else "curve ends before the budget"}


def _ratios(net: str, target: float, taken: dict[str, float | None]) -> list[dict[str, Any]]:
    """Time of every other side over toreq's, nothing judged; None where either is missing."""
    own = taken.get("toreq")
    lines = []
    for side, other in taken.items():
        if side == "toreq":
            continue
        value = None if own is None or other is None else other / own
        lines.append({"name": f"{net} to {target:.1%}: {side} / toreq", "value": value, "target": None, "holds": None})
    return lines


def _measured(net: str, sides: Sequence[str], curves: Path, repetitions: int) -> dict[str, float]:
    data = load("mnist")
    images, labels = next(Batches(*data.split("train"), BATCH, seed=0).epoch(0))
    steps: dict[str, Callable[[], None]] = {}
    for side in sides:
        trainer = catalogue.build(net, side)
        _resume(curves / f"{net}-{side}.pt", trainer, catalogue.settings(net, side))
        steps[side] = lambda t=trainer: t.step(images, labels)
    with threads(1):
        return {side: timing.median for side, timing in interleaved(steps, repetitions).items()}


def _from_epoch(path: Path, net: str) -> dict[str, float]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = content.get("results", [content])
        rows = next(r for r in results if r["bench"] == "epoch")["rows"]
        return {r["side"]: r["mean_ms"] / 1e3 for r in rows if r["net"] == net and r["threads"] == 1}
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ConfigError(
            f"time-to-accuracy: expected a result of `toreq bench epoch` in {path.name}, got "
            f"{type(error).__name__}; run it with --json first"
        ) from error


def _read_curve(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m toreq.bench.accuracy learn NET SIDE --out DIR [--max-batches N]``; 0, 1, or 2 for bad usage."""
    parser = argparse.ArgumentParser(prog="python -m toreq.bench.accuracy", description="Learning curves of the sides.")
    command = parser.add_subparsers(dest="command", required=True)
    one = command.add_parser("learn", help="train one side, resuming where it stopped, and write its curve")
    one.add_argument("net", choices=sorted(TARGETS))
    one.add_argument("side", help="see toreq.bench.nets.SIDES")
    one.add_argument("--out", type=Path, default=CURVES, help="folder of the curve (default: %(default)s)")
    one.add_argument("--max-batches", type=int, help="stop here when the target is not reached")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        learn(
            arguments.net,
            arguments.side,
            arguments.out,
            arguments.max_batches,
            report=lambda line: print(line, flush=True),
        )
    except ConfigError as error:
        parser.error(str(error))
    except ToreqError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
