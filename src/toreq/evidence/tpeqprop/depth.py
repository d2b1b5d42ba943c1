"""T2: stability with depth: residual perceptrons of 2 to 128 levels, deep Hopfield networks of as many layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from toreq import systems
from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.budgets import Budget
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.tpeqprop import fitting, nets
from toreq.evidence.tpeqprop.fitting import Plan
from toreq.io import atomic_write_json
from toreq.layer import equilibria
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

SIDES = {
    nets.OWN: "residual levels, untied, one nudged phase",
    nets.CENTERED: "a symmetric deep Hopfield network of as many layers, centered EqProp, fast settings",
    nets.FORWARD: "backprop through the same residual levels",
    nets.CODING: f"predictive coding on the same levels: {nets.CODING_STEPS} guarded steps on the states, beta 1",
}
THRESHOLD, LEARNED = 97.0, 90.0
"""Test accuracy whose first epoch is counted, and below which a training has failed."""
DEEPEST = 128
ACCURACY, AIM = f"accuracy, {DEEPEST} levels", 97.5
FAILED, DIVERGED, REACHED = "depths that fail", "depths that diverge", f"depths that reach {THRESHOLD:g}%"
RATE, TRIALS, BATCH = 1e-3, 3, 200
GAIN, MOST_GAIN = 16.0, 16.0**4
"""Of deep Hopfield networks: from one layer to the next, and from the first to the last one."""
SPACE = Space({"rate": Real(3e-4, 1e-2, log=True)})


@dataclass(frozen=True)
class Size:
    """What a budget buys: depths, the depth of tuning, width, images, epochs, seconds of a training and of a trial."""

    depths: tuple[int, ...]
    tuned: int
    width: int
    train: int
    test: int
    epochs: float
    seconds: float
    trial: float


SIZES = {
    "smoke": Size((2, 4), 2, 8, 64, 20, 1, 0.05, 0.03),
    "quick": Size((2, 8, 32, DEEPEST), 8, 64, 10_000, 2000, 2, 8.0, 4.0),
    "full": Size((2, 8, 32, DEEPEST), 32, 96, 60_000, 10_000, 5, 120.0, 15.0),
}


def gain(levels: int) -> float:
    """Ratio of one layer's slope to that of the layer below: the shipped one in shallow networks, less in deep ones, in
    which it would overflow."""
    return min(GAIN, MOST_GAIN ** (1 / max(1, levels - 1)))


def build(side: str, levels: int, width: int, seed: int) -> nn.Module:
    """A side's network of so many levels, freshly drawn."""
    if side != nets.CENTERED:
        return nets.trained_by(side, "residual", seed, width=width, levels=levels)
    torch.manual_seed(seed)
    net = systems.create(
        "toreqprop", (1, 28, 28), 10, arch="hopfield", hidden=(width,) * levels, gain=gain(levels), settings="fast"
    )
    for layer in equilibria(net):
        layer.warn = False  # what does not settle learns badly, which is measured
    return net


def _plan(size: Size, budget: Budget, params: Mapping[str, Value]) -> Plan:
    rate = float(str(params.get("rate", RATE)))
    return Plan(size.epochs, rate, budget.pick(16, BATCH, BATCH), size.seconds)


def run(trial: Trial) -> Outcome:
    """Train one side at every depth; depths that are done are read from the scratch folder."""
    size = SIZES[trial.budget.name]
    found = {levels: _at(trial, size, levels) for levels in size.depths}
    metrics: dict[str, Quantity] = {}
    for levels, entry in found.items():
        metrics[f"accuracy, {levels} levels"] = Quantity(entry["accuracy"], "%")
        metrics[f"epochs to {THRESHOLD:g}%, {levels} levels"] = Quantity(entry["reached"], "epochs")
        metrics[f"epochs, {levels} levels"] = Quantity(entry["epochs"], "epochs")
    if DEEPEST not in found:
        metrics[ACCURACY] = metrics[f"accuracy, {max(found)} levels"]
    share = 100 / len(found)
    failed = [bool(e["diverged"]) or e["accuracy"] < LEARNED for e in found.values()]
    metrics[FAILED] = Quantity(share * sum(failed), "%")
    metrics[DIVERGED] = Quantity(share * sum(bool(e["diverged"]) for e in found.values()), "%")
    metrics[REACHED] = Quantity(share * sum(e["reached"] is not None for e in found.values()), "%")
    metrics["processor time"] = Quantity(sum(e["seconds"] for e in found.values()), "s")
    curves = {
        "accuracy against levels": [(float(n), e["accuracy"]) for n, e in found.items()],
        f"accuracy against epochs, {max(found)} levels": [(x, y) for x, y in found[max(found)]["curve"]],
    }
    notes = tuple(f"{n} levels: {e['diverged']}" for n, e in found.items() if e["diverged"])
    samples, flops = (sum(e[key] for e in found.values()) for key in ("samples", "flops"))
    return Outcome(metrics, curves, Cost(found[max(found)]["parameters"], flops, int(samples)), notes)


