"""M1: a pyramid settles in fewer steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toreq.data import Dataset
from toreq.diagnostics.relaxation import couplings_off
from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Points, Quantity, Trial
from toreq.evidence.mstep import nets
from toreq.evidence.mstep.passage import DAMPINGS, LENGTHS, OURS, PLAIN, Passage, Phases, compared
from toreq.solvers import Anderson, FixedPoint, Solver
from toreq.systems.mstep import MultiScale

SEED_LOW, AIM, RADIUS = 2.0, 3.0, 0.3
PHASES = ("cold free", "warm free", "cold nudged", "warm nudged")
ALONE = "radius of the levels alone"


@dataclasses.dataclass(frozen=True)
class Net:
    """A side: a network, and how it is trained.

    Args:
        arch, options: of the network.
        size: height and width of its images; 28 as they are, more by bilinear interpolation, less by cutting the edge.
        steps: of training at a full budget.
        batch: images of a training step.
        examples: images on which settling is measured.
        most: steps that a solver is allowed at a full budget.
        what: in words.
    """

    arch: str
    what: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    size: int = 28
    steps: int = 200
    batch: int = 32
    examples: int = 4
    most: int = 200


JUDGED = {
    "conv": Net("conv", "springs of strength 1, as shipped; channels 8 and 16"),
    "dense": Net("dense", "springs of strength 1, as shipped; 128 units"),
    "sequence": Net("sequence", "springs of strength 1, as shipped; 16 tokens of 32 features"),
}
BESIDE = {
    "conv, soft springs": Net("conv", "strength 0.1", {"strength": 0.1}, steps=100),
    "conv, stiff springs": Net("conv", "strength 4", {"strength": 4.0}, steps=100),
    "conv, 64 x 64": Net("conv", "images enlarged to 64 x 64; channels 4 and 8", {"channels": (4, 8)}, 64, steps=50),
    "sequence, 576 tokens": Net(
        "sequence",
        "the 24 x 24 pixels in the middle, a token each, of 16 features; one head",
        {"patch": 1, "features": 16, "heads": 1, "hidden": 32},
        24,
        steps=10,
        batch=4,
        examples=1,
        most=100,
    ),
}
SIDES = {**JUDGED, **BESIDE}


def run(trial: Trial) -> Outcome:
    """Train a network, then count what every solver needs on it before and after one more step of training."""
    side = SIDES[trial.side]
    steps, most = trial.budget.pick(1, max(10, side.steps // 10), side.steps), trial.budget.pick(2, 60, side.most)
    size = trial.budget.pick(14, side.size, side.size)
    options = trial.budget.pick({k: v for k, v in side.options.items() if k == "strength"}, side.options, side.options)
    data = shared.mnist(max(10, steps * side.batch), trial.budget.pick(10, 500, 1000))
    data = _resized(data, size)
    net = nets.pyramid(trial.budget, trial.seed, trial.device, side.arch, (1, size, size), **options)
    batch = trial.budget.pick(4, side.batch, side.batch)
    samples = nets.fit(net, data, steps, trial.seed, batch)
    x, y = (t.to(trial.device) for t in (data.inputs("test", slice(0, side.examples)), data.test_y[: side.examples]))
    earlier = Phases(net, x, y).equilibria()
    samples += nets.fit(net, data, 1, trial.seed + 1, batch)
    metrics, curves, notes = _raced(Phases(net, x, y, earlier), most, trial.budget.pick(True, False, False))
    return Outcome(
        {**metrics, **_described(net, x, data)}, curves, Cost(counting.parameters(net), None, samples), tuple(notes)
    )


def _resized(data: Dataset, size: int) -> Dataset:
    if size == 28:
        return data
    if size < 28:
        edge = (28 - size) // 2
        cut = slice(edge, edge + size)
        return _with(data, data.train_x[..., cut, cut], data.test_x[..., cut, cut])

    def enlarged(x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(x.float(), (size, size), mode="bilinear").to(x.dtype)

    return _with(data, enlarged(data.train_x), enlarged(data.test_x))


def _with(data: Dataset, train: Tensor, test: Tensor) -> Dataset:
    return dataclasses.replace(data, train_x=train, test_x=test, input_shape=tuple(train.shape[1:]))


def _raced(phases: Phases, most: int, small: bool) -> tuple[dict[str, Quantity], dict[str, Points], list[str]]:
    """Work of every column in every phase, and how many times less the first one needs than the best plain one."""
    metrics: dict[str, Quantity] = {}
    curves: dict[str, Points] = {}
    notes: list[str] = []
    for name, phase in phases:
        found = compared(phase, most, small)
        for column, (taken, solver) in found.items():
            metrics[f"work, {column}, {name}"] = Quantity(taken.work, "fine sweeps")
            notes.append(f"{name}, {column}: {_said(solver)}{'' if taken.settled else f'; unsettled in {most} steps'}")
            if taken.curve:
                curves[f"{name}, {column}"] = taken.curve
        ours, best = found[OURS][0], min((found[c][0] for c in PLAIN), key=lambda taken: taken.work)
        metrics[f"times fewer, {name}"] = Quantity(best.work / ours.work if ours.work > 0 else None, "")
        metrics[f"times faster by the clock, {name}"] = Quantity(_ratio(best, ours), "")
    return metrics, curves, notes


def _ratio(best: Passage, ours: Passage) -> float | None:
    known = best.settled and ours.settled and ours.seconds > 0
    return best.seconds / ours.seconds if known else None


def _said(solver: Solver) -> str:
    if isinstance(solver, Anderson):
        return f"damping {solver.damping:g}, length {solver.length}"
    return f"damping {solver.damping:g}" if isinstance(solver, FixedPoint) else "as shipped"


def _described(net: MultiScale, x: Tensor, data: Dataset) -> dict[str, Quantity]:
    found = {
        "radius": Quantity(net.radius(x), ""),
        ALONE: Quantity(nets.radius_alone(net, x), ""),
        "accuracy": Quantity(shared.accuracy(net, data), "%"),
    }
    with couplings_off(net):
        found["accuracy, couplings off"] = Quantity(shared.accuracy(net, data), "%")
    return found


def _criteria() -> tuple[Criterion, ...]:
    found = [
        Criterion(
            f"{side}, {phase}: times fewer operations",
            f"times fewer, {phase}",
            "",
            "at_least",
            side,
            target=SEED_LOW,
            words="2-5x fewer steps",
            aim=AIM,
            scale="log",
        )
        for side in JUDGED
        for phase in PHASES
    ]
    found += [
        Criterion(
            f"{side}: radius of the levels alone",
            ALONE,
            "",
            "at_least",
            side,
            aim=RADIUS,
            scale="log",
            condition=True,
        )
        for side in JUDGED
    ]
    found += [
        Criterion(
            f"{side}: radius of the levels alone", ALONE, "", "at_least", side, aim=RADIUS, condition=True, seeds=1
        )
        for side in BESIDE
    ]
    return tuple(found)


CLAIM = Claim(
    id="M1",
    system="mstep",
    seed_file=nets.SEED_FILE,
    sentence="Settling a pyramid from coarse to fine takes 2 to 5 times fewer steps.",
    criteria=_criteria(),
    protocol=f"""
    The sides are networks of three levels with shared weights, and every solver is measured on each. Judged are the
    three architectures with the shipped springs; softer and stiffer springs, a larger image and a longer sequence stand
    beside, with one seed. Each is trained on MNIST by EqProp with the fast settings (Adam at {nets.RATE:g}, 32 images a
    step: 200 steps, 100 with other springs, 50 of the large image; 10 steps of 4 for the long sequence; a tenth of
    that, at least 10 steps, at a quick budget). Work is counted in
    floating-point operations of the evaluations of the field that a solver asks for, on coarse levels too, in units of
    one evaluation on the finest level; elementwise work (springs, activations, extrapolation) is not counted, so that
    the ratio of processor times is given beside. A relaxation has ended when its solver holds a state of the asked
    relative residual. That residual is the plain map's on all nodes, taken outside of the count, the same for every
    solver: of the state that a step led to, or of the one that the solver would return if it stopped there, whichever
    is smaller. Free phases end at the shipped solver's tolerance, nudged ones (both signs, measured by their
    difference) at the shipped estimator's. Cold free phases start at the network's own start, cold nudged ones at the
    free equilibrium. Warm ones start where the same examples settled before one Adam step (the first of a new Adam, at
    the full rate): at the free equilibrium, or at the displacement of the nudged phases. CoarseToFine runs as shipped.
    Plain, Gauss-Seidel and Anderson each count with the best of the dampings {", ".join(f"{d:g}" for d in DAMPINGS)},
    Anderson also with the best length of {", ".join(map(str, LENGTHS))}, chosen anew for each network and phase on the
    very examples that count. One that does not settle counts 200 steps (100 for the long sequence; quick: 60). The
    metric is the work of the best of these over that of CoarseToFine, both averaged over 4 test images (1 for the long
    sequence). CoarseToFine level by level, not accelerated, and with explicit springs at its best damping are the
    ablations. How a network was trained hardly matters for how it settles: there are no sides for backprop, and a
    feed-forward twin does not settle.
    """,
    sides={name: net.what for name, net in SIDES.items()},
    run=run,
    picture=Picture(
        "Work saved by settling from coarse to fine",
        x_label="times fewer operations than the best other",
        metrics=tuple(f"times fewer, {phase}" for phase in PHASES),
    ),
    printed=("radius", ALONE, "accuracy, couplings off"),
)
