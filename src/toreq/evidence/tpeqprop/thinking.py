"""T8: harder inputs take more relaxation steps, and more steps help."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from toreq import systems
from toreq.data import Sequences, SequenceTask, gaussian_noise, seeded, sequence_task
from toreq.diagnostics.relaxation import predictions
from toreq.estimators import Implicit, Predictive
from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.protocols.sequences import scores
from toreq.evidence.protocols.sequences.looped import CausalBlock, Looped
from toreq.evidence.protocols.sequences.parts import Embedding
from toreq.evidence.protocols.sequences.training import Recipe, train
from toreq.evidence.tpeqprop import fitting, nets
from toreq.evidence.tpeqprop.fitting import Plan
from toreq.layer import Equilibrium, wrap
from toreq.solvers import Anderson

HOW = {
    nets.OWN: "one untied softmax-attention block as a loop, by TPEqProp",
    nets.IMPLICIT: "the same loop by the implicit gradient",
    nets.CENTERED: "the looped transformer of the base, symmetric, by centered EqProp",
}
BUDGETS = (1, 2, 3, 5, 8, 12, 20, 100)
"""Steps allowed; the last is more than any input takes."""
NOISE = (0.0, 0.25, 0.5, 1.0)
LONGER = (2, 3)
IMAGES, SEQUENCES = "mnist", ("parity", "sort")
WORDS = "inference-time compute scaling (deeper thinking on hard inputs)"
GAIN, EXTRA, RANKED = "gain from more steps", "extra steps on the hardest inputs", "rank correlation of steps and loss"
AIMS = {GAIN: 1.0, EXTRA: 5.0, RANKED: 0.1}
RATE = 2e-3


@dataclass(frozen=True)
class Size:
    """What a budget buys: images for training and test, epochs, features; sequences of a length for training and test,
    and optimizer steps."""

    images: tuple[int, int]
    epochs: float
    features: int
    sequences: tuple[int, int]
    length: int
    steps: int


SIZES = {
    "smoke": Size((48, 20), 1, 8, (16, 8), 3, 2),
    "quick": Size((10_000, 2000), 2, 32, (20_000, 500), 6, 300),
    "full": Size((60_000, 10_000), 4, 64, (50_000, 1000), 10, 2000),
}


class Block(CausalBlock):
    """A `CausalBlock` in which every position sees all others."""

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """The next state ``(B, N, D)``."""
        parts = (self.query(h), self.key(h), self.value(h))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        mixed = ((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.norm(x + self.out(mixed) + self.outer(torch.tanh(self.inner(h))))


def image_net(how: str, trial: Trial) -> nn.Module:
    """The loop of a side on images, freshly drawn."""
    features = SIZES[trial.budget.name].features
    options: dict[str, Any] = {"features": features, "heads": 2, "hidden": 2 * features, "patch": 7}
    if how == nets.CENTERED:
        torch.manual_seed(trial.seed)
        net: nn.Module = systems.create("toreqprop", (1, 28, 28), 10, arch="transformer", settings="fast", **options)
        nets.layer(net).warn = False
    else:
        estimator = Implicit() if how == nets.IMPLICIT else None
        net = nets.build("transformer", trial.seed, topology="loop", estimator=estimator, **options)
    return net.to(trial.device)


def sequence_net(how: str, made: SequenceTask, features: int, seed: int) -> Looped:
    """The loop of a side on sequences, freshly drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embed = Embedding(made, features, positioned=True)
        model = Looped(embed, features, 2, 2 * features, made.outputs, made.length, causal=False, implicit=False)
        if how != nets.CENTERED:
            estimator = Implicit() if how == nets.IMPLICIT else Predictive()
            block = Block(features, 2, 2 * features)
            layer = wrap(block, (made.length, features), solver=Anderson(length=3), estimator=estimator)
            layer.hasten()
            layer.warn = False
            model.equilibrium = layer
        return model


