"""S4: long sequences, ListOps and the pixels of CIFAR-10, against the looped transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from toreq.data import SequenceTask
from toreq.data.listops import Grammar, listops
from toreq.data.sequences import sequential_cifar10, sequential_mnist
from toreq.evidence import counting
from toreq.evidence.budgets import Budget
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.mstep.sequences import by_first_symbol, majority
from toreq.evidence.protocols.sequences import plans, scores
from toreq.evidence.protocols.sequences.training import Progress, Recipe, flops_per_sample, train
from toreq.evidence.tepssr import nets
from toreq.layer import equilibria
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

PARTS = "tepssr-parts"
HOW = {
    "listops": (nets.OWN, nets.FORWARD, nets.LOOPED, nets.FUSED, nets.DIAGONAL),
    "cifar10": (nets.OWN, PARTS, nets.FORWARD, nets.LOOPED, nets.FUSED, nets.DIAGONAL),
}
WORDS = {**nets.WORDS, PARTS: "the network with a window over the input and a read-out of its own for each part"}
BATCH, RATE, TRIALS = 32, 3e-3, 3
SPACE = Space({"rate": Real(5e-4, 1.5e-2, log=True)})
"""What is tuned on every side: Adam's rate."""
LEARNS = 5.0
"""Points above the best simple guess from which the network counts as learning."""
FASTER = 2.0
GRAMMAR = Grammar(max_depth=6, max_arguments=10)
ACCURACY, TIME, ABOVE = "accuracy", "log processor time a sequence", "above the best simple guess"
NAMES = {"listops": "ListOps", "cifar10": "CIFAR-10 (JPEG-recompressed)"}


@dataclass(frozen=True)
class Size:
    """One task at one budget.

    Attributes:
        train, test: numbers of sequences.
        steps: optimizer steps.
        features, hidden: D and M of the network; the other sides have as many parameters.
        bounds: of ListOps, symbols of an expression, both excluded; padded to one below the upper.
        chunk: of images, neighbouring pixels in a token.
    """

    train: int
    test: int
    steps: int
    features: int = 32
    hidden: int = 48
    bounds: tuple[int, int] = (48, 129)
    chunk: int = 8


