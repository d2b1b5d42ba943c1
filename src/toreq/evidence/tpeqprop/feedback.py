"""T9: no weight transport: top-down weights of their own, learned by the same local update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.tpeqprop import fitting, nets
from toreq.evidence.tpeqprop.fitting import Plan
from toreq.systems.tpeqprop import TPEqProp
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

NETS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": (128, 128, 128)},
    "transformer": {"features": 32, "heads": 4, "hidden": 64, "blocks": 2},
}
LEARNED, EXACT, FIXED = "learned", "exact", "fixed"
HOW = {
    LEARNED: "top-down weights of their own, drawn independently, with the update of the weights they stand for",
    EXACT: "the exact adjoint: weights transported, which is backprop on a chain",
    FIXED: "random top-down weights that stay as they were drawn (feedback alignment, the ablation)",
}
SIDES = {f"{arch} {how}": words for arch in NETS for how, words in HOW.items()}
GAP, ANGLE = 0.5, 45.0
"""Points below the exact adjoint, and degrees at the end, that are aimed at."""
START, TRIALS = {"rate": 2e-3, "decay": 0.5}, 5
SPACE = Space({"rate": Real(5e-4, 1e-2, log=True), "decay": Real(1e-3, 2.0, log=True)})
BACK = "_back"


def build(side: str, trial: Trial) -> TPEqProp:
    """A side's network, freshly drawn."""
    arch, how = side.split()
    options = dict(nets.SMALL[arch]) if trial.budget.name == "smoke" else NETS[arch]
    net = nets.build(arch, trial.seed, feedback=EXACT if how == EXACT else LEARNED, **options)
    if how == FIXED:
        for name, parameter in net.named_parameters():
            if name.endswith(BACK):
                parameter.requires_grad_(False)
    return net.to(trial.device)


def angle(net: nn.Module) -> float:
    """Mean angle in degrees between the top-down weights and those they stand for; 0 where there are none."""
    assert isinstance(net, TPEqProp)
    found = list(net.alignment().values())
    return float(torch.stack(found).mean()) if found else 0.0


def _plan(trial: Trial, params: Mapping[str, Value]) -> Plan:
    values = {name: float(str(params.get(name, START[name]))) for name in START}
    return Plan(
        trial.budget.pick(1, 3, 8), values["rate"], trial.budget.pick(16, 100, 100), tests=2, decay=values["decay"]
    )


def run(trial: Trial) -> Outcome:
    """Train one side; an interrupted run goes on."""
    data = shared.mnist(trial.budget.pick(64, 60_000, 60_000), trial.budget.pick(20, 10_000, 10_000))
    net = build(trial.side, trial)
    start = angle(net)
    plan = _plan(trial, trial.tuned)
    at = fitting.fit(net, data, plan, seed=trial.seed, scratch=trial.scratch, watch=angle)
    x, y = data.inputs("test", slice(None)).to(trial.device), data.test_y.to(trial.device)
    angles = [float(t) for t in net.alignment().values()]
    metrics = {
        "accuracy": Quantity(fitting.accuracy(net, x, y), "%"),
        "mean angle": Quantity(angle(net), "degrees"),
        "largest angle": Quantity(max(angles, default=0.0), "degrees"),
    }
    arch = trial.side.split()[0]
    # where training goes on after an interruption the first angle is that of the weights drawn again, the same ones
    curves = {f"{arch}: angle": [(0.0, start), *at.marks], f"{arch}: accuracy": [*at.curve]}
    cost = Cost(counting.parameters(net), fitting.step_flops(net, data) * at.samples, at.samples)
    return Outcome(metrics, curves, cost, (at.diverged,) if at.diverged else ())


def held_out_accuracy(trial: Trial, params: Mapping[str, Value]) -> float:
    """Percent of held-out training images that are right after a short training."""
    data = fitting.held_out(shared.mnist(trial.budget.pick(64, 30_000, 30_000), 1))
    plan = replace(_plan(trial, params), epochs=trial.budget.pick(1, 2, 2))
    net = build(trial.side, trial)
    return fitting.fit(net, data, plan, seed=trial.seed, scratch=trial.scratch).curve[-1][1]


def _criteria() -> tuple[Criterion, ...]:
    found: list[Criterion] = []
    for arch in NETS:
        own, exact, fixed = (f"{arch} {how}" for how in (LEARNED, EXACT, FIXED))
        words = "no weight transport problem"
        found.append(
            Criterion(
                f"{arch}: above the exact adjoint by", "accuracy", "points", "at_least", own, words=words, aim=-GAP,
                versus=(exact,), beside=(fixed,),
            )
        )  # fmt: skip
        found.append(
            Criterion(
                f"{arch}: mean angle", "mean angle", "degrees", "at_most", own, words=words, aim=ANGLE, beside=(fixed,)
            )
        )
    return tuple(found)


CLAIM = Claim(
    id="T9",
    system="tpeqprop",
    seed_file=nets.SEED_FILE,
    sentence="Top-down weights need not be transported: separate ones align and learn as well.",
    criteria=_criteria(),
    protocol=f"""
    Chains on MNIST, a perceptron of three hidden levels of 128 and a transformer of two untied blocks of 32 features,
    whose ways back are transposed weights, learned weights, or random fixed ones. A learned way back gets the update of
    the weight it stands for, from the error and the state that both read, and the same decoupled decay, by which the
    difference of the two shrinks. A quick run trains for 3 epochs, a full one for 8; AdamW, batches of 100, the
    gradient's norm clipped to 1, the rate falling as a cosine to 0. Rate and decay are tuned for each side in {TRIALS}
    trials of two epochs on 24,000 training images, judged by 6,000 others. Accuracy is on all test images. The angle is
    the mean over weights between way back and weight; two random matrices stand at 90 degrees. The softmax and the
    layer norm keep the derivatives of their own units, and the read-out's gradient is its own.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Angle between top-down weights and those they stand for", x_label="epoch", y_label="mean angle (degrees)",
        curves=tuple(f"{arch}: angle" for arch in NETS),
    ),
    printed=("mean angle",),
    tuning=Tuning(held_out_accuracy, dict.fromkeys(SIDES, SPACE), TRIALS, dict.fromkeys(SIDES, START)),
)  # fmt: skip
