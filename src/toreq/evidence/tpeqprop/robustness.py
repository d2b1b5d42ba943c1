"""T5: adversarial robustness against EqProp and backprop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toreq import systems
from toreq.data import Dataset
from toreq.estimators import Implicit
from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.protocols.robustness import accuracy, attackable, attacks, baselines, fit, masking
from toreq.evidence.protocols.robustness.attacks import Attack
from toreq.evidence.protocols.robustness.fitting import Fitted, Matching, Recipe
from toreq.evidence.tpeqprop import nets
from toreq.layer import equilibria

OWN = ("tpeqprop loop", "tpeqprop chain")
SIDES = {
    "tpeqprop loop": "one level of ReLUs that predicts itself, by TPEqProp",
    "tpeqprop chain": "one hidden level of ReLUs, by TPEqProp",
    "eqprop mlp": "a layer of the base, coupled to itself symmetrically, by centered EqProp",
    "bp-eq mlp": "the same layer by the implicit gradient",
    "bp mlp": "one hidden layer of ReLUs, backprop",
}
EPS = (0.05, 0.1, 0.2, 0.4)
JUDGED, PROBED = 0.1, 0.05
"""The largest pixel of a perturbation at which sides are compared, and at which the number of steps is varied."""
SAME = 2.0
"""Points of clean accuracy around backprop's within which a side counts as equally good."""
WHITE, BLACK = f"accuracy, white box {JUDGED}", f"accuracy, black box {JUDGED}"
SURROGATE_SEED = 10_000


@dataclass(frozen=True)
class Size:
    """What a budget buys: images for training, held out and tested; width; when training stops; images attacked and
    queried; steps and restarts of gradient attacks, rounds and queries of the one by labels."""

    train: int
    held: int
    test: int
    width: int
    recipe: Recipe
    matching: Matching
    attacked: int
    queried: int
    steps: int
    restarts: int
    rounds: int
    queries: int


SIZES = {
    "smoke": Size(60, 20, 20, 8, Recipe(2, 1e-2, 16), Matching(50.0, 50.0, 2), 8, 3, 2, 1, 1, 4),
    "quick": Size(10_000, 1000, 2000, 256, Recipe(12), Matching(93.0, 0.5, 20), 60, 20, 40, 1, 6, 30),
    "full": Size(60_000, 5000, 10_000, 256, Recipe(12), Matching(97.0, 0.3, 100), 500, 100, 40, 3, 20, 100),
}
MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "eqprop mlp": lambda width: systems.create("toreqprop", (1, 28, 28), 10, hidden=(width,)),
    "bp-eq mlp": lambda width: systems.create("toreqprop", (1, 28, 28), 10, hidden=(width,), estimator=Implicit()),
    "bp mlp": lambda width: baselines.mlp(width=width),
}


def make(side: str, width: int, seed: int) -> nn.Module:
    """The network of a side, freshly drawn from a seed."""
    if side in OWN:
        return nets.build("mlp", seed, hidden=(width,), topology=side.split()[1])
    torch.manual_seed(seed)
    return MAKERS[side](width)


def trained(side: str, trial: Trial, seed: int) -> tuple[nn.Module, Fitted, Dataset]:
    """A side trained to the clean accuracy of all, and the data."""
    size = SIZES[trial.budget.name]
    data = shared.mnist(size.train, size.test)
    net = make(side, size.width, seed).to(trial.device)
    return net, fit(net, data, size.recipe, seed, size.held, size.matching), data


def run(trial: Trial) -> Outcome:
    """Train one side to the clean accuracy of all, attack it, and check its gradients for masking."""
    size = SIZES[trial.budget.name]
    net, fitted, data = trained(trial.side, trial, trial.seed)
    x, y = data.inputs("test", slice(None)).to(trial.device), data.test_y.to(trial.device)
    other, _, _ = trained("bp mlp", trial, trial.seed + SURROGATE_SEED)
    survived, clean, checks = attacked(net, other, x[: size.attacked], y[: size.attacked], size, trial.seed)
    before = 100 * float(clean.double().mean())
    curves = {
        name: [
            (0.0, 100 * float(clean[: alive.shape[1]].double().mean())),
            *zip(EPS, masking.percent(alive), strict=True),
        ]
        for name, alive in survived.items()
    }
    at = EPS.index(JUDGED)
    metrics = {
        "clean accuracy": Quantity(accuracy(net, x, y), "%"),
        "clean accuracy of the attacked": Quantity(before, "%"),
        **{f"accuracy, {name} {JUDGED}": Quantity(masking.percent(alive)[at], "%") for name, alive in survived.items()},
        **{f"check: {check.name}": Quantity(float(check.passes), "") for check in checks},
        "gradients not masked": Quantity(float(masking.all_pass(checks)), ""),
        "training steps": Quantity(float(fitted.steps), "steps"),
    }
    for layer in equilibria(net):
        metrics["radius"] = Quantity(layer.radius(x[:16]), "")
    failed = tuple(f"{c.name}: {c.value:.1f} above {c.limit:g}" for c in checks if not c.passes)
    return Outcome(metrics, curves, Cost(counting.parameters(net), None, fitted.samples), failed)