SIZES: dict[str, dict[str, Size]] = {
    "listops": {
        "smoke": Size(16, 8, 1, 8, 8, (4, 17)),
        "quick": Size(20_000, 2000, 150),
        "full": Size(96_000, 2000, 1000, 64, 96, (128, 257)),
    },
    "cifar10": {
        "smoke": Size(16, 10, 1, 8, 8, chunk=112),
        "quick": Size(20_000, 2000, 150, chunk=8),
        "full": Size(50_000, 10_000, 1500, 64, 96, chunk=2),
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "listops": {"layers": 1, "pool": "mean", "selective": True, "attention": "none", "heads": 4},
    "cifar10": {
        "layers": 2, "gain": 4.0, "pool": "mean", "selective": False, "attention": "none", "states": 2, "window": 1,
    },
}  # fmt: skip
"""Of the network: selective maps for symbols, time-invariant ones for pixels; read out as the other sides are."""
IN_PARTS: dict[str, Any] = {"pool": 8, "window": 4}


def task(name: str, size: Size, budget: Budget, seed: int) -> SequenceTask:
    """The sequences of one task; ListOps is drawn anew for each seed. A smoke run takes MNIST, which comes with the
    package, in the place of CIFAR-10."""
    if name == "listops":
        low, high = size.bounds
        grammar = replace(GRAMMAR, min_length=low, max_length=high)
        return listops(size.train, size.test, grammar, seed=seed, name="listops")
    load = sequential_mnist if budget.name == "smoke" else sequential_cifar10
    return load(size.train, size.test, chunk=size.chunk)


def build(how: str, name: str, made: SequenceTask, size: Size, trial: Trial) -> nn.Module:
    """A side's model, freshly drawn."""
    options = {**OPTIONS[name], "features": size.features, "hidden": size.hidden}
    if how == PARTS:
        return nets.build(nets.OWN, made, trial.seed, trial.device, **{**options, **IN_PARTS})
    return nets.build(how, made, trial.seed, trial.device, **options)


def _recipe(size: Size, params: Mapping[str, Value]) -> Recipe:
    rate = float(str(params.get("rate", RATE)))
    return Recipe(size.steps, BATCH, rate, 100.0, max(1, size.steps // 5), warmup=max(1, min(50, size.steps // 4)))


def run(trial: Trial) -> Outcome:
    """Train one side on one task and test it; an interrupted run goes on."""
    name, how = trial.side.split()
    size = SIZES[name][trial.budget.name]
    made = task(name, size, trial.budget, trial.seed)
    recipe = _recipe(size, trial.tuned)
    model = build(how, name, made, size, trial)
    at = train(model, made, recipe, seed=trial.seed, scratch=trial.scratch, device=trial.device)
    score = scores.evaluate(model, made, made.test, device=trial.device)
    samples = at.step * recipe.batch
    guess = max(majority(made), by_first_symbol(made) if made.vocabulary else 0.0)
    seconds = at.processor / samples
    metrics = {
        ACCURACY: Quantity(score.metric, "%"),
        "loss": Quantity(score.loss, "nats"),
        "best simple guess": Quantity(guess, "%"),
        ABOVE: Quantity(score.metric - guess, "points"),
        "processor time a sequence": Quantity(1e3 * seconds, "ms"),
        TIME: Quantity(math.log(max(seconds, 1e-9)), "ln s"),
        "rate": Quantity(recipe.rate, ""),
    }
    metrics |= _relaxation(model, made, at, trial.device)
    cost = Cost(counting.parameters(model), flops_per_sample(model, made) * samples, samples)
    notes = (made.variant, *(("continued from a checkpoint",) if at.resumed else ()))
    return Outcome(metrics, {name: list(at.curve)}, cost, notes)


def _relaxation(model: nn.Module, made: SequenceTask, at: Progress, device: str) -> dict[str, Quantity]:
    if not equilibria(model):
        return {}
    x = made.batch(made.test, slice(0, 8), device).x
    embed = getattr(model, "embed", None)
    drive = x if embed is None else embed(x).detach()
    layer = nets.layer(model)
    found = {
        "radius": Quantity(layer.radius(drive), ""),
        "relaxations settled": Quantity(100 * at.settled / at.step, "%"),
        "relaxation steps": Quantity(at.relaxed / at.step, "steps"),
    }
    with layer.couplings_off():
        off = scores.evaluate(model, made, made.test, device=device).metric
    return {**found, "accuracy, couplings off": Quantity(off, "%")}


def held_out_loss(trial: Trial, params: Mapping[str, Value]) -> float:
    """Minus the loss on held-out training sequences after a third of the training with ``params``."""
    name, how = trial.side.split()
    size = SIZES[name][trial.budget.name]
    made = plans.held_out(task(name, size, trial.budget, trial.seed), seed=trial.seed)
    recipe = _recipe(replace(size, steps=max(1, size.steps // 3)), params)
    recipe = replace(recipe, evaluate_every=recipe.steps)
    model = build(how, name, made, size, trial)
    at = train(model, made, recipe, seed=trial.seed, scratch=trial.scratch, device=trial.device)
    return -at.losses[-1][1]


SIDES = {f"{name} {how}": WORDS[how] for name in SIZES for how in HOW[name]}


def _criteria() -> tuple[Criterion, ...]:
    found: list[Criterion] = []
    for name, words in NAMES.items():
        own, looped = f"{name} {nets.OWN}", (f"{name} {nets.LOOPED}", f"{name} {nets.FUSED}")
        others = tuple(f"{name} {how}" for how in HOW[name] if how not in (nets.OWN, nets.LOOPED, nets.FUSED))
        found.append(
            Criterion(
                f"{words}: above the looped transformer", ACCURACY, "points", "at_least", own,
                words="better accuracy than toroidal Transformer", versus=looped, beside=others,
            )
        )  # fmt: skip
        found.append(
            Criterion(
                f"{words}: log of training time a sequence, against it", TIME, "ln s", "at_most", own,
                target=-math.log(FASTER), words="2-5x speedup", versus=looped, beside=others,
            )
        )  # fmt: skip
        found.append(
            Criterion(f"{words}: the network learns", ABOVE, "points", "at_least", own, target=LEARNS, condition=True)
        )
    return tuple(found)


def _protocol() -> str:
    said = []
    for budget in ("quick", "full"):
        ops, images = SIZES["listops"][budget], SIZES["cifar10"][budget]
        low, high = ops.bounds
        said.append(
            f"{budget}: expressions of {low + 1} to {high - 1} symbols, {ops.train:,} for training, {ops.steps:,} "
            f"steps, {ops.features} features; {1024 // images.chunk} tokens of {images.chunk} pixels, "
            f"{images.train:,} images, {images.steps:,} steps; {ops.test:,} and {images.test:,} for the test"
        )
    options = "; ".join(f"{n}: " + ", ".join(f"{k} {v}" for k, v in o.items()) for n, o in OPTIONS.items())
    return f"""
    Two of the tasks of the Long Range Arena, shorter than there: ListOps (generated; operators MIN, MAX, MED and SM, 2
    to {GRAMMAR.max_arguments} arguments, depth up to {GRAMMAR.max_depth}, drawn anew for each seed) and sequential
    CIFAR-10 (the images are JPEG-recompressed: no comparison with published numbers), pixels in reading order, in
    chunks. Sizes: {"; ".join(said)}. The network of TEP-SSR by task: {options}; channels are one and a half times the
    features, padding is masked. It reads the mean of its last layer, as the other sides do of theirs; on CIFAR-10 the
    window and the read-out by parts that it ships with stand beside it
    ({"; ".join(f"{k} {v}" for k, v in IN_PARTS.items())}). Two looped transformers: the attention energy of the base,
    learned by Equilibrium Propagation, and an ordinary block with PyTorch's fused attention in a loop, learned by the
    implicit gradient. Every other side gets the width that brings it nearest to the same number of parameters; its
    padding is a symbol like any other. A smoke run takes MNIST instead of CIFAR-10. The same sequences, order and
    number of samples for all; Adam in batches of {BATCH}, the gradient's norm clipped to 1, a rate that rises and then
    stays, tuned for each side and task in {TRIALS} trials of a third of the steps by the loss on a tenth of the
    training sequences, drawn at random. Accuracy is on the test set after the last step. Training time is the
    processor's, a sequence; differences of its logarithm are paired by seed: -0.693 is half. It counts only where the
    network is {LEARNS:g} points above the best simple guess (majority class, on ListOps also by the first symbol).
    """


CLAIM = Claim(
    id="S4",
    system="tepssr",
    seed_file=nets.SEED_FILE,
    sentence="On long sequences it is faster and better than the looped transformer.",
    criteria=_criteria(),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture(
        "Accuracy against training sequences, sequential CIFAR-10 (JPEG-recompressed)",
        x_label="sequences", y_label="test accuracy (%)", curves=("cifar10",),
    ),
    printed=("radius", "accuracy, couplings off"),
    tuning=Tuning(held_out_loss, dict.fromkeys(SIDES, SPACE), TRIALS, {side: {"rate": RATE} for side in SIDES}),
)  # fmt: skip
