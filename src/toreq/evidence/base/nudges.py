"""B5: is a nudge of 0.22 the best one?"""

from __future__ import annotations

import math
from typing import Literal

from toreq.diagnostics.gradients import as_double, compare, gradients, tight_copy, with_estimator
from toreq.errors import DivergenceError
from toreq.estimators import Centered, Contrastive, Implicit, OneSided
from toreq.evidence import counting
from toreq.evidence.base import nets
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial

CLAIMED = 0.22
WITHIN = (0.9 * CLAIMED, 1.1 * CLAIMED)
SAME = 0.2
"""Points of accuracy within which two betas count as equally good."""
ABSOLUTE = (0.003, 0.01, 0.03, 0.07, 0.12, 0.17, 0.2, 0.22, 0.24, 0.28, 0.35, 0.5, 1.0, 2.0, 5.0)
RELATIVE = (0.001, 0.003, 0.01, 0.03, 0.07, 0.12, 0.22, 0.35, 0.5)
KINDS: dict[str, tuple[type[Contrastive], Literal["absolute", "relative"]]] = {
    "centered absolute": (Centered, "absolute"),
    "one-sided absolute": (OneSided, "absolute"),
    "centered relative": (Centered, "relative"),
    "one-sided relative": (OneSided, "relative"),
}
BASELINE = "bp-eq"
SYSTEM = "toreqprop mlp"


def run(trial: Trial) -> Outcome:
    """Accuracy and cosine against beta."""
    steps, size = trial.budget.pick(2, 60, 400), trial.budget.pick(8, 100, 100)
    data = nets.mnist(trial.budget.pick(16, 3000, 10_000), trial.budget.pick(20, 2000, 10_000))
    options = trial.budget.pick({}, {"hidden": (128,)}, {"hidden": (256,)})

    def trained(estimator: Contrastive | Implicit) -> tuple[float | None, int, int]:
        net = nets.build(SYSTEM, trial.budget, trial.seed, trial.device, estimator=estimator, **options)
        try:
            seen = nets.fit(net, data, steps, batch=size, rate=1e-3, seed=trial.seed, summed=True)
        except DivergenceError:
            return None, 0, counting.parameters(net)
        return nets.accuracy(net, data), seen, counting.parameters(net)

    grid = _grid(trial)
    if trial.side == BASELINE:
        reached, seen, weights = trained(Implicit())
        curve = [(beta, reached) for beta in grid]
        return Outcome({"accuracy": Quantity(reached, "%")}, {"accuracy": curve}, Cost(weights, None, seen))
    kind, nudge = KINDS[trial.side]
    reference = nets.build(SYSTEM, trial.budget, trial.seed, trial.device, estimator=Implicit(), **options)
    nets.fit(reference, data, steps, batch=size, rate=1e-3, seed=trial.seed)
    x, y = data.inputs("train", slice(0, size)).to(trial.device), data.train_y[:size].to(trial.device)
    exact = gradients(tight_copy(reference), as_double(x), y)
    accuracies: list[tuple[float, float | None]] = []
    cosines: list[tuple[float, float | None]] = []
    seen = weights = 0
    for beta in grid:
        reached, seen, weights = trained(kind(beta=beta, nudge=nudge, **_fixed(kind)))
        accuracies.append((beta, reached))
        # a mean-reduced loss puts 1/size into the cotangent, which an absolute beta makes up for
        per_example = kind(beta=beta * size if nudge == "absolute" else beta, nudge=nudge, **_fixed(kind))
        rows = compare("", gradients(with_estimator(reference, per_example), x, y), exact)
        cosines.append((beta, min(row.cosine for row in rows if row.cosine is not None)))
    metrics = {
        "best beta": Quantity(best(accuracies), ""),
        "best beta by cosine": Quantity(best(cosines), ""),
        "smallest beta as good": Quantity(_as_good(accuracies)[0], ""),
        "largest beta as good": Quantity(_as_good(accuracies)[1], ""),
        "accuracy at the best beta": Quantity(max((a for _, a in accuracies if a is not None), default=None), "%"),
        f"accuracy at {CLAIMED}": Quantity(dict(accuracies).get(CLAIMED), "%"),
        f"cosine at {CLAIMED}": Quantity(dict(cosines).get(CLAIMED), ""),
        "radius": Quantity(nets.layer(reference).radius(x), ""),
    }
    curves = {"accuracy": accuracies, "cosine": cosines}
    return Outcome(metrics, curves, Cost(weights, None, seen * len(grid)))


def _grid(trial: Trial) -> tuple[float, ...]:
    if trial.side in KINDS and KINDS[trial.side][1] == "relative":
        return trial.budget.pick((0.01, 0.22), RELATIVE, RELATIVE)
    return trial.budget.pick((0.03, 0.22), ABSOLUTE, ABSOLUTE)


def _fixed(kind: type[Contrastive]) -> dict[str, int]:
    """What keeps beta as it is, whatever the asymmetry."""
    return {"max_halvings": 0} if kind is Centered else {}


def best(points: list[tuple[float, float | None]]) -> float | None:
    """The x of the largest y; of several, the one nearest to the claimed beta, which favours the claim."""
    known = [(x, y) for x, y in points if y is not None]
    if not known:
        return None
    top = max(y for _, y in known)
    return min((x for x, y in known if y == top), key=lambda x: abs(math.log(x / CLAIMED)))


def _as_good(points: list[tuple[float, float | None]]) -> tuple[float | None, float | None]:
    """The ends of the betas whose accuracy is within ``SAME`` points of the best."""
    top = max((y for _, y in points if y is not None), default=0.0)
    found = [x for x, y in points if y is not None and y >= top - SAME]
    return (min(found), max(found)) if found else (None, None)


CLAIM = Claim(
    id="B5",
    system="toreqprop",
    seed_file="004_20577c1546d9a984.txt",
    sentence="A nudge of beta = 0.22 is optimal.",
    criteria=tuple(
        Criterion(
            f"{side}: best beta by accuracy",
            "best beta",
            "",
            "between",
            side,
            target=WITHIN,
            words="0.22",
            scale="log",
            beside=tuple(name for name in KINDS if name != side),
        )
        for side in ("centered absolute", "one-sided absolute")
    ),
    protocol="""
    A ToroidalMLP trained anew on MNIST for every beta (Adam 1e-3, batch 100; full: width 256, 400 steps on 10,000
    images, quick: width 128, 60 steps on 3,000), by centered and one-sided contrasts, beta absolute (the force is beta
    times the gradient of each example's own loss) and relative (beta is the response wanted), never halved. The best
    beta is the one of the highest test accuracy; the claim holds if it is within 10% of 0.22. Beside it stand the ends
    of the betas within 0.2 points of the best. The cosine with the true gradient, smallest over parameters, is measured
    at every beta on a network trained by the implicit gradient.
    """,
    sides={
        **{name: f"{kind.__name__} with nudge={nudge!r}" for name, (kind, nudge) in KINDS.items()},
        BASELINE: "the implicit gradient, which has no beta",
    },
    run=run,
    picture=Picture(
        "Accuracy against beta",
        x_label="beta",
        y_label="test accuracy (%)",
        curves=("accuracy",),
        log_x=True,
    ),
    printed=("radius",),
)
