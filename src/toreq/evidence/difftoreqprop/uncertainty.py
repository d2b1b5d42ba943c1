"""D7: whether the noise scale that is learned is that of the data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from toreq.core import Drive, Energy
from toreq.estimators import Implicit
from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.difftoreqprop import nets
from toreq.systems import DiffTorEqProp
from toreq.systems.difftoreqprop_parts import Clamp, drawn_like

OWN, EQ, ERROR = "energy score", "energy score, bp-eq", "squared error"
SIDES = {
    OWN: "the noise learned from the energy score of two relaxations, by centered EqProp",
    EQ: "the same by the implicit gradient",
    ERROR: "the noise learned from the squared error alone, as a loss that knows no spread",
}
LEVELS = (0.1, 0.2, 0.4)
BEGIN, RATE = 0.2, 1e-2


@dataclass(frozen=True)
class Size:
    """What a budget buys: training images, hidden units, steps, images in a step."""

    train: int
    width: int
    steps: int
    batch: int


SIZES = {
    "smoke": Size(32, 8, 3, 8),
    "quick": Size(2000, 64, 300, 32),
    "full": Size(10_000, 128, 1000, 64),
}


def energy_score(first: Tensor, second: Tensor, seen: Tensor) -> Tensor:
    r"""The mean over examples of :math:`\tfrac12(\|v - o\| + \|v' - o\|) - \tfrac12\|v - v'\|` (Gneiting and Raftery
    2007), least in expectation where v and v' have the law of o.

    Args:
        first, second: two independent draws of the model ``(B, ...)``.
        seen: the observation ``(B, ...)``.
    """

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).flatten(1).norm(dim=1)

    return (0.5 * (apart(first, seen) + apart(second, seen)) - 0.5 * apart(first, second)).mean()


def clamp_of(net: DiffTorEqProp) -> Clamp:
    """The clamp on the visible node."""
    dynamics = net.equilibrium.dynamics
    assert isinstance(dynamics, Energy)
    (found,) = (c.module for _, c in dynamics.terms() if isinstance(c, Drive) and isinstance(c.module, Clamp))
    return found


@torch.no_grad()
def spread(net: DiffTorEqProp, x: Tensor, draws: int = 16) -> float:
    """Standard deviation of the visible node over the noise, root mean square over pixels and images."""
    net.train()
    v = torch.stack([net.denoise(x) for _ in range(draws)])
    return float(v.var(0).mean().sqrt())


def learned(side: str, level: float, trial: Trial, size: Size) -> tuple[float, float, int]:
    """Train on clean images of which noisy observations are to be predicted; the spread and the deviation learned, and
    the samples seen."""
    how: dict[str, Any] = {"estimator": Implicit(tolerance=1e-3)} if side == EQ else {}
    net = nets.build(trial.seed, trial.device, arch="mlp", hidden=(size.width,), noise=BEGIN, settings="fast", **how)
    data = shared.mnist(size.train, 10)
    x = data.inputs("train", slice(None)).to(trial.device)
    g = torch.Generator().manual_seed(trial.seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    net.train()
    for step in range(size.steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / size.steps)
        part = x[torch.randint(len(x), (size.batch,), generator=g)]
        seen = part + level * drawn_like(part, g)
        optimizer.zero_grad()
        first = net.denoise(part)
        if side == ERROR:
            loss = (first - seen).square().flatten(1).sum(1).mean()
        else:
            loss = energy_score(first, net.denoise(part), seen)
        loss.backward()
        optimizer.step()
    noise = clamp_of(net).log_noise
    assert noise is not None
    return spread(net, x[: 4 * size.batch]), float(noise.detach().exp()), size.steps * size.batch


def run(trial: Trial) -> Outcome:
    """Learn the noise of data of several true levels by one side."""
    size = SIZES[trial.budget.name]
    levels = LEVELS[:2] if trial.budget.name == "smoke" else LEVELS
    points, metrics, samples = [], {}, 0
    for level in levels:
        found, own, seen = learned(trial.side, level, trial, size)
        points.append((level, found))
        samples += seen
        metrics[f"spread over the true deviation, {level:g}"] = Quantity(found / level, "")
        metrics[f"deviation on the clamp, {level:g}"] = Quantity(own, "")
    ratios = torch.tensor([y / x for x, y in points])
    metrics["largest error of the spread"] = Quantity(100 * float((ratios - 1).abs().max()), "%")
    rising = all(b > a for (_, a), (_, b) in pairwise(points))
    metrics["spread rises with the data's"] = Quantity(float(rising), "")
    net = nets.build(trial.seed, arch="mlp", hidden=(size.width,), noise=BEGIN)
    return Outcome(metrics, {"spread": points}, Cost(counting.parameters(net), None, samples))


CLAIM = Claim(
    id="D7",
    system="difftoreqprop",
    seed_file=nets.SEED_FILE,
    sentence="The learned noise scale is that of the data's uncertainty.",
    criteria=(
        Criterion("error of the learned spread", "largest error of the spread", "%", "at_most", OWN, aim=10.0,
                  words="adapt diffusion strength based on data uncertainty", beside=(EQ, ERROR)),
        Criterion("more noise is learned from noisier data", "spread rises with the data's", "", "at_least", OWN,
                  aim=1.0, words="adapt diffusion strength", beside=(EQ, ERROR)),
    ),
    protocol=f"""
    Observations are clean digits with Gaussian noise of deviation {", ".join(f"{s:g}" for s in LEVELS)}, a network for
    each. The network sees the clean digit; its visible node, with one draw of noise on the clamp for each relaxation,
    is to have the law of the observation. Two relaxations of each digit with independent noise give the energy score, a
    proper scoring rule; its gradient reaches the noise's scale by the contrast of the energy's term that holds it. All
    weights are learned with it: Adam at {RATE:g}, falling to 0, {SIZES["full"].steps} steps of {SIZES["full"].batch}
    digits (quick: {SIZES["quick"].steps} of {SIZES["quick"].batch}), {SIZES["full"].width} hidden units (quick:
    {SIZES["quick"].width}). What is compared with the true deviation is the spread of the visible node over 16 draws,
    since the clamp's scale alone is what the pull makes of it; the scale begins at {BEGIN:g}. Squared error is what the
    seed's training would give the noise: it has its least value without any.
    """,
    sides=SIDES,
    run=run,
    picture=Picture("Learned and true deviation", x_label="deviation of the data's noise",
                    y_label="spread of the visible node", curves=("spread",)),
    printed=("largest error of the spread",),
)  # fmt: skip
