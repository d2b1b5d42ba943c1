"""T4: accuracy near backprop with untied softmax attention."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from toreq import systems
from toreq.data import Dataset, load
from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.tpeqprop import fitting, nets
from toreq.evidence.tpeqprop.fitting import Plan
from toreq.layer import equilibria
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

TRAINERS = {
    nets.OWN: "untied softmax-attention blocks, one nudged phase",
    nets.FORWARD: "backprop through the same blocks",
    nets.IMPLICIT: "the implicit gradient of the same network",
    nets.CENTERED: "the looped transformer, tied and symmetric, centered EqProp, fast settings",
    nets.CODING: f"predictive coding on the same blocks: {nets.CODING_STEPS} guarded steps on the states, beta 1",
}
NETS: dict[str, Any] = {"features": 64, "heads": 4, "hidden": 128}
BLOCKS = 2
GAP = 0.5
RATE, TRIALS = 1e-3, 3
SPACE = Space({"rate": Real(3e-4, 1e-2, log=True)})


@dataclass(frozen=True)
class Task:
    """A data set: its name, what it is called, the side of a patch, seeds, and in a full run epochs, seconds of a
    training and of a trial of tuning."""

    data: str
    words: str
    patch: int
    seeds: int
    epochs: float
    seconds: float
    trial: float


TASKS = {
    "mnist": Task("mnist", "MNIST", 7, 3, 4, 90.0, 15.0),
    "fashion": Task("fashion_mnist", "Fashion-MNIST", 7, 3, 4, 90.0, 15.0),
    "cifar": Task("cifar10", "CIFAR-10 (images JPEG-recompressed)", 4, 1, 2, 180.0, 20.0),
}
QUICK_TRAIN, QUICK_TEST, QUICK_EPOCHS, QUICK_SECONDS, QUICK_TRIAL = 4000, 2000, 2, 4.0, 1.0


@functools.lru_cache(maxsize=1)
def _whole(name: str) -> Dataset:
    # a worker runs many trials on one data set
    return load(name)


def images(task: Task, trial: Trial) -> Dataset:
    """The data of a task; a smoke run takes MNIST, which is always there."""
    if trial.budget.name == "smoke":
        return _whole("mnist").limit(48, 20)
    whole = _whole(task.data)
    return whole if trial.budget.name == "full" else whole.limit(QUICK_TRAIN, QUICK_TEST)


def build(side: str, task: Task, trial: Trial) -> nn.Module:
    """The module that a side trains, freshly drawn."""
    smoke = trial.budget.name == "smoke"
    shape = (1, 28, 28) if smoke else tuple(_whole(task.data).input_shape)
    options = dict(nets.SMALL["transformer"]) if smoke else {**NETS, "patch": task.patch}
    if side != nets.CENTERED:
        return nets.trained_by(side, "transformer", trial.seed, shape, blocks=BLOCKS, **options).to(trial.device)
    torch.manual_seed(trial.seed)
    net = systems.create("toreqprop", shape, 10, arch="transformer", settings="fast", **options)
    for layer in equilibria(net):
        layer.warn = False
    return net.to(trial.device)


def _plan(task: Task, trial: Trial, params: Mapping[str, Value]) -> Plan:
    rate = float(str(params.get("rate", RATE)))
    epochs = trial.budget.pick(1, QUICK_EPOCHS, task.epochs)
    seconds = trial.budget.pick(0.1, QUICK_SECONDS, task.seconds)
    return Plan(epochs, rate, trial.budget.pick(16, 100, 100), seconds)


def run(trial: Trial) -> Outcome:
    """Train one side on one data set; an interrupted run goes on."""
    name, side = trial.side.split()
    task = TASKS[name]
    data = images(task, trial)
    net = build(side, task, trial)
    at = fitting.fit(net, data, _plan(task, trial, trial.tuned), seed=trial.seed, scratch=trial.scratch)
    x, y = data.inputs("test", slice(None)).to(trial.device), data.test_y.to(trial.device)
    metrics = {
        "accuracy": Quantity(fitting.accuracy(net, x, y), "%"),
        "epochs": Quantity(at.samples / len(data.train_y), "epochs"),
        "processor time": Quantity(at.seconds, "s"),
    }
    for layer in equilibria(net):
        metrics["radius"] = Quantity(layer.radius(x[:16]), "")
    cost = Cost(counting.parameters(net), fitting.step_flops(net, data) * at.samples, at.samples)
    notes = [data.variant, *(["continued from a checkpoint"] if at.resumed else [])]
    return Outcome(metrics, {name: [(a, b) for a, b in at.curve]}, cost, tuple(n for n in [*notes, at.diverged] if n))


def held_out_accuracy(trial: Trial, params: Mapping[str, Value]) -> float:
    """Percent of held-out training images that are right after a short training."""
    name, side = trial.side.split()
    task = TASKS[name]
    part = images(task, trial)
    data = fitting.held_out(part.limit(len(part.train_y) // 3, None))
    plan = replace(
        _plan(task, trial, params), epochs=1, seconds=trial.budget.pick(0.05, QUICK_TRIAL, task.trial)
    )  # fmt: skip
    return fitting.fit(build(side, task, trial), data, plan, seed=trial.seed, scratch=trial.scratch).curve[-1][1]


def _criteria() -> tuple[Criterion, ...]:
    others = (nets.IMPLICIT, nets.CENTERED, nets.CODING)
    return tuple(
        Criterion(
            f"{task.words}: above backprop by", "accuracy", "points", "at_least", f"{name} {nets.OWN}",
            words="near-BP accuracy", aim=-GAP, versus=(f"{name} {nets.FORWARD}",),
            beside=tuple(f"{name} {side}" for side in others), seeds=task.seeds,
        )
        for name, task in TASKS.items()
    )  # fmt: skip


def _protocol() -> str:
    said = "; ".join(
        f"{t.words}: patches of {t.patch} pixels, {t.epochs:g} epochs or {t.seconds:g} seconds, trials of {t.trial:g} "
        f"seconds, {t.seeds} seed{'s' if t.seeds > 1 else ''}"
        for t in TASKS.values()
    )
    return f"""
    Pre-norm transformers of {BLOCKS} blocks with free queries, keys and values ({NETS["features"]} features,
    {NETS["heads"]} heads, {NETS["hidden"]} hidden units, learned positions, a read-out of every token) on images in
    patches. Every side trains for the same epochs, or for as many steps as the same processor time on one thread holds,
    found by timing four steps before. Full: {said}. Quick: {QUICK_TRAIN:,} images, {QUICK_EPOCHS} epochs or
    {QUICK_SECONDS:g} seconds. Adam, batches of 100, the gradient's norm clipped to 1, a rate that rises over a
    twentieth of the steps and falls as a cosine to 0; no augmentation. That rate is tuned for each side and data set in
    {TRIALS} trials on a third of the training images, judged by a fifth of those. The tied version that centered EqProp
    needs is the looped transformer of the base: one block with an energy, of the same widths. Accuracy is on all test
    images after the last step. A smoke run takes MNIST for every data set. A chain's relaxation has radius 0; that of
    the looped transformer is given.
    """


SIDES = {f"{name} {side}": f"{task.words}: {what}" for name, task in TASKS.items() for side, what in TRAINERS.items()}

CLAIM = Claim(
    id="T4",
    system="tpeqprop",
    seed_file=nets.SEED_FILE,
    sentence="Untied softmax-attention transformers reach accuracies near those of backprop.",
    criteria=_criteria(),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture("Test accuracy after training", x_label="test accuracy (%)", metrics=("accuracy",)),
    tuning=Tuning(held_out_accuracy, dict.fromkeys(SIDES, SPACE), TRIALS, {side: {"rate": RATE} for side in SIDES}),
)
