"""M5: easy examples leave early, so that a pyramid spends work where it is needed."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toreq.core.state import detached
from toreq.data import Batches, Dataset
from toreq.diagnostics.relaxation import couplings_off
from toreq.diagnostics.work import Metered, fine_sweep
from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.budgets import Budget, find
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.mstep import nets
from toreq.solvers import Relaxation, Step
from toreq.systems.mstep import MultiScale

EXITS, JOINT, STOPPED = "exits", "settled jointly", "pyramid, early stop"
ONE, ONE_STOPPED, FEEDFORWARD = "one level", "one level, early stop", "bp-ff"
SIDES = {
    EXITS: "the pyramid, read on each level in turn; an example leaves where the margin is large enough; margins swept",
    JOINT: "the same pyramid, all of whose levels settle together for every example",
    STOPPED: "the same pyramid, stopped after a number of steps that is swept, the same for every example",
    ONE: "one level of the same widths trained alike, settled (the ablation)",
    ONE_STOPPED: "that level, stopped after a number of steps that is swept",
    FEEDFORWARD: "the pyramid's feed-forward twin, by backprop: one pass for every example",
}
MARGINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 1.0)
STOPS, WITHIN, CHUNK = 10, 0.1, 500
GRID = tuple(0.25 * i for i in range(1, 41))
"""Work at which the curves are drawn, in fine sweeps."""


@dataclass(frozen=True)
class Point:
    """One setting: mean work in fine sweeps, and accuracy in percent."""

    work: float
    accuracy: float


@dataclass(frozen=True)
class Found:
    """What a side found: the accuracy of settling everything, its swept settings, and further numbers."""

    settled: float
    points: list[Point]
    further: dict[str, Quantity]


def run(trial: Trial) -> Outcome:
    """Train, sweep the side's setting on the test images, and give the least work within 0.1 point of settling."""
    count, tests = trial.budget.pick((32, 20), (3000, 2000), (10_000, 10_000))
    data = shared.mnist(count, tests)
    if trial.side == FEEDFORWARD:
        module, found, samples = _feedforward(trial, data)
    else:
        levels = 1 if trial.side in (ONE, ONE_STOPPED) else trial.budget.pick(2, 3, 3)
        module, samples = trained(trial.budget.name, trial.seed, trial.device, levels)
        found = _settling(trial, module, data)
    enough = [p for p in found.points if p.accuracy >= found.settled - WITHIN - 1e-9]
    chosen = min(enough, key=lambda p: p.work)
    metrics = {
        "work within 0.1 point": Quantity(chosen.work, "fine sweeps"),
        "accuracy there": Quantity(chosen.accuracy, "%"),
        "accuracy, everything settled": Quantity(found.settled, "%"),
        **found.further,
    }
    reached = [(w, max((p.accuracy for p in found.points if p.work <= w), default=None)) for w in GRID]
    return Outcome(metrics, {"accuracy": reached}, Cost(counting.parameters(module), None, samples))


@functools.lru_cache(maxsize=2)
def trained(budget_name: str, seed: int, device: str, levels: int) -> tuple[MultiScale, int]:
    """A network trained by EqProp with the fast settings, which it keeps; several sides share it."""
    budget = find(budget_name)
    net = nets.pyramid(budget, seed, device, "conv", levels=levels, exits=levels > 1, alone=levels > 1)
    net.equilibrium.hasten()
    steps, batch = _steps(budget)
    data = shared.mnist(*budget.pick((32, 20), (3000, 2000), (10_000, 10_000)))
    return net, shared.fit(net, data, steps, batch=batch, rate=nets.RATE, seed=seed)


