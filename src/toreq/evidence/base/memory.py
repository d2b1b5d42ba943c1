"""B3: training memory does not grow with the number of relaxation steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toreq.diagnostics.memory import MEBIBYTE, fixed_steps, peak_bytes, training_step
from toreq.evidence import counting
from toreq.evidence.base import nets
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.layer import equilibria

ARCHITECTURES = ("mlp", "conv", "transformer")
FLAT = 2.0


def run(trial: Trial) -> Outcome:
    """Peak bytes of the tensors of one training step against the number of relaxation steps."""
    steps = trial.budget.pick((2, 20), (10, 100, 1000), (10, 30, 100, 300, 1000))
    batch = trial.budget.pick(2, 16, 16)
    data = nets.mnist(10 * batch, 1)
    chosen = torch.randperm(10 * batch, generator=torch.Generator().manual_seed(trial.seed))[:batch]
    x, y = data.inputs("train", chosen).to(trial.device), data.train_y[chosen].to(trial.device)
    metrics: dict[str, Quantity] = {}
    curves: dict[str, list[tuple[float, float | None]]] = {}
    parameters = 0
    for arch in trial.budget.pick(("mlp",), ("mlp",), ARCHITECTURES):
        net = nets.build(f"toreqprop {arch}", trial.budget, trial.seed, trial.device)
        points = _peaks(trial.side, net, x, y, steps)
        first, last = points[0][1], points[-1][1]
        metrics[f"{arch}: growth of peak memory"] = Quantity(100 * (last / first - 1), "%")
        metrics[f"{arch}: peak memory at {steps[-1]} steps"] = Quantity(last, "MiB")
        metrics[f"{arch}: peak memory at most steps"] = Quantity(last, "MiB")
        curves[f"{arch}: peak memory"] = list(points)
        parameters += counting.parameters(net)
    return Outcome(metrics, curves, Cost(parameters, None, batch * len(steps)))


def _peaks(side: str, net: Any, x: Tensor, y: Tensor, steps: tuple[int, ...]) -> list[tuple[float, float]]:
    if side == "bp-ff":
        twin: nn.Module = net.feedforward().to(x.device)

        def feedforward() -> None:
            net.criterion(twin(x), y).backward()
            twin.zero_grad(set_to_none=True)

        feedforward()
        peak = peak_bytes(feedforward) / MEBIBYTE
        return [(float(count), peak) for count in steps]
    points = []
    for count in steps:
        trial = fixed_steps(net, count, "unrolled" if side == "unrolled" else None)
        for layer in equilibria(trial):
            layer.warn = False  # the number of steps is fixed, settled or not
        training_step(trial, x, y)  # what is made once is not charged to the measured step
        ran = 0

        def step(trial: nn.Module = trial) -> None:
            nonlocal ran
            ran = training_step(trial, x, y)

        peak = peak_bytes(step)
        if ran != count:
            raise RuntimeError(f"B3: expected {count} relaxation steps, got {ran}; the tolerance is not 0")
        points.append((float(count), peak / MEBIBYTE))
    return points


def _criteria() -> tuple[Criterion, ...]:
    found = [
        Criterion(
            f"{arch}: growth of peak memory",
            f"{arch}: growth of peak memory",
            "%",
            "at_most",
            "eqprop",
            words="not reached (1.06x BP)",
            aim=FLAT,
            beside=("unrolled", "bp-ff"),
        )
        for arch in ARCHITECTURES
    ]
    found += [
        Criterion(
            f"{arch}: peak memory against Unrolled",
            f"{arch}: peak memory at most steps",
            "MiB",
            "at_most",
            "eqprop",
            versus=("unrolled",),
            beside=("bp-ff",),
        )
        for arch in ARCHITECTURES
    ]
    return tuple(found)


CLAIM = Claim(
    id="B3",
    system="toreqprop",
    seed_file=nets.SEED_FILE,
    sentence="Training memory is constant in the number of relaxation steps.",
    criteria=_criteria(),
    protocol="""
    Exact peak bytes of all tensors born in one training step (forward and backward) on 16 MNIST images, counted by a
    dispatch hook, at tolerance 0 so that all steps run: 10 to 1000 steps in both phases. Growth is the peak at the most
    steps over that at the fewest. Quick measures the mlp alone. The number is judged on flatness within 2%, and the
    peak at the most steps against autograd through the loop; the feed-forward twin's peak, which knows no steps,
    stands beside it.
    """,
    sides={
        "eqprop": "the shipped solver and estimator",
        "unrolled": "autograd through the loop of the same network",
        "bp-ff": "backprop of the feed-forward twin of the same widths",
    },
    run=run,
    picture=Picture(
        "Peak memory of a training step",
        x_label="relaxation steps",
        y_label="peak of live tensors (MiB)",
        curves=("mlp: peak memory",),
        log_x=True,
        log_y=True,
    ),
    exclusive=True,
)
