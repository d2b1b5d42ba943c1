"""T1: one nudged phase, what is kept for it, and the memory of a training step against steps and length."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from toreq import systems
from toreq.diagnostics.gradients import criterion
from toreq.diagnostics.memory import MEBIBYTE, StorageMeter, fixed_steps, peak_bytes, with_tolerance
from toreq.estimators import Predictive
from toreq.estimators.base import Estimate
from toreq.evidence import counting
from toreq.evidence.budgets import Budget
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.tpeqprop import nets
from toreq.layer import Equilibrium, equilibria

SIDES = {
    "tpeqprop, chain": "untied transformer blocks, one after the other, by TPEqProp",
    "tpeqprop, loop": "one transformer block that predicts its own level, by TPEqProp",
    "eqprop": "the looped transformer of the base, symmetric, by centered EqProp",
    "bp, chain": "backprop through the blocks of the chain",
    "bp, loop": "backprop through all steps of the loop",
}
OWN = ("tpeqprop, chain", "tpeqprop, loop")
BLOCKS, VOCABULARY, CLASSES = 6, 16, 10
FLAT = 2.0
STEPS, LENGTHS, BATCH = (10, 30, 100, 300, 1000), (16, 32, 64, 128, 256), 8
STEPS_LENGTH = 32
"""Length of the sequences on which steps are varied."""
GROWTH, MOST_STEPS, LONGEST = "growth of peak memory with steps", "peak memory at most steps", "peak memory, longest"


def build(side: str, budget: Budget, length: int, seed: int) -> nn.Module:
    """A side's network on sequences of symbols of one length."""
    width = budget.pick(8, 64, 64)
    options: dict[str, Any] = {
        "features": width, "heads": budget.pick(2, 4, 4), "hidden": 2 * width, "vocabulary": VOCABULARY, "pool": "mean",
    }  # fmt: skip
    if side == "eqprop":
        torch.manual_seed(seed)
        net: nn.Module = systems.create("toreqprop", (length,), CLASSES, arch="transformer", **options)
    elif side.endswith("loop"):
        net = nets.build("transformer", seed, (length,), CLASSES, topology="loop", **options)
    else:
        own = nets.FORWARD if side.startswith("bp") else nets.OWN
        blocks = budget.pick(2, BLOCKS, BLOCKS)
        net = nets.trained_by(own, "transformer", seed, (length,), CLASSES, blocks=blocks, **options)
    for layer in equilibria(net):
        layer.warn = False  # the number of steps is fixed, settled or not
    return net