def attacked(
    net: nn.Module, other: nn.Module, x: Tensor, y: Tensor, size: Size, seed: int
) -> tuple[dict[str, Tensor], Tensor, list[masking.Check]]:
    """Survivors of every attack by its name, those of none, and the signs of masked gradients.

    Args:
        net: the network under attack.
        other: whose adversarial images are tried on it.
        x, y: images and labels.
        size: of the attacks.
        seed: of their random starts.
    """
    target, few = attackable(net), slice(0, size.queried)
    clean = attacks.survivors(target, Attack("fgsm", "linf", (1e-12,)), x, y)[0]
    climb = Attack("pgd", "linf", EPS, size.steps, size.restarts)
    single = attacks.survivors(target, Attack("fgsm", "linf", EPS), x, y)
    pgd = attacks.survivors(target, climb, x, y, seed)
    white = attacks.survivors(target, replace(climb, kind="margin", restarts=1), x, y, seed, among=pgd)
    blind = Attack("hopskipjump", "linf", EPS, size.rounds, queries=size.queries)
    black = attacks.survivors(target, blind, x[few], y[few], seed)
    moved = attacks.transferred(target, attackable(other), climb, x, y, seed)
    counts = (max(1, size.steps // 4), size.steps, 2 * size.steps)
    by_steps = {n: attacks.survivors(target, Attack("pgd", "linf", (PROBED,), n), x[few], y[few], seed) for n in counts}
    checks = [
        masking.not_vanishing(attacks.vanishing(target, x, y)),
        masking.falls(pgd, clean),
        masking.reaches_zero(pgd),
        masking.at_least_as_strong("PGD is at least as strong as one step", pgd, single),
        masking.at_least_as_strong("the margin loss finds little more", pgd, white, masking.LOSS_SLACK),
        masking.at_least_as_strong("white-box beats labels alone", pgd, black),
        masking.at_least_as_strong("white-box beats transfer", pgd, moved),
        masking.more_steps(by_steps),
    ]
    named = {"one step": single, "PGD": pgd, "white box": white, "black box": black, "transfer": moved}
    return named, clean, checks


def _criteria() -> tuple[Criterion, ...]:
    found: list[Criterion] = []
    words: dict[str, Any] = {"words": "better adversarial defense"}
    for side in OWN:
        for what, metric in (("white box", WHITE), ("black box", BLACK)):
            found.append(
                Criterion(
                    f"{side}: {what}, against EqProp and backprop", metric, "points", "at_least", side,
                    versus=("eqprop mlp", "bp mlp"), beside=("bp-eq mlp",), **words,
                )
            )  # fmt: skip
        found.append(
            Criterion(
                f"{side}: gradients not masked", "gradients not masked", "", "at_least", side, target=1.0,
                condition=True,
            )
        )  # fmt: skip
    found += [
        Criterion(
            f"{side}: clean accuracy beside backprop's", "clean accuracy", "points", "between", side,
            target=(-SAME, SAME), versus=("bp mlp",), condition=True,
        )
        for side in (*OWN, "eqprop mlp")
    ]  # fmt: skip
    return tuple(found)


def _protocol() -> str:
    said = "; ".join(
        f"{name}: {s.train:,} images of which {s.held:,} are held out, until {s.matching.target:g}% of these are right "
        f"(looked at every {s.matching.every} steps), {s.attacked} test images attacked and {s.queried} queried, "
        f"{s.restarts} random start{'s' if s.restarts > 1 else ''}, {s.rounds} rounds of {s.queries} queries and more"
        for name, s in SIZES.items()
        if name != "smoke"
    )
    return f"""
    One hidden layer of {SIZES["quick"].width} units on MNIST, trained by Adam at 1e-3 until the clean accuracy on
    held-out images is the same for all sides, at most 12 epochs ({said}). By foolbox, in the largest pixel, at
    {", ".join(map(str, EPS))}: PGD-40 on the loss; white box is the worst of that and of PGD-40 on the margin; black
    box is HopSkipJump, which sees labels alone; images that fool another backprop network are transferred. Judged at
    {JUDGED:g}. The input's gradient is the implicit one through the equilibrium. Signs of masked gradients (they
    vanish, accuracy rises with the size or survives the largest, one step, labels, transfer or another loss beat PGD,
    more steps are weaker at {PROBED:g}) are checked, and a side with such a sign does not count. Nor does the
    comparison where the clean test accuracy of a side differs by more than {SAME:g} points from that of backprop.
    Untuned: all sides have one recipe. On a chain the trained network is backprop's up to rounding; the loop stands
    beside it.
    """


CLAIM = Claim(
    id="T5",
    system="tpeqprop",
    seed_file=nets.SEED_FILE,
    sentence="Adversarial robustness is above that of EqProp and backprop.",
    criteria=_criteria(),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture(
        "Accuracy under white-box attack", x_label="largest change of a pixel", y_label="accuracy (%)",
        curves=("white box",),
    ),
    printed=("clean accuracy",),
)  # fmt: skip