@contextmanager
def limited(layer: Equilibrium, steps: int) -> Iterator[None]:
    """At most so many free steps inside the block."""
    held = layer.solver
    layer.solver = replace(held, max_steps=steps)
    try:
        yield
    finally:
        layer.solver = held


@torch.no_grad()
def steps_of(net: nn.Module, x: Tensor) -> Tensor:
    """Free steps that each input takes, ``(B,)``."""
    net.eval()
    taken = []
    for part in x.split(250):
        net(part)
        free = nets.layer(net).last.free
        assert free is not None
        taken.append(free.steps.cpu())
    return torch.cat(taken).double()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, in [-1, 1]; 0 where one of the two has no order."""
    first, second = (rankdata(t.double().numpy()) for t in (a, b))
    return float(np.corrcoef(first, second)[0, 1]) if first.std() > 0 and second.std() > 0 else 0.0


def _summary(by_budget: list[tuple[float, float]], by_difficulty: list[tuple[float, float]]) -> dict[str, Quantity]:
    return {
        "accuracy": Quantity(by_budget[-1][1], "%"),
        f"accuracy, {by_budget[0][0]:g} step": Quantity(by_budget[0][1], "%"),
        GAIN: Quantity(by_budget[-1][1] - by_budget[0][1], "points"),
        EXTRA: Quantity(100 * (by_difficulty[-1][1] / by_difficulty[0][1] - 1), "%"),
        "steps on the easiest inputs": Quantity(by_difficulty[0][1], "steps"),
        "steps on the hardest inputs": Quantity(by_difficulty[-1][1], "steps"),
    }


def run(trial: Trial) -> Outcome:
    """Train one loop on one task; accuracy against steps allowed, steps taken against difficulty."""
    name, how = trial.side.split()
    return _on_images(trial, how) if name == IMAGES else _on_sequences(trial, name, how)


def _on_images(trial: Trial, how: str) -> Outcome:
    size = SIZES[trial.budget.name]
    data = shared.mnist(*size.images)
    net = image_net(how, trial)
    plan = Plan(size.epochs, RATE, trial.budget.pick(16, 100, 100))
    at = fitting.fit(net, data, plan, seed=trial.seed, scratch=trial.scratch)
    x, y = data.inputs("test", slice(0, 2000)).to(trial.device), data.test_y[:2000].to(trial.device)
    by_budget = []
    for most in BUDGETS:
        with limited(nets.layer(net), most):
            by_budget.append((float(most), 100 * float((predictions(net, x) == y).double().mean())))
    generator = seeded(trial.seed, 8, device=trial.device)
    noisy = {s: gaussian_noise(x, s, None, generator=generator) if s else x for s in NOISE}
    taken = {s: steps_of(net, images) for s, images in noisy.items()}
    by_noise = [(s, float(t.mean())) for s, t in taken.items()]
    with torch.no_grad():
        logits = torch.cat([net(part) for part in x.split(250)])
    loss = nn.functional.cross_entropy(logits, y, reduction="none").cpu()
    ranked = rank_correlation(taken[0.0], loss)
    metrics = {
        **_summary(by_budget, by_noise),
        RANKED: Quantity(ranked, ""),
        "radius": Quantity(nets.layer(net).radius(x[:16]), ""),
    }
    curves = {f"{IMAGES}: accuracy": by_budget, f"{IMAGES}: steps": by_noise}
    return Outcome(metrics, curves, Cost(counting.parameters(net), None, at.samples))


def _on_sequences(trial: Trial, name: str, how: str) -> Outcome:
    size = SIZES[trial.budget.name]
    count, tested = size.sequences
    made = sequence_task(name, train=count, test=tested, length=size.length, longer=LONGER, seed=trial.seed)
    model = sequence_net(how, made, size.features, trial.seed).to(trial.device)
    batch = trial.budget.pick(4, 32, 32)
    recipe = Recipe(size.steps, batch, RATE, 100.0, max(1, size.steps // 5), warmup=min(50, size.steps))
    at = train(model, made, recipe, seed=trial.seed, scratch=trial.scratch, device=trial.device)
    parts: Mapping[int, Sequences] = {1: made.test, **{n: made.longer[f"{n}x"] for n in LONGER}}
    by_budget = []
    for most in BUDGETS:
        with limited(model.equilibrium, most):
            by_budget.append((float(most), scores.evaluate(model, made, made.test, device=trial.device).metric))
    by_length, metrics = [], {}
    for times, part in parts.items():
        taken = steps_of(model, made.batch(part, slice(0, 250), trial.device).x)
        by_length.append((float(times * size.length), float(taken.mean())))
        metrics[f"accuracy, {times}x length"] = Quantity(
            scores.evaluate(model, made, part, device=trial.device).metric, "%"
        )
    drive = model.embed(made.batch(made.test, slice(0, 8), trial.device).x).detach()
    metrics |= _summary(by_budget, by_length)
    metrics["radius"] = Quantity(model.equilibrium.radius(drive), "")
    curves = {f"{name}: accuracy": by_budget, f"{name}: steps": by_length}
    return Outcome(metrics, curves, Cost(counting.parameters(model), None, at.step * batch))


SIDES = {f"{name} {how}": words for name in (IMAGES, *SEQUENCES) for how, words in HOW.items()}


def _criteria() -> tuple[Criterion, ...]:
    found: list[Criterion] = []
    units = {GAIN: "points", EXTRA: "%", RANKED: ""}
    for name in (IMAGES, *SEQUENCES):
        others = tuple(f"{name} {how}" for how in HOW if how != nets.OWN)
        for metric, aim in AIMS.items():
            if metric != RANKED or name == IMAGES:
                found.append(
                    Criterion(
                        f"{name}: {metric}", metric, units[metric], "at_least", f"{name} {nets.OWN}", words=WORDS,
                        aim=aim, beside=others,
                    )
                )  # fmt: skip
    return tuple(found)


def _protocol() -> str:
    said = "; ".join(
        f"{budget}: {s.images[0]:,} images for {s.epochs:g} epochs, {s.features} features, {s.steps:,} steps on "
        f"sequences of {s.length}"
        for budget, s in SIZES.items()
        if budget != "smoke"
    )
    return f"""
    One transformer block as a loop (2 heads, {said}), by Adam at {RATE:g}, untuned, on MNIST in patches of 7 pixels,
    and on the running parity and the sorting of random symbols. Each example settles for itself and stops at the
    tolerance it was trained with. More steps help where the accuracy with {BUDGETS[-1]} steps allowed is {AIMS[GAIN]:g}
    point above that with {BUDGETS[0]}. Harder inputs take more where the mean number of steps at the hardest is
    {AIMS[EXTRA]:g}% above that at the easiest: Gaussian noise of {NOISE[-1]:g}, not clipped, against none (2,000 test
    images, steps counted without a bound of their own), and {LONGER[-1]} times the trained length against that length
    (250 sequences). On clean images the rank correlation between steps and the loss is asked to be {AIMS[RANKED]:g}.
    The same loop by the implicit gradient and the symmetric one by centered EqProp stand beside it, and the radius.
    Numbers of steps are those of the solver: Anderson acceleration over five iterates on images (three on sequences and
    for EqProp).
    """


CLAIM = Claim(
    id="T8",
    system="tpeqprop",
    seed_file=nets.SEED_FILE,
    sentence="Harder inputs use more steps, and more steps help.",
    criteria=_criteria(),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture(
        "MNIST: accuracy against relaxation steps allowed", x_label="steps allowed", y_label="test accuracy (%)",
        curves=(f"{IMAGES}: accuracy",), log_x=True,
    ),
    printed=("radius",),
)  # fmt: skip
