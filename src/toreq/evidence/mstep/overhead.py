"""M8: what three levels cost beside one, and whether they still settle."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch

from toreq import systems
from toreq.core.state import detached
from toreq.data import Dataset
from toreq.diagnostics.memory import MEBIBYTE, fixed_steps, peak_bytes, training_step
from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.budgets import Budget
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Points, Quantity, Trial
from toreq.evidence.mstep import nets
from toreq.evidence.mstep.passage import Phase, passage
from toreq.layer import equilibria
from toreq.solvers import CoarseToFine, FixedPoint, Relaxation, Solver
from toreq.solvers.problem import relative
from toreq.systems.mstep import MultiScale

SHARED, OWN, ONE, PLAIN = "shared weights", "own weights", "one level", "plain iteration"
SIDES = {
    SHARED: "three levels with shared weights, as shipped",
    OWN: "three levels with weights of their own (the ablation)",
    ONE: "one level, as shipped",
    PLAIN: "three levels with shared weights, settled by the plain iteration",
}
ARCHITECTURES = ("conv", "dense", "sequence")
SIZES = {"": 32, ", 28 x 28": 28}
"""Suffix of a metric -> height and width of the image; what is judged has none."""
PARAMETERS, MEMORY, UNSETTLED = 1.15, 1.35, 1.0
STEPS = 6
BOUNDS, LEVELS, CHANNELS = (0.5, 0.8, 0.95, 1.2, 1.6, 2.4), (2, 3, 4), ((4, 8), (4, 8, 8))
DAMPINGS = (1.0, 0.35, 0.1)
TOLERANCE, SWEEPS, EXAMPLES = 1e-2, 100, 8


def run(trial: Trial) -> Outcome:
    """Parameters and peak memory against one level, and the share of examples that do not settle."""
    metrics: dict[str, Quantity] = {}
    total = 0
    for arch in trial.budget.pick(("dense",), ARCHITECTURES, ARCHITECTURES):
        for suffix, size in list(SIZES.items())[: trial.budget.pick(1, 2, 2)]:
            count, peak = _cost(trial.budget, trial.seed, trial.device, trial.side, arch, size)
            one_count, one_peak = _cost(trial.budget, trial.seed, trial.device, ONE, arch, size)
            metrics[f"{arch}{suffix}: parameters"] = Quantity(float(count), "")
            metrics[f"{arch}{suffix}: parameters against one level"] = Quantity(count / one_count, "x")
            metrics[f"{arch}{suffix}: peak memory"] = Quantity(peak / MEBIBYTE, "MiB")
            metrics[f"{arch}{suffix}: peak memory against one level"] = Quantity(peak / one_peak, "x")
            total += 0 if suffix else count
    stability, curves = _stability(trial)
    return Outcome({**metrics, **stability}, curves, Cost(total))


@functools.lru_cache(maxsize=16)
def _cost(budget: Budget, seed: int, device: str, side: str, arch: str, size: int) -> tuple[int, int]:
    """Parameters of a network, and the peak bytes of a training step of it."""
    net = _network(budget, seed, device, side, arch, size)
    batch = budget.pick(2, 32, 128)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, 1, size, size, generator=generator).to(device)
    y = torch.randint(10, (batch,), generator=generator).to(device)
    fixed = fixed_steps(net, budget.pick(1, STEPS, STEPS))
    for layer in equilibria(fixed):
        layer.warn = False  # the number of steps is fixed, settled or not
    training_step(fixed, x[:2], y[:2])  # what is made once is not charged to the measured step
    return counting.parameters(net), peak_bytes(lambda: training_step(fixed, x, y))


def _network(budget: Budget, seed: int, device: str, side: str, arch: str, size: int) -> MultiScale:
    torch.manual_seed(seed)
    options: dict[str, Any] = dict(nets.SMALL[arch]) if budget.name == "smoke" else {}
    options["levels"] = 1 if side == ONE else budget.pick(2, 3, 3)
    if arch == "sequence" and size % 7:
        options["patch"] = 8
    net = systems.create("mstep", (1, size, size), 10, arch=arch, shared=side != OWN, **options).to(device)
    assert isinstance(net, MultiScale)
    if side == PLAIN:
        net.equilibrium.solver = FixedPoint()
    return net


def _stability(trial: Trial) -> tuple[dict[str, Quantity], dict[str, Points]]:
    """The share of examples that do not settle, by bound, and the radii that the bounds lead to."""
    bounds = trial.budget.pick((0.8,), BOUNDS, BOUNDS)
    levels = (1,) if trial.side == ONE else trial.budget.pick((2,), LEVELS, LEVELS)
    data = shared.mnist(EXAMPLES, 1)
    found: dict[str, list[tuple[float, float]]] = {}
    metrics: dict[str, Quantity] = {}
    for bound in bounds:
        radii = []
        for depth, channels in itertools.product(levels, trial.budget.pick(CHANNELS[:1], CHANNELS, CHANNELS)):
            # drawn large, so that the bound is reached
            options = {"channels": channels, "levels": depth, "norm_bound": bound, "coupling_scale": 4.0}
            torch.manual_seed(trial.seed)
            net = systems.create("mstep", (1, 28, 28), 10, arch="conv", shared=trial.side != OWN, **options)
            assert isinstance(net, MultiScale)
            shares, radius = _settles(net.to(trial.device), data, trial)
            radii.append(radius)
            for name, share in shares.items():
                found.setdefault(name, []).append((bound, 100 * (1 - share)))
        metrics[f"radius of the levels alone, bound {bound:g}"] = Quantity(sum(radii) / len(radii), "")
    curves: dict[str, Points] = {}
    for name, points in found.items():
        metrics[name] = Quantity(_mean(p for _, p in points), "%")
        metrics[f"{name}, bound below 1"] = Quantity(_mean(p for b, p in points if b < 1), "%")
        curves[name] = [(bound, _mean(p for b, p in points if b == bound)) for bound in bounds]
    return metrics, curves


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept)


@torch.no_grad()
def _settles(net: MultiScale, data: Dataset, trial: Trial) -> tuple[dict[str, float], float]:
    energy = nets.energy(net.train())
    x = data.inputs("train", slice(0, trial.budget.pick(2, EXAMPLES, EXAMPLES))).to(trial.device)
    for _ in range(20):
        energy.bind(x)  # norm control sharpens its estimate at every call in training mode
    net.eval()
    net.equilibrium.warn = False
    bindings = detached(energy.bind(x))
    start = energy.initial(bindings)
    problem = Relaxation(energy, bindings, as_map=True)
    phase = Phase(problem, (start, problem.activate(start)), relative, TOLERANCE, 1.0)
    sweeps = trial.budget.pick(5, SWEEPS, SWEEPS)
    if trial.side != PLAIN:
        return {"unsettled": _share(CoarseToFine(), phase, sweeps)}, nets.radius_alone(net, x[:2])
    shares = [_share(FixedPoint(damping=d), phase, sweeps) for d in DAMPINGS]
    return {"unsettled": max(shares), "unsettled, undamped": shares[0]}, nets.radius_alone(net, x[:2])


def _share(solver: Solver, phase: Phase, sweeps: int) -> float:
    taken = passage(solver, phase, sweeps)
    assert taken is not None
    return taken.share


def _criteria() -> tuple[Criterion, ...]:
    found = []
    for arch in ARCHITECTURES:
        for what, aim in (("parameters", PARAMETERS), ("peak memory", MEMORY)):
            found.append(
                Criterion(
                    f"{arch}: {what} against one level",
                    f"{arch}: {what} against one level",
                    "x",
                    "at_most",
                    SHARED,
                    words="near-constant",
                    aim=aim,
                    beside=(OWN,),
                    scale="log",
                )
            )
    found += [
        Criterion(
            "examples that do not settle, norm bound below 1",
            "unsettled, bound below 1",
            "%",
            "at_most",
            SHARED,
            words="stable",
            aim=UNSETTLED,
            beside=(ONE, PLAIN, OWN),
        ),
        Criterion(
            "examples that do not settle, above one level by",
            "unsettled",
            "points",
            "at_most",
            SHARED,
            words="stable",
            aim=UNSETTLED,
            versus=(ONE,),
            beside=(PLAIN, OWN),
        ),
    ]
    return tuple(found)


CLAIM = Claim(
    id="M8",
    system="mstep",
    seed_file=nets.SEED_FILE,
    sentence="Three levels cost little more than one, and are as stable.",
    criteria=_criteria(),
    protocol=f"""
    Three levels with shared weights against one level of the same system with the same solver, widths as shipped.
    Memory is the exact peak of all tensors born in one training step on a batch of 128 (quick: 32), counted by a
    dispatch hook as in B3, with {STEPS} relaxation steps in both phases. Both are judged on images of 32 x 32, which
    halve on every level; MNIST's 28 x 28, which three levels of conv pad to 32 x 32 and one level does not, are given
    beside. Stability: fresh convolutional networks of 2 to 4 levels and of 2 and 3 layers, drawn so large that the
    coupling's norm is at its bound, {", ".join(f"{b:g}" for b in BOUNDS)}, on {EXAMPLES} MNIST images. An example does
    not settle if no state of {SWEEPS} sweeps has a relative residual (of the plain map, measured alike for all) of
    {TOLERANCE:g}. The plain iteration is given undamped, and with the best of the dampings
    {", ".join(f"{d:g}" for d in DAMPINGS)} for each network. Nothing is trained, and how gradients are taken does not
    matter here: there are no sides for backprop.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Examples that do not settle in 100 sweeps, 2 to 4 levels",
        x_label="bound of the couplings' norm",
        y_label="not settled (%)",
        curves=("unsettled", "unsettled, undamped"),
    ),
)
