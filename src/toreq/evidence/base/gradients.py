"""B1: the gradient of every estimator is the true gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from toreq.data import Dataset
from toreq.diagnostics.check import CheckResult, check
from toreq.diagnostics.gradients import MAX_DIFFERENCE_ERROR, MAX_NEGLIGIBLE_ERROR, criterion
from toreq.diagnostics.relaxation import couplings_off
from toreq.estimators import Estimator, create, names
from toreq.evidence import counting
from toreq.evidence.base import nets
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Scale, Trial
from toreq.solvers import FixedPoint

SYMMETRIC, NOT_SYMMETRIC, AIM, RADIUS = 0.997, 0.42, 0.999, 0.3
PHASES = ("untrained", "trained")
SETTLING = tuple(name for name in names() if create(name).accepts(FixedPoint()))
"""Estimators that read one equilibrium, as all networks here have."""


def run(trial: Trial) -> Outcome:
    """Compare every estimator with the implicit gradient, before and after training."""
    steps, size = trial.budget.pick(2, 100, 1000), trial.budget.pick(8, 128, 128)
    data = nets.mnist(max(examples(trial), min(steps * size, 60_000)), trial.budget.pick(20, 1000, 2000))
    net = nets.build(trial.side, trial.budget, trial.seed, trial.device)
    rate = nets.rate(trial.side)
    return measured(trial, net, data, lambda: nets.fit(net, data, steps, batch=size, rate=rate, seed=trial.seed))


def examples(trial: Trial) -> int:
    """Images on which gradients are compared."""
    return trial.budget.pick(2, 16, 16)


def measured(
    trial: Trial,
    net: nn.Module,
    data: Dataset,
    train: Callable[[], int],
    group: Callable[[str], str] | None = None,
    differences_in: Sequence[str] = PHASES,
    estimators: Sequence[tuple[str, Estimator]] | None = None,
) -> Outcome:
    """The comparison on one network, before and after ``train``.

    Args:
        trial: what is run.
        net: a fresh network.
        data: images to compare gradients on, and to test the accuracy.
        train: trains the network and returns the number of samples seen.
        group: maps a parameter's name to a group, whose smallest cosine under the shipped estimator is reported too.
        differences_in: phases in which the reference is compared with finite differences.
        estimators: names and estimators to compare; all that support the network when None.
    """
    batch = examples(trial)
    x, y = data.inputs("train", slice(0, batch)).to(trial.device), data.train_y[:batch].to(trial.device)
    net.eval()
    metrics: dict[str, Quantity] = {}
    worst, own, negligible, differences = 1.0, 1.0, 0.0, 0.0
    shipped = nets.layer(net).estimator.name
    samples = 0
    for phase in PHASES:
        if phase == "trained":
            samples = train()
        compared = trial.budget.conclusive and phase in differences_in
        result = check(net, x, y, candidates=estimators, finite_differences=compared, steps=())
        for estimator, cosine in _cosines(result).items():
            metrics[f"smallest cosine, {estimator}, {phase}"] = Quantity(cosine, "")
            worst = min(worst, cosine)
        for name, cosine in ({} if group is None else _grouped(result, shipped, group)).items():
            metrics[f"smallest cosine, {name}, {phase}"] = Quantity(cosine, "")
            own = min(own, cosine)
        negligible = max([negligible, *(row.absolute_error for row in result.gradients if row.negligible)])
        differences = max(
            [differences, *(row.relative_error for row in result.differences if row.estimator == "implicit")]
        )
        metrics[f"radius, {phase}"] = Quantity(result.radius, "")
        metrics[f"residual of the reference, {phase}"] = Quantity(result.reference_residual, "")
    metrics["smallest cosine"] = Quantity(worst, "")
    if group is not None:
        metrics["smallest cosine of the shipped estimator"] = Quantity(own, "")
    metrics["error of negligible gradients"] = Quantity(negligible, "of the largest")
    if trial.budget.conclusive:
        metrics["reference against finite differences"] = Quantity(differences, "relative error")
    metrics["accuracy"] = Quantity(nets.accuracy(net, data), "%")
    with couplings_off(net):
        metrics["accuracy, couplings off"] = Quantity(nets.accuracy(net, data), "%")
    cost = Cost(counting.parameters(net), counting.flops(lambda: _step(net, x, y)) / batch * samples, samples)
    return Outcome(metrics, cost=cost)


def _step(net: nn.Module, x: Tensor, y: Tensor) -> None:
    with torch.enable_grad():
        criterion(net)(net(x), y).backward()
    net.zero_grad(set_to_none=True)


def _cosines(result: CheckResult) -> dict[str, float]:
    """The smallest cosine over parameters of each estimator that is supported."""
    found: dict[str, float] = {}
    for row in result.gradients:
        if row.cosine is not None:
            found[row.estimator] = min(found.get(row.estimator, 1.0), row.cosine)
    return found


def _grouped(result: CheckResult, estimator: str, group: Callable[[str], str]) -> dict[str, float]:
    """The smallest cosine of one estimator over each group of parameters."""
    found: dict[str, float] = {}
    for row in result.gradients:
        if row.cosine is not None and row.estimator == estimator:
            name = group(row.parameter)
            found[name] = min(found.get(name, 1.0), row.cosine)
    return found


def _criteria() -> tuple[Criterion, ...]:
    plain = {nets.ASYMMETRIC: (NOT_SYMMETRIC, "cos 0.42 (not symmetric)")}
    symmetric = (SYMMETRIC, "cos 0.997 (symmetric)")
    return criteria({side: plain.get(side, symmetric) for side in SIDES})


def criteria(
    said: Mapping[str, tuple[float | None, str]], radius: str = "radius, trained", scale: Scale = "linear"
) -> tuple[Criterion, ...]:
    """What every side is judged by.

    Args:
        said: side -> the seed's number and words.
        radius: metric of the condition on the trained network's couplings.
        scale: on which its interval is taken.
    """
    found: list[Criterion] = []
    for side, (target, words) in said.items():
        found.append(
            Criterion(
                f"{side}: smallest cosine",
                "smallest cosine",
                "",
                "at_least",
                side,
                target=target,
                words=words,
                aim=AIM,
            )
        )
    for side in said:
        found.append(
            Criterion(
                f"{side}: error where the gradient is negligible",
                "error of negligible gradients",
                "of the largest",
                "at_most",
                side,
                aim=MAX_NEGLIGIBLE_ERROR,
            )
        )
    for side in said:
        found.append(
            Criterion(
                f"{side}: radius after training",
                radius,
                "",
                "at_least",
                side,
                aim=RADIUS,
                scale=scale,
                condition=True,
            )
        )
        found.append(
            Criterion(
                f"{side}: reference against finite differences",
                "reference against finite differences",
                "relative error",
                "at_most",
                side,
                aim=MAX_DIFFERENCE_ERROR,
                condition=True,
            )
        )
    return tuple(found)


SIDES = {
    **{side: f"{system}, architecture {arch}, as shipped" for side, (system, arch) in nets.architectures().items()},
    nets.ASYMMETRIC: "a tanh layer coupled to itself by a matrix that is not symmetric: no energy",
}

CLAIM = Claim(
    id="B1",
    system="toreqprop",
    seed_file=nets.SEED_FILE,
    sentence="The gradient of every supported estimator equals the true gradient.",
    criteria=_criteria(),
    protocol="""
    Every estimator that supports the network, at its shipped settings in float32, on a batch of 16 MNIST images, before
    training and after it (Adam at the recipe's rate, batch 128: 100 steps quick, 1000 full). The reference is the
    implicit gradient of a float64 copy settled to a relative residual of 1e-12, itself compared with central finite
    differences of the loss. The metric is the smallest cosine over estimators, parameters and both phases; parameters
    whose reference gradient is below 1e-6 of the largest count by their absolute error instead. The radius of the
    trained relaxation and the accuracy with couplings off are printed, since weak couplings make this claim easy.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "1 - smallest cosine, trained nets",
        x_label="1 - cosine (smaller is better)",
        metrics=tuple(f"smallest cosine, {name}, trained" for name in SETTLING),
        log_x=True,
        complement=True,
    ),
    printed=("radius, trained", "accuracy, couplings off"),
)
