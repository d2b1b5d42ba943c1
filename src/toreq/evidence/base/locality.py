"""B6: updates are local."""

from __future__ import annotations

import torch

from toreq.diagnostics.locality import against_local
from toreq.evidence import counting
from toreq.evidence.base import nets
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial

PRECISIONS = {"float64": (torch.float64, 1e-12), "float32": (torch.float32, 1e-4)}


def run(trial: Trial) -> Outcome:
    """Recompute every update from the states of the nodes that its coupling joins."""
    steps, batch = trial.budget.pick(1, 50, 500), trial.budget.pick(2, 16, 16)
    size = trial.budget.pick(8, 128, 128)
    data = nets.mnist(max(batch, min(steps * size, 60_000)), trial.budget.pick(10, 1000, 2000))
    net = nets.build(trial.side, trial.budget, trial.seed, trial.device)
    samples = nets.fit(net, data, steps, batch=size, rate=nets.rate(trial.side), seed=trial.seed)
    x, y = data.inputs("train", slice(0, batch)).to(trial.device), data.train_y[:batch].to(trial.device)
    metrics: dict[str, Quantity] = {}
    for name, (dtype, _) in PRECISIONS.items():
        net.to(dtype)
        rows = against_local(net, x.to(dtype), y)
        # where the local update is exactly 0 the shipped one has to be so too
        error = max(float(row.error > 0) if row.zero else row.error for row in rows)
        metrics[f"largest error, {name}"] = Quantity(error, "relative")
        metrics[f"parameters examined, {name}"] = Quantity(float(sum(not row.zero for row in rows)), "tensors")
    net.to(torch.float32)
    metrics["accuracy"] = Quantity(nets.accuracy(net, data), "%")
    return Outcome(metrics, cost=Cost(counting.parameters(net), None, samples))


SIDES = {
    **{side: f"{system}, architecture {arch}, as shipped" for side, (system, arch) in nets.architectures().items()},
    nets.ASYMMETRIC: "a tanh layer coupled to itself by a matrix that is not symmetric, by NonConservative",
}

CLAIM = Claim(
    id="B6",
    system="toreqprop",
    seed_file="all five seeds",
    sentence="Every update is local: it follows from the states of the nodes that a coupling joins.",
    criteria=tuple(
        Criterion(
            f"{side}: largest error, {name}",
            f"largest error, {name}",
            "relative",
            "at_most",
            side,
            words="local",
            aim=bound,
        )
        for side in SIDES
        for name, (_, bound) in PRECISIONS.items()
    ),
    protocol="""
    On trained networks (Adam, batch 128: 50 steps quick, 500 full) and 16 MNIST images, each parameter's shipped update
    is compared with one recomputed coupling by coupling: a coupling is shown the settled states of the nodes that it
    joins, and looking at any other node raises an error. Weights of the head are shown the read-out and the labels.
    The metric is the largest relative error over all parameters; where the local update is exactly 0, so must be the
    shipped one (it counts as an error of 1 otherwise).
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Shipped update against the local one",
        x_label="largest relative error over parameters",
        metrics=tuple(f"largest error, {name}" for name in PRECISIONS),
        log_x=True,
    ),
)
