"""S8: algorithmic tasks at two and four times the training length, and the steps taken against length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toreq.data import Sequences, SequenceTask, sequence_task
from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.protocols.sequences import plans, scores
from toreq.evidence.protocols.sequences.training import Recipe, train
from toreq.evidence.tepssr import nets
from toreq.layer import equilibria
from toreq.solvers import Anderson
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

TASKS = ("parity", "sort", "maze")
HOW = (nets.OWN, nets.FORWARD, nets.LOOPED, nets.LSTM, nets.DIAGONAL)
LONGER = (2, 4)
OPTIONS: dict[str, Any] = {"layers": 1, "attention": "none", "states": 2}
RATE, TRIALS, BATCH = 5e-3, 3, 32
SPACE = Space({"rate": Real(1e-3, 2e-2, log=True)})
EXTRA, LEARNED, MORE = "extra steps at the longest", 90.0, 5.0
TIGHT, MOST = 1e-5, 300
"""Relative residual to which steps are counted, and most of them."""
WORDS = "better extrapolation than attention; adaptive equilibrium steps emulate multi-step inference"


@dataclass(frozen=True)
class Size:
    """Sequences for training and test, their length by task, steps, features and channels."""

    sequences: tuple[int, int]
    lengths: Mapping[str, int]
    steps: int
    features: int
    hidden: int


SIZES = {
    "smoke": Size((16, 8), {"parity": 3, "sort": 3, "maze": 2}, 1, 8, 8),
    "quick": Size((20_000, 500), {"parity": 8, "sort": 6, "maze": 3}, 500, 32, 48),
    "full": Size((50_000, 1000), {"parity": 10, "sort": 8, "maze": 4}, 1200, 32, 48),
}


def task(name: str, trial: Trial) -> SequenceTask:
    """The sequences of one task, drawn anew for each seed."""
    size = SIZES[trial.budget.name]
    count, tested = size.sequences
    return sequence_task(
        name, train=count, test=tested, length=size.lengths[name], longer=LONGER, seed=trial.seed
    )  # fmt: skip


def build(how: str, made: SequenceTask, trial: Trial) -> nn.Module:
    """A side's model, freshly drawn."""
    size = SIZES[trial.budget.name]
    return nets.build(how, made, trial.seed, trial.device, features=size.features, hidden=size.hidden, **OPTIONS)


@torch.no_grad()
def steps_of(model: nn.Module, x: Tensor) -> float:
    """Mean number of free steps to the tight tolerance over sequences."""
    model.eval()
    taken, layer = [], nets.layer(model)
    shipped = layer.solver
    layer.solver = Anderson(length=3, tolerance=TIGHT, max_steps=MOST)
    for part in x.split(125):
        model(part)
        free = layer.last.free
        assert free is not None
        taken.append(free.steps.double())
    layer.solver = shipped
    return float(torch.cat(taken).mean())


