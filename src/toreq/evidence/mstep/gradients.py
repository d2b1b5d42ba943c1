"""M6: gradients through cross-scale couplings are exact."""

from __future__ import annotations

import dataclasses
from typing import Any

from toreq.evidence.base import gradients as base
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.mstep import nets

STEPS = 60
RADIUS, OWN = "radius of the levels alone", "smallest cosine of the shipped estimator"
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "as shipped": ({}, "shared weights, fixed springs between the last nodes, read out at the finest level"),
    "not shared": (
        {"shared": False, "spring": "learned", "mu": 0.5, "springs": "all"},
        "weights of its own on every level; learned springs between all nodes, and second ones (mu) downwards",
    ),
    "exits": (
        {"exits": True, "spring": "learned"},
        "shared weights and learned springs; read out and nudged on every level",
    ),
}
ARCHITECTURES = ("conv", "dense", "sequence")
GROUPS = ("level 1", "level 2", "level 3", "adapters", "springs", "read-outs")


def _options(arch: str, variant: str) -> dict[str, Any]:
    options = dict(VARIANTS[variant][0])
    if arch == "sequence":
        options.pop("springs", None)  # a level of tokens has one node
    return options


def run(trial: Trial) -> Outcome:
    """Every estimator against the implicit gradient on one pyramid, by groups of parameters."""
    arch, variant = trial.side.split(", ")
    steps, held_out = trial.budget.pick(2, 30, STEPS), trial.budget.pick(20, 1000, 2000)
    data = shared.mnist(min(nets.BATCH * steps, 20_000), held_out)
    net = nets.pyramid(trial.budget, trial.seed, trial.device, arch, **_options(arch, variant))
    x = data.inputs("train", slice(0, base.examples(trial))).to(trial.device)
    batch = trial.budget.pick(8, nets.BATCH, nets.BATCH)
    shipped = shared.layer(net).estimator
    outcome = base.measured(
        trial,
        net,
        data,
        lambda: nets.fit(net, data, steps, trial.seed, batch),
        nets.groups(net),
        ("trained",),
        None if trial.budget.conclusive else [(shipped.name, shipped)],
    )
    metrics = {**outcome.metrics, RADIUS: Quantity(nets.radius_alone(net, x), "")}
    return dataclasses.replace(outcome, metrics=metrics)


SIDES = {f"{arch}, {name}": what for arch in ARCHITECTURES for name, (_, what) in VARIANTS.items()}


def _criteria() -> tuple[Criterion, ...]:
    own = tuple(
        Criterion(f"{side}: shipped estimator", OWN, "", "at_least", side, words="exact", aim=base.AIM)
        for side in SIDES
    )
    return own + base.criteria(dict.fromkeys(SIDES, (None, "exact")), RADIUS, "log")


CLAIM = Claim(
    id="M6",
    system="mstep",
    seed_file=nets.SEED_FILE,
    sentence="Gradients through couplings across scales are exact.",
    criteria=_criteria(),
    protocol=f"""
    As B1: every estimator that supports the network, at its shipped settings in float32 with the shipped solver, on 16
    MNIST images, before and after training. The reference is the implicit gradient of a float64 copy settled to a
    relative residual of 1e-12 (backprop through the same equilibrium, BP-eq), itself compared with central finite
    differences of the loss on the trained network. Judged are the smallest cosine of the shipped estimator (centered
    EqProp) over parameters and both phases, and the smallest one over all estimators. That of the shipped estimator is
    given by groups of parameters: each level's own weights, adapters of shared weights, springs, read-outs. Parameters
    whose reference gradient is below 1e-6 of the largest count by their absolute error. Three levels; narrow networks
    (conv of 8 and 16 channels, dense of 128 units, sequence of 32 features), trained for 30 steps (quick) or {STEPS}
    (full) of Adam by EqProp with the fast settings, batch {nets.BATCH}, rate {nets.RATE:g}. Springs alone make the
    plain iteration's radius large, so that the radius that is asked to be at least 0.3 is that of the levels alone: the
    Jacobian at the trained equilibria without the springs. A feed-forward twin has no equilibrium to differentiate and
    no side here.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "1 - smallest cosine, trained pyramids",
        x_label="1 - cosine (smaller is better)",
        metrics=tuple(f"smallest cosine, {name}, trained" for name in GROUPS),
        log_x=True,
        complement=True,
    ),
    printed=("radius, trained", RADIUS, "accuracy, couplings off"),
)