def _at(trial: Trial, size: Size, levels: int) -> dict[str, Any]:
    file = trial.scratch / f"levels-{levels}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    data = shared.mnist(size.train, size.test)
    net = build(trial.side, levels, size.width, trial.seed).to(trial.device)
    plan = _plan(size, trial.budget, trial.tuned)
    at = fitting.fit(net, data, plan, seed=trial.seed, scratch=trial.scratch / f"levels-{levels}")
    x, y = data.inputs("test", slice(None)).to(trial.device), data.test_y.to(trial.device)
    entry = {
        "accuracy": fitting.accuracy(net, x, y),
        "reached": at.epochs_to(THRESHOLD),
        "epochs": at.samples / len(data.train_y),
        "diverged": at.diverged,
        "curve": at.curve,
        "seconds": at.seconds,
        "samples": at.samples,
        "flops": fitting.step_flops(net, data) * at.samples,
        "parameters": counting.parameters(net),
    }
    atomic_write_json(file, entry)
    return entry


def held_out_accuracy(trial: Trial, params: Mapping[str, Value]) -> float:
    """Percent of held-out training images that are right after a short training at one depth."""
    size = SIZES[trial.budget.name]
    data = fitting.held_out(shared.mnist(size.train // 2, 1))
    net = build(trial.side, size.tuned, size.width, trial.seed).to(trial.device)
    plan = replace(_plan(size, trial.budget, params), epochs=1, seconds=size.trial)
    return fitting.fit(net, data, plan, seed=trial.seed, scratch=trial.scratch).curve[-1][1]


def _protocol() -> str:
    said = [
        f"{name}: width {s.width}, {s.train:,} images, {s.epochs:g} epochs or {s.seconds:g} seconds, trials of "
        f"{s.trial:g} seconds at {s.tuned} levels"
        for name, s in SIZES.items()
        if name != "smoke"
    ]
    depths = ", ".join(map(str, SIZES["full"].depths))
    return f"""
    Networks of one width and {depths} levels on MNIST, each trained for the same epochs, or for as many steps as the
    same processor time on one thread holds, found by timing four steps before ({"; ".join(said)}). Adam, batches of
    {BATCH}, the gradient's norm clipped to 1, a rate that rises over a twentieth of the steps and falls as a cosine to
    0. That rate is tuned for each side in {TRIALS} trials on half of the training images, judged by a fifth of those.
    Branches of residual levels are divided by the root of their number, as shipped. A deep Hopfield network has no skip
    connections: symmetric couplings with a bounded norm are what EqProp can settle; its layers' slopes grow by {GAIN:g}
    from one to the next, but by no more than {MOST_GAIN:,.0f} over all, which would overflow. Test accuracy is that of
    the last step on all test images; 2,000 of them, drawn once, are looked at four times in an epoch for the epochs to
    {THRESHOLD:g}%. A depth diverges when a state, the loss or a gradient is no longer finite, and fails when it
    diverges or ends below
    {LEARNED:g}%. Shares are of the depths.
    """


CLAIM = Claim(
    id="T2",
    system="tpeqprop",
    seed_file=nets.SEED_FILE,
    sentence="Deep networks train more stably than by EqProp.",
    criteria=(
        Criterion(
            ACCURACY, ACCURACY, "%", "at_least", nets.OWN, words="superior stability and scaling", aim=AIM,
            beside=(nets.CENTERED, nets.FORWARD, nets.CODING),
        ),
        Criterion(
            DIVERGED, DIVERGED, "%", "at_most", nets.OWN, words="reducing divergence risks vs. pure EqProp", aim=0.0,
            beside=(nets.CENTERED, nets.FORWARD, nets.CODING),
        ),
        Criterion(
            f"{FAILED}, against EqProp", FAILED, "%", "at_most", nets.OWN, words="superior stability and scaling",
            versus=(nets.CENTERED,), beside=(nets.FORWARD, nets.CODING),
        ),
        Criterion(
            f"{REACHED}, against EqProp", REACHED, "%", "at_least", nets.OWN, words="faster convergence",
            versus=(nets.CENTERED,), beside=(nets.FORWARD, nets.CODING),
        ),
    ),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture(
        "MNIST test accuracy against depth", x_label="levels", y_label="test accuracy (%)",
        curves=("accuracy against levels",), log_x=True,
    ),
    tuning=Tuning(held_out_accuracy, dict.fromkeys(SIDES, SPACE), TRIALS, {side: {"rate": RATE} for side in SIDES}),
)  # fmt: skip