def _recipe(trial: Trial, params: Mapping[str, Value], share: int = 1) -> Recipe:
    steps = max(1, SIZES[trial.budget.name].steps // share)
    rate = float(str(params.get("rate", RATE)))
    batch = trial.budget.pick(4, BATCH, BATCH)
    return Recipe(steps, batch, rate, LEARNED, max(1, steps // 10), warmup=max(1, min(50, steps // 4)))


def run(trial: Trial) -> Outcome:
    """Train one side on one task; test it at several lengths."""
    name, how = trial.side.split()
    made = task(name, trial)
    model = build(how, made, trial)
    recipe = _recipe(trial, trial.tuned)
    at = train(model, made, recipe, seed=trial.seed, scratch=trial.scratch, device=trial.device)
    parts: dict[int, Sequences] = {1: made.test, **{n: made.longer[f"{n}x"] for n in LONGER}}
    metrics: dict[str, Quantity] = {}
    accuracy: list[tuple[float, float]] = []
    steps: list[tuple[float, float]] = []
    for times, part in parts.items():
        found = scores.evaluate(model, made, part, device=trial.device).metric
        metrics[f"accuracy, {times}x length"] = Quantity(found, "%")
        accuracy.append((float(times), found))
        if equilibria(model):
            x = made.batch(part, slice(0, 250), trial.device).x
            steps.append((float(times), steps_of(model, x)))
    metrics["samples to threshold"] = Quantity(at.reached, "samples")
    if steps:
        metrics[EXTRA] = Quantity(100 * (steps[-1][1] / steps[0][1] - 1), "%")
        x = made.batch(made.test, slice(0, 8), trial.device).x
        embed = getattr(model, "embed", None)
        metrics["radius"] = Quantity(nets.layer(model).radius(x if embed is None else embed(x).detach()), "")
        with nets.layer(model).couplings_off():
            off = scores.evaluate(model, made, made.test, device=trial.device).metric
        metrics["accuracy, couplings off"] = Quantity(off, "%")
    samples = at.step * recipe.batch
    curves = {f"{name}: accuracy": accuracy, **({f"{name}: steps": steps} if steps else {})}
    return Outcome(metrics, curves, Cost(counting.parameters(model), None, samples), (made.variant,))


def held_out_loss(trial: Trial, params: Mapping[str, Value]) -> float:
    """Minus the loss on held-out training sequences after a third of the training with ``params``."""
    name, how = trial.side.split()
    made = plans.held_out(task(name, trial), seed=trial.seed)
    recipe = _recipe(trial, params, 3)
    recipe = replace(recipe, evaluate_every=recipe.steps)
    model = build(how, made, trial)
    at = train(model, made, recipe, seed=trial.seed, scratch=trial.scratch, device=trial.device)
    return -at.losses[-1][1]


SIDES = {f"{name} {how}": nets.WORDS[how] for name in TASKS for how in HOW}


def _criteria() -> tuple[Criterion, ...]:
    found: list[Criterion] = []
    for name in TASKS:
        own, looped = f"{name} {nets.OWN}", f"{name} {nets.LOOPED}"
        others = tuple(f"{name} {how}" for how in HOW if how not in (nets.OWN, nets.LOOPED))
        for times in LONGER:
            metric = f"accuracy, {times}x length"
            found.append(
                Criterion(
                    f"{name}: at {times} times the length, above the looped transformer", metric, "points", "at_least",
                    own, words=WORDS, versus=(looped,), beside=others,
                )
            )  # fmt: skip
        found.append(
            Criterion(f"{name}: {EXTRA}", EXTRA, "%", "at_least", own, words=WORDS, aim=MORE, beside=(looped,))
        )
        found.append(
            Criterion(
                f"{name}: learned at the training length", "accuracy, 1x length", "%", "at_least", own, target=LEARNED,
                beside=(looped, *others), condition=True,
            )
        )  # fmt: skip
    return tuple(found)


def _protocol() -> str:
    said = "; ".join(
        f"{budget}: lengths {dict(s.lengths)}, {s.steps:,} steps, {s.features} features and {s.hidden} channels"
        for budget, s in SIZES.items()
        if budget != "smoke"
    )
    return f"""
    Running parity, sorting, and mazes (the shortest way), with a label for every position ({said}); trained at one
    length, tested at {LONGER[0]} and {LONGER[1]} times that length. The network of TEP-SSR is the tagger with one tanh
    layer, selective maps, no attention and no positions. Other sides have the width that brings them nearest to its
    number of parameters; the looped transformer has sines and cosines of the position, the LSTM and the diagonal
    state-space model see the past only. Adam, batches of {BATCH}, the gradient's norm clipped to 1, a rate that rises
    and then stays, tuned for each side and task in {TRIALS} trials of a third of the steps by the loss on a tenth of
    the training sequences. Each sequence settles for itself; accuracy is at the fast tolerance of training, at which
    steps are at their least for every length, and steps are counted to a relative residual of {TIGHT:g} (at most
    {MOST}), on 250 sequences of each length. A task counts only where the network reaches {LEARNED:g}% at
    the training length.
    """


CLAIM = Claim(
    id="S8",
    system="tepssr",
    seed_file=nets.SEED_FILE,
    sentence="Adaptive depth reasons and extrapolates.",
    criteria=_criteria(),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture(
        "Sorting: accuracy against length", x_label="times the training length", y_label="accuracy (%)",
        curves=("sort: accuracy",),
    ),
    printed=("radius", "accuracy, couplings off"),
    tuning=Tuning(held_out_loss, dict.fromkeys(SIDES, SPACE), TRIALS, {side: {"rate": RATE} for side in SIDES}),
)  # fmt: skip