def batch(length: int, size: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Random sequences and labels."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(VOCABULARY, (size, length), generator=g), torch.randint(CLASSES, (size,), generator=g)
    return x.to(device), y.to(device)


def running(net: nn.Module, steps: int, through: bool) -> nn.Module:
    """A copy that settles in exactly so many free steps, and in at most so many nudged ones.

    Args:
        net: a network with an equilibrium.
        steps: of the free phase.
        through: backprop through them.
    """
    (layer,) = equilibria(net)
    if through or not isinstance(layer.estimator, Predictive):
        return fixed_steps(net, steps, "unrolled" if through else None)
    # at tolerance 0 the two equations would be relaxed in turn, each for that many steps
    copied = copy.deepcopy(net)
    (own,) = equilibria(copied)
    own.solver = with_tolerance(own.solver, steps, 0.0)
    own.estimator = replace(layer.estimator, max_steps=steps)
    return copied


@dataclass
class Counted:
    """What a probe saw of one training step.

    Attributes:
        free, nudged: phases run; two signs of a nudge are two phases.
        kept: bytes alive between forward and backward pass.
        peak: most bytes alive at a time.
    """

    free: int = 0
    nudged: int = 0
    kept: int = 0
    peak: int = 0


@contextmanager
def _probed(layer: Equilibrium, counted: Counted) -> Iterator[None]:
    kind = type(layer.estimator)
    estimate, settle = kind.estimate, layer.free_phase

    def estimated(self: Any, *args: Any, **options: Any) -> Estimate:
        made = estimate(self, *args, **options)
        rows = next(iter(made.solution.h.values())).shape[0]
        counted.nudged += rows // made.statistics.steps.shape[0]
        return made

    def settled(*args: Any, **options: Any) -> Any:
        counted.free += 1
        return settle(*args, **options)

    with mock.patch.object(kind, "estimate", estimated), mock.patch.object(layer, "free_phase", settled):
        yield


def count(net: nn.Module, x: Tensor, y: Tensor) -> Counted:
    """Count phases and bytes of one training step."""
    counted = Counted()
    (layer,) = equilibria(net) or (None,)
    loss = criterion(net)

    def step() -> None:
        with StorageMeter() as meter:
            out = loss(net(x), y)
            counted.kept = meter.live
            out.backward()
        counted.peak = meter.peak
        net.zero_grad(set_to_none=True)

    if layer is None:
        step()
    else:
        with _probed(layer, counted):
            step()
    return counted


def state_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes of one state of all levels; of a network without levels the size of its blocks' outputs."""
    found = equilibria(net)
    if found:
        sizes = [math.prod(shape) for shape in found[0].dynamics.shapes.values()]
        return 4 * len(x) * sum(sizes)
    outputs: list[int] = []
    blocks = list(getattr(net, "blocks"))  # noqa: B009
    hooks = [b.register_forward_hook(lambda _m, _i, out: outputs.append(out.nbytes)) for b in blocks]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return sum(outputs) * (len(blocks) + 1) // len(blocks)


def exponent(points: list[tuple[float, float]]) -> float:
    """Slope of the logarithm of the second number against that of the first, between the last two points."""
    (a, p), (b, q) = points[-2:]
    return math.log(q / p) / math.log(b / a)


def run(trial: Trial) -> Outcome:
    """Phases and bytes of a training step of one side, against length and, on a loop, against steps."""
    size = trial.budget.pick(2, BATCH, BATCH)
    lengths = trial.budget.pick((8, 16), LENGTHS, LENGTHS)
    metrics: dict[str, Quantity] = {}
    by_length: list[tuple[float, float]] = []
    counted, state, parameters = Counted(), 1, 0
    for length in lengths:
        x, y = batch(length, size, trial.seed, trial.device)
        net = build(trial.side, trial.budget, length, trial.seed).to(trial.device)
        if trial.side == "bp, loop":
            net = running(net, trial.budget.pick(4, 30, 30), through=True)
        count(net, x, y)  # what is made once is not charged to the measured step
        counted, state = count(net, x, y), state_bytes(net, x)
        by_length.append((float(length), counted.peak / MEBIBYTE))
        parameters = counting.parameters(net)
    metrics["free phases"] = Quantity(float(counted.free), "")
    metrics["nudged phases"] = Quantity(float(counted.nudged), "")
    metrics["states kept between the passes"] = Quantity(counted.kept / state, "states")
    metrics["states at the peak"] = Quantity(counted.peak / state, "states")
    metrics[LONGEST] = Quantity(by_length[-1][1], "MiB")
    metrics["exponent of memory in length"] = Quantity(exponent(by_length), "")
    curves: dict[str, Any] = {"peak memory against length": by_length}
    if not trial.side.endswith("chain"):
        points = _against_steps(trial, size)
        metrics[GROWTH] = Quantity(100 * (points[-1][1] / points[0][1] - 1), "%")
        metrics[MOST_STEPS] = Quantity(points[-1][1], "MiB")
        curves["peak memory against steps"] = points
    return Outcome(metrics, curves, Cost(parameters, None, size * len(lengths)))


def _against_steps(trial: Trial, size: int) -> list[tuple[float, float]]:
    length = trial.budget.pick(8, STEPS_LENGTH, STEPS_LENGTH)
    x, y = batch(length, size, trial.seed, trial.device)
    net = build(trial.side, trial.budget, length, trial.seed).to(trial.device)
    points = []
    for steps in trial.budget.pick((10, 40), STEPS, STEPS):
        fixed = running(net, steps, through=trial.side.startswith("bp"))
        loss = criterion(fixed)

        def step(fixed: nn.Module = fixed, loss: Any = loss) -> None:
            loss(fixed(x), y).backward()
            fixed.zero_grad(set_to_none=True)

        step()
        points.append((float(steps), peak_bytes(step) / MEBIBYTE))
        free = nets.layer(fixed).last.free
        assert free is not None
        if int(free.steps.max()) != steps:
            raise RuntimeError(f"T1: expected {steps} relaxation steps, got {int(free.steps.max())}")
    return points


def _criteria() -> tuple[Criterion, ...]:
    others = {"tpeqprop, chain": ("bp, chain",), "tpeqprop, loop": ("bp, loop",)}
    found = [
        Criterion(f"{side}: {what}", what, "", "at_most", side, words="single-phase dynamics", aim=1.0,
                  beside=("eqprop",))
        for side in OWN for what in ("free phases", "nudged phases")
    ]  # fmt: skip
    found += [
        Criterion(f"{side}: peak memory of the longest sequence against backprop", LONGEST, "MiB", "at_most", side,
                  words="constant memory even in long sequences", versus=others[side], beside=("eqprop",))
        for side in OWN
    ]  # fmt: skip
    loop = "tpeqprop, loop"
    found.append(
        Criterion(f"{loop}: {GROWTH}", GROWTH, "%", "at_most", loop, words="True O(1) Memory", aim=FLAT,
                  beside=("eqprop", "bp, loop"))
    )  # fmt: skip
    found.append(
        Criterion(f"{loop}: peak memory at most steps against EqProp", MOST_STEPS, "MiB", "at_most", loop,
                  words="no storage of free vs. nudged states", versus=("eqprop",), beside=("bp, loop",))
    )  # fmt: skip
    return tuple(found)


CLAIM = Claim(
    id="T1",
    system="tpeqprop",
    seed_file=nets.SEED_FILE,
    sentence="One phase learns, nothing of a phase is stored for another, and memory is constant in steps.",
    criteria=_criteria(),
    protocol=f"""
    Said plainly: the target still nudges. One nudged phase remains after the free one. Freshly drawn transformers on
    {BATCH} random sequences of {VOCABULARY} symbols (64 features, 4 heads, {BLOCKS} blocks in a chain, one in a loop).
    Probes on the layer count phases in one training step: each settling of the free state, and for each call of the
    estimator the copies of the batch that its nudged state holds (centered EqProp: two signs). A dispatch hook counts
    the bytes of all tensors born in the step: those alive between forward and backward pass, and the most alive at a
    time, both also in units of one state of all levels. Sequence lengths {LENGTHS[0]} to {LENGTHS[-1]}; backprop
    through the loop runs 30 steps there. Steps {STEPS[0]} to {STEPS[-1]} on sequences of {STEPS_LENGTH}, all of them
    run in the free phase (tolerance 0); EqProp runs as many in its nudged phases, TPEqProp's nudged phase at most as
    many, since one solve of its errors settles it. Growth is the peak at the most steps over that at the fewest.
    Nothing is constant in the length: a state has a vector for each symbol, and softmax attention a number for each
    pair; the exponent of the peak in the length at the two longest is given.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Peak memory of a training step",
        x_label="relaxation steps",
        y_label="peak of live tensors (MiB)",
        curves=("peak memory against steps",),
        log_x=True,
        log_y=True,
    ),
    printed=("states kept between the passes", "exponent of memory in length"),
)
