"""M4: strided token levels against a single scale on long sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toreq.data import SequenceTask
from toreq.data.listops import Grammar, listops
from toreq.data.sequences import sequential_cifar10, sequential_mnist
from toreq.evidence import counting
from toreq.evidence.budgets import Budget
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.mstep import nets
from toreq.evidence.protocols.sequences import plans, scores
from toreq.evidence.protocols.sequences.training import Progress, Recipe, flops_per_sample, train
from toreq.solvers import CoarseToFine
from toreq.systems.mstep import MultiScaleSequence
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

LEVELS, HEADS, BATCH = 3, 2, 32
RATE, TRIALS = 1e-3, 3
SPACE = Space({"rate": Real(3e-4, 5e-3, log=True)})
"""What is tuned on every side: Adam's rate."""
LEARNS = 5.0
"""Points above the best simple guess (majority class, or by the first symbol) from which a side counts as learning."""
HOW = {
    "mstep": f"{LEVELS} strided levels, Equilibrium Propagation",
    "one-level": "one level of the same widths, Equilibrium Propagation: the looped transformer (ablation, CEP)",
    "bp-ff": f"a transformer block over the tokens of {LEVELS} levels, run once from coarse to fine, backprop",
}


@dataclass(frozen=True)
class Size:
    """One task at one budget.

    Attributes:
        train, test: numbers of sequences.
        steps: optimizer steps.
        features: width of a token.
        bounds: of ListOps, symbols of an expression, both excluded; padded to one below the upper.
        chunk: of images, neighbouring pixels in a token.
        levels: of the pyramid.
    """

    train: int
    test: int
    steps: int
    features: int = 32
    bounds: tuple[int, int] = (48, 129)
    chunk: int = 16
    levels: int = LEVELS


SIZES: dict[str, dict[str, Size]] = {
    "listops": {
        "smoke": Size(16, 8, 1, 8, (4, 17), levels=2),
        "quick": Size(20_000, 2000, 300),
        "full": Size(96_000, 2000, 1200, bounds=(128, 257)),
    },
    "cifar10": {
        "smoke": Size(16, 10, 1, 8, chunk=56, levels=2),
        "quick": Size(20_000, 2000, 500),
        "full": Size(50_000, 10_000, 2500, chunk=8),
    },
}
GRAMMAR = Grammar(max_depth=6, max_arguments=10)


def task(name: str, size: Size, budget: Budget, seed: int) -> SequenceTask:
    """The sequences of one task; ListOps is drawn anew for each seed. A smoke run takes MNIST, which comes with the
    package, in the place of CIFAR-10."""
    if name == "listops":
        low, high = size.bounds
        grammar = replace(GRAMMAR, min_length=low, max_length=high)
        return listops(size.train, size.test, grammar, seed=seed, name="listops")
    if budget.name == "smoke":
        return sequential_mnist(size.train, size.test, chunk=size.chunk)
    return sequential_cifar10(size.train, size.test, chunk=size.chunk)


class Reader(nn.Module):
    """A pyramid of tokens, or its feed-forward twin, on a task's sequences: ``(B, N)`` or ``(B, N, F)`` to ``(B, C)``.

    Args:
        net: the pyramid.
        forward: take its feed-forward twin.
    """

    def __init__(self, net: MultiScaleSequence, forward: bool) -> None:
        super().__init__()
        self.net = net.feedforward() if forward else net

    def forward(self, x: Tensor) -> Tensor:
        # features are rows of an image of one channel
        return self.net(x.unsqueeze(1) if x.ndim == 3 else x)