def _steps(budget: Budget) -> tuple[int, int]:
    batch = budget.pick(8, nets.BATCH, nets.BATCH)
    return budget.pick(2, 2 * 3000 // batch, 3 * 10_000 // batch), batch


def _settling(trial: Trial, net: MultiScale, data: Dataset) -> Found:
    x, y = data.inputs("test", slice(None)).to(trial.device), data.test_y.to(trial.device)
    unit = _unit(trial, x)
    correct, steps = _settled(net, x, y)
    sweep, starts = costs(net, x[:CHUNK])
    start = starts[0]
    joint = Point((start + float(steps.mean()) * sweep[0]) / unit, correct)
    further: dict[str, Quantity] = {}
    if trial.side == EXITS:
        logits, taken = levels_read(net, x)
        each, begun = (torch.tensor(v, dtype=torch.float64, device=x.device) for v in (sweep, starts))
        points = [Point(work / unit, right) for work, right in _by_margin(logits, taken.double() * each + begun, y)]
        further = _shares(logits, y)
        further["work of the start"] = Quantity(start / unit, "fine sweeps")
    elif trial.side in (STOPPED, ONE_STOPPED):
        points = [*_by_steps(net, x, y, sweep[0] / unit, start / unit), joint]
    else:
        points = [joint]
    further["radius"] = Quantity(net.radius(x[:16]), "")
    further["radius of the levels alone"] = Quantity(nets.radius_alone(net, x[:16]), "")
    with couplings_off(net):
        further["accuracy, couplings off"] = Quantity(shared.accuracy(net, data), "%")
    return Found(correct, points, further)


def _unit(trial: Trial, x: Tensor) -> float:
    """Operations of a sweep of the pyramid's finest level, the unit of every side."""
    net = nets.pyramid(trial.budget, trial.seed, trial.device, "conv").eval()
    with torch.no_grad():
        return fine_sweep(net.equilibrium.dynamics, detached(net.equilibrium.dynamics.bind(x[:2])))


@torch.no_grad()
def costs(net: MultiScale, x: Tensor) -> tuple[list[float], list[float]]:
    """Operations per example of a sweep of the levels l to L, and of their start (drives and first guess), for each l
    from the finest. :meth:`MultiScale.predict` starts each level that an example gets to."""
    sweeps, starts = [], []
    for level in range(1, net.levels + 1):
        layer = net.parts.layer(net.equilibrium, level)
        energy = layer.dynamics
        bindings = detached(energy.bind(x))
        problem = Metered(Relaxation(energy, bindings, as_map=True))
        a = energy.initial(bindings)
        h = problem.activate(a)
        layer.solver.step(problem, a, h, layer.solver.begin(problem, a, h))
        sweeps.append(problem.meter.total / len(x))
        started = counting.flops(lambda energy=energy: energy.initial(detached(energy.bind(x))))
        starts.append(started / len(x))
    return sweeps, starts


@torch.no_grad()
def _settled(net: MultiScale, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Percent right with everything settled, and each example's steps."""
    right, steps = [], []
    for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        right.append(net(part).argmax(1) == labels)
        free = net.equilibrium.last.free
        assert free is not None
        steps.append(free.steps.double())
    return 100 * float(torch.cat(right).double().mean()), torch.cat(steps)


@torch.no_grad()
def levels_read(net: MultiScale, x: Tensor) -> tuple[Tensor, Tensor]:
    """What :meth:`MultiScale.predict` reads on every level when nobody leaves: logits ``(B, L, K)`` and steps
    ``(B, L)``, the finest first.

    What an example does depends on no other one, so that this holds what happens at any margin.
    """
    read: dict[int, list[Tensor]] = {level: [] for level in range(net.levels)}

    def keep(level: int) -> Any:
        return lambda module, args, output: read[level].append(output)

    heads = [net.head, *net.exit_heads]
    handles = [head.register_forward_hook(keep(level)) for level, head in enumerate(heads)]
    try:
        steps = torch.cat([net.predict(part, 1.0).steps for part in x.split(CHUNK)])
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([torch.cat(read[level]) for level in range(net.levels)], 1), steps


def left_at(logits: Tensor, margin: float) -> Tensor:
    """The place ``(B,)`` of the level, 0 the finest, on which each example leaves."""
    top = logits.softmax(-1).topk(2, -1).values
    sure = (top[..., 0] - top[..., 1]) > margin
    sure[:, 0] = True
    places = torch.arange(logits.shape[1], device=logits.device).expand_as(sure)
    return torch.where(sure, places, -1).amax(1)


def _by_margin(logits: Tensor, spent: Tensor, y: Tensor) -> list[tuple[float, float]]:
    """Mean operations and percent right at each margin; ``spent`` ``(B, L)`` are the operations on each level."""
    found = []
    rows = torch.arange(len(y), device=y.device)
    for margin in MARGINS:
        level = left_at(logits, margin)
        visited = torch.arange(logits.shape[1], device=y.device) >= level[:, None]
        right = logits[rows, level].argmax(1) == y
        found.append((float((spent * visited).sum(1).mean()), 100 * float(right.double().mean())))
    return found


def _shares(logits: Tensor, y: Tensor) -> dict[str, Quantity]:
    """Accuracy of each level's read-out alone, and who leaves where at one margin."""
    found = {}
    place = left_at(logits, 0.9)
    for level in range(logits.shape[1]):
        right = logits[:, level].argmax(1) == y
        found[f"accuracy of level {level + 1}"] = Quantity(100 * float(right.double().mean()), "%")
        share = 100 * float((place == level).double().mean())
        found[f"left at level {level + 1} with margin 0.9"] = Quantity(share, "%")
    return found


@torch.no_grad()
def _by_steps(net: MultiScale, x: Tensor, y: Tensor, sweep: float, start: float) -> list[Point]:
    """Everything stopped after the same number of steps, none to ``STOPS``."""
    layer, top = net.equilibrium, net.tops[0]
    right = torch.zeros(STOPS + 1, dtype=torch.float64)
    solver = replace(layer.solver, tolerance=0.0, max_steps=STOPS)
    for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        bindings = detached(layer.dynamics.bind(part, rounded=solver.precision == "rounded"))
        problem = Relaxation(layer.dynamics, bindings, as_map=True)
        a = layer.dynamics.initial(bindings)
        labelled = labels

        def count(step: int, h: dict[str, Tensor], wanted: Tensor = labelled) -> None:
            right[step] += float((net.head(h[top]).argmax(1) == wanted).double().sum())

        count(0, problem.activate(a))

        def each(step: Step, tally: Any = count) -> None:
            tally(step.index, step.h)

        solver.solve(problem, a, callback=each)
    return [Point(start + t * sweep, 100 * float(right[t]) / len(x)) for t in range(STOPS + 1)]


def _feedforward(trial: Trial, data: Dataset) -> tuple[nn.Module, Found, int]:
    """The twin, trained by backprop for as many steps."""
    net = nets.pyramid(trial.budget, trial.seed, trial.device, "conv")
    twin = net.feedforward().to(trial.device)
    steps, batch = _steps(trial.budget)
    optimizer = torch.optim.Adam(twin.parameters(), lr=nets.RATE)
    batches = Batches(*data.split("train"), batch, seed=trial.seed, device=torch.device(trial.device))
    done = seen = epoch = 0
    while done < steps:
        for x, y in batches.epoch(epoch):
            if done == steps:
                break
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(x), y).backward()
            optimizer.step()
            done, seen = done + 1, seen + len(y)
        epoch += 1
    x, y = data.inputs("test", slice(None)).to(trial.device), data.test_y.to(trial.device)
    with torch.no_grad():
        right = torch.cat([twin(part).argmax(1) for part in x.split(CHUNK)]) == y
        work = counting.flops(lambda: twin(x[:2])) / 2
    accuracy = 100 * float(right.double().mean())
    return twin, Found(accuracy, [Point(work / _unit(trial, x), accuracy)], {}), seen


def _criteria() -> tuple[Criterion, ...]:
    others = {JOINT: "settling jointly", ONE: "one level settled", ONE_STOPPED: "one level stopped early"}
    return tuple(
        Criterion(
            f"work less than {words}",
            "work within 0.1 point",
            "fine sweeps",
            "at_most",
            EXITS,
            words="adaptive",
            versus=(side,),
            beside=(STOPPED, FEEDFORWARD),
        )
        for side, words in others.items()
    )


CLAIM = Claim(
    id="M5",
    system="mstep",
    seed_file=nets.SEED_FILE,
    sentence="Leaving early adapts the work to the example: less work at the accuracy of settling everything.",
    criteria=_criteria(),
    protocol=f"""
    A convolutional pyramid of three levels (8 and 16 channels, shared weights, springs as shipped), each level's exit
    read out and nudged where it is used, at the equilibrium of that level and the coarser ones alone (`alone`), is
    trained on MNIST by EqProp with the fast settings, which it keeps: Adam at {nets.RATE:g}, batch {nets.BATCH}; 10,000
    images for three epochs and all 10,000 test images in a full run, 3,000 for two and 2,000 in a quick one. One level
    of the same widths is trained alike, and the feed-forward twin by backprop. Work is the mean over test images of the
    operations of all sweeps, on coarse levels too, each example's own number of them, plus the drives and the first
    guess of every level that it gets to, as they are really computed, in units of one evaluation of the pyramid's field
    on its finest level. The metric is the least work over the side's swept setting (the exit margin; or the number of
    steps, from none to {STOPS}) whose test accuracy is within {WITHIN} point of that of settling everything in the same
    network to the solver's tolerance. Settings are chosen on the test images, for all sides alike. Sides of one level
    are held to the accuracy of their own settling, which is printed. The work is compared by seed. BP-eq would train
    the same equilibria by the same gradient and has no side; the twin does not settle and is shown beside.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Accuracy within a mean work",
        x_label="mean work per image (fine sweeps)",
        y_label="test accuracy (%)",
        curves=("accuracy",),
        log_x=True,
    ),
)