def build(how: str, made: SequenceTask, size: Size, seed: int, device: str = "cpu") -> Reader:
    """A side's model, freshly drawn, with the fast settings where it settles.

    Args:
        how: a key of `HOW`.
        made: the task.
        size: its levels and the width of a token.
        seed: of the weights.
        device: where it is to be.
    """
    options: dict[str, Any] = {"vocabulary": made.vocabulary} if made.vocabulary else {"patch": "rows"}
    shape = (made.length,) if made.vocabulary else (1, made.length, made.features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MultiScaleSequence(
            shape,
            made.outputs,
            levels=1 if how == "one-level" else size.levels,
            features=size.features,
            heads=HEADS,
            hidden=2 * size.features,
            # one linearisation per step: a few more steps, each far cheaper, to the same equilibrium
            solver=CoarseToFine(rounds=1),
            **options,
        )
        model = Reader(net, how == "bp-ff")
    net.equilibrium.hasten()
    net.equilibrium.warn = False  # what did not settle is counted
    return model.to(device)


def run(trial: Trial) -> Outcome:
    """Train one side on one task and test it."""
    name, how = trial.side.split()
    size = SIZES[name][trial.budget.name]
    made = task(name, size, trial.budget, trial.seed)
    recipe = _recipe(trial, size, trial.tuned)
    model = build(how, made, size, trial.seed, trial.device)
    at = train(model, made, recipe, seed=trial.seed, scratch=trial.scratch, device=trial.device)
    score = scores.evaluate(model, made, made.test, device=trial.device)
    guess = majority(made)
    metrics = {
        "accuracy": Quantity(score.metric, "%"),
        "loss": Quantity(score.loss, "nats"),
        "majority class": Quantity(guess, "%"),
        "rate": Quantity(recipe.rate, ""),
        "processor time": Quantity(at.processor, "s"),
    }
    if made.vocabulary:
        first = by_first_symbol(made)
        metrics["best guess from the first symbol"] = Quantity(first, "%")
        guess = max(guess, first)
    metrics["above the best simple guess"] = Quantity(score.metric - guess, "points")
    if how != "bp-ff":
        metrics |= _relaxation(model, made, at, trial.device)
    samples = at.step * recipe.batch
    cost = Cost(counting.parameters(model), flops_per_sample(model, made) * samples, samples)
    notes = (made.variant, *(("continued from a checkpoint",) if at.resumed else ()))
    return Outcome(metrics, {name: list(at.curve)}, cost, notes)


def majority(made: SequenceTask) -> float:
    """Percent of the test targets that are the most frequent class of the training targets."""
    most = torch.bincount(made.train.y.long()).argmax()
    return 100 * float((made.test.y.long() == most).double().mean())


def by_first_symbol(made: SequenceTask) -> float:
    """Percent of the test targets guessed from the first symbol: the most frequent class of training sequences that
    begin alike."""
    first, right = made.train.x[:, 0], 0
    for symbol in made.test.x[:, 0].unique():
        alike = made.train.y[first == symbol].long()
        if len(alike):
            right += int((made.test.y[made.test.x[:, 0] == symbol].long() == torch.bincount(alike).argmax()).sum())
    return 100 * right / len(made.test)


def _relaxation(model: Reader, made: SequenceTask, at: Progress, device: str) -> dict[str, Quantity]:
    net = model.net
    assert isinstance(net, MultiScaleSequence)
    x = made.batch(made.test, slice(0, 8), device).x
    x = x.unsqueeze(1) if x.ndim == 3 else x
    with net.equilibrium.couplings_off():
        off = scores.evaluate(model, made, made.test, device=device).metric
    return {
        "accuracy, couplings off": Quantity(off, "%"),
        "radius": Quantity(net.equilibrium.radius(x), ""),
        "radius of the levels alone": Quantity(nets.radius_alone(net, x), ""),
        "relaxations settled": Quantity(100 * at.settled / at.step, "%"),
        "relaxation steps": Quantity(at.relaxed / at.step, "steps"),
    }


def _recipe(trial: Trial, size: Size, params: Mapping[str, Value]) -> Recipe:
    rate = float(str(params.get("rate", RATE)))
    every = max(1, size.steps // 5)
    return Recipe(size.steps, BATCH, rate, 100.0, every, warmup=min(50, size.steps // 4))


def held_out_loss(trial: Trial, params: Mapping[str, Value]) -> float:
    """Minus the loss on held-out training sequences after a third of the training with ``params``."""
    name, how = trial.side.split()
    size = SIZES[name][trial.budget.name]
    made = plans.held_out(task(name, size, trial.budget, trial.seed), seed=trial.seed)
    recipe = _recipe(trial, replace(size, steps=max(1, size.steps // 3)), params)
    recipe = replace(recipe, evaluate_every=recipe.steps)
    model = build(how, made, size, trial.seed, trial.device)
    at = train(model, made, recipe, seed=trial.seed, scratch=trial.scratch, device=trial.device)
    return -at.losses[-1][1]


SIDES = {f"{name} {how}": words for name in SIZES for how, words in HOW.items()}


def _criteria() -> tuple[Criterion, ...]:
    found: list[Criterion] = []
    for name in SIZES:
        own, single, forward = f"{name} mstep", f"{name} one-level", f"{name} bp-ff"
        found.append(
            Criterion(
                f"{name}: {LEVELS} levels above one",
                "accuracy",
                "points",
                "at_least",
                own,
                words="potentially beating single scale",
                versus=(single,),
                beside=(forward,),
            )
        )
        found.append(
            Criterion(
                f"{name}: one level learns",
                "above the best simple guess",
                "points",
                "at_least",
                single,
                target=LEARNS,
                condition=True,
            )
        )
    return tuple(found)


def _protocol() -> str:
    # said from the numbers themselves, so that changing one of them makes earlier results stale
    said = []
    for budget in ("quick", "full"):
        ops, images = SIZES["listops"][budget], SIZES["cifar10"][budget]
        low, high = ops.bounds
        said.append(
            f"{budget}: expressions of {low + 1} to {high - 1} symbols, padded to {high - 1} tokens, {ops.train:,} for "
            f"training, {ops.steps:,} steps; {1024 // images.chunk} tokens of {images.chunk} pixels, "
            f"{images.train:,} images, {images.steps:,} steps; {ops.test:,} and {images.test:,} for the test"
        )
    return f"""
    ListOps (generated; operators MIN, MAX, MED and SM, 2 to {GRAMMAR.max_arguments} arguments, depth up to
    {GRAMMAR.max_depth}, drawn anew for each seed; padding is a symbol like any other) and sequential CIFAR-10 (the
    images are JPEG-recompressed: no comparison with published numbers), the pixels in reading order in chunks. Tokens
    of {SIZES["listops"]["quick"].features} features, {HEADS} heads, a hidden layer of twice the features, learned
    positions, a read-out that sees every token of the finest level, shared weights and springs as shipped. Sizes:
    {"; ".join(said)}. A smoke run takes MNIST instead of CIFAR-10. Every side has the same widths, sequences, order
    and number of samples; Adam in batches of {BATCH}, the gradient's norm clipped to 1, a rate that rises over 50 steps
    and then stays. That rate is tuned for each side and task in {TRIALS} trials of a third of the steps, judged by the
    loss on a tenth of the training sequences, drawn at random. Sides that settle use the fast settings, and one
    linearisation of the springs' solve per step. Accuracy is on the test set
    after the last step. Beside it: the accuracy of the majority class, on ListOps also that of the best guess from the
    first symbol, the accuracy with all couplings off, and the radius of the trained relaxation, with springs and of the
    levels alone. The comparison counts only where one level is {LEARNS:g} points above the better of these guesses: a
    single scale that does not learn would be easily beaten. Not among the sides is the implicit gradient of the same
    network (BP-eq), for its cost: M6 compares the two gradients directly.
    """


CLAIM = Claim(
    id="M4",
    system="mstep",
    seed_file=nets.SEED_FILE,
    sentence="On long sequences several scales beat a single one.",
    criteria=_criteria(),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture(
        "Accuracy against training sequences, ListOps and sequential CIFAR-10 (JPEG-recompressed)",
        x_label="sequences",
        y_label="test accuracy (%)",
        curves=tuple(SIZES),
    ),
    printed=("accuracy, couplings off", "radius"),
    tuning=Tuning(held_out_loss, dict.fromkeys(SIDES, SPACE), TRIALS, {side: {"rate": RATE} for side in SIDES}),
)
