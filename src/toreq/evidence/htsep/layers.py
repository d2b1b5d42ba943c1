"""H8: many effective layers: a thousand steps of settling, and a hundred and twenty-eight levels."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from toreq.diagnostics.gradients import gradients
from toreq.diagnostics.memory import fixed_steps
from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.htsep import nets
from toreq.evidence.tpeqprop.depth import gain
from toreq.solvers import FixedPoint
from toreq.systems.htsep import HTSEP

OWN, FORWARD = "htsep", "bp-ff"
SIDES = {
    OWN: "levels joined both ways, gates of the torus, centered EqProp",
    FORWARD: "the same levels and slopes, backprop in one pass",
}
DEEPEST, LONG, SHORT = 128, 1000, 100
RATE, LEARNED = 1e-3, 80.0
"""Adam's rate, and percent from which a depth counts as learned."""
RANGE = (-3.0, 3.0)


def run(trial: Trial) -> Outcome:
    """Train a shallow and a deep network; settle the deep one for a thousand steps."""
    depths = trial.budget.pick((2, 5), (2, 8, 32, DEEPEST), (2, 8, 32, DEEPEST))
    width, train, test = trial.budget.pick((8, 48, 10), (32, 10_000, 1000), (96, 20_000, 2000))
    data = nets.digits(train, test)
    metrics: dict[str, Quantity] = {}
    curve: list[tuple[float, float | None]] = []
    net: nn.Module = nn.Identity()
    samples = 0
    for levels in depths:
        net = build(trial.side, levels, width, trial.seed)
        one = replace(trial, scratch=trial.scratch / f"levels-{levels}")
        at = nets.train(net, one, data, trial.budget.pick(1, 2, 3), RATE)
        accuracy = 0.0 if at.diverged else at.curve[-1][1]
        metrics[f"accuracy, {levels} levels"] = Quantity(accuracy, "%")
        curve.append((float(levels), accuracy))
        samples += at.samples
    metrics["accuracy, deepest"] = Quantity(curve[-1][1], "%")
    learned = [depth for depth, accuracy in curve if accuracy is not None and accuracy >= LEARNED]
    metrics["levels that learn"] = Quantity(max(learned, default=0.0), "levels")
    batch = min(16, train)
    x, y = data.inputs("train", slice(0, batch)), data.train_y[:batch]
    found = gradients(net.eval(), x, y)
    metrics["log ratio of gradients, first to last level"] = Quantity(_ratio(found, net), "log10")
    if isinstance(net, HTSEP):
        metrics |= _long(net, x, y, trial.budget.pick(40, LONG, LONG))
    return Outcome(metrics, {"accuracy": curve}, Cost(counting.parameters(net), None, samples))


def build(side: str, levels: int, width: int, seed: int) -> nn.Module:
    """A network of so many levels; slopes rise as in the deep Hopfield networks of T2."""
    net = nets.build(
        "dense", seed, hidden=(width,) * levels, lateral=False, gain=gain(levels), coupling_scale=0.4, gates="hard"
    )
    if side == OWN:
        return net
    torch.manual_seed(seed)
    return net.feedforward()


def _ratio(found: dict[str, torch.Tensor], net: nn.Module) -> float:
    """Of the norms of the gradients of the first and the last weight that joins two levels."""
    if isinstance(net, HTSEP):
        joints = [n for n in found if n.endswith("op.weight")]
    else:
        joints = [n for n, g in found.items() if g.dim() == 2][1:-1]
    first, last = (float(found[n].norm()) for n in (joints[0], joints[-1]))
    tiny = 1e-30
    return math.log10(max(first, tiny) / max(last, tiny))


def _long(net: HTSEP, x: torch.Tensor, y: torch.Tensor, steps: int) -> dict[str, Quantity]:
    whole, first, last = [], [], 0.0
    for most in (max(2, steps // 10), steps):
        # the plain iteration: at a residual of exactly 0 Anderson's method would divide by it
        fixed = fixed_steps(net, most)
        layer = nets.layer(fixed)
        layer.solver = FixedPoint(max_steps=most, tolerance=0.0)
        gradient = gradients(fixed, x, y)
        joint = next(n for n in gradient if n.endswith("op.weight"))
        whole.append(torch.cat([g.flatten() for g in gradient.values()]).double())
        first.append(gradient[joint].flatten().double())
        assert layer.last.free is not None
        last = float(layer.last.free.residual.max())
    finite = float(bool(torch.isfinite(whole[1]).all()))
    return {
        "residual after all steps": Quantity(last, "relative"),
        "cosine of the gradient, all steps against a tenth": Quantity(_cosine(whole), ""),
        "cosine of the first joint's gradient": Quantity(_cosine(first), ""),
        "finite after all steps": Quantity(finite, ""),
    }


def _cosine(pair: list[torch.Tensor]) -> float:
    found = float(torch.cosine_similarity(pair[0], pair[1], 0))
    return found if math.isfinite(found) else 0.0


CLAIM = Claim(
    id="H8",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="A hundred and more effective layers are stable.",
    criteria=(
        Criterion(
            f"accuracy, {DEEPEST} levels", "accuracy, deepest", "%", "at_least", OWN, aim=95.0,
            words="stable for 100+ effective layers", beside=(FORWARD,),
        ),
        Criterion(
            f"accuracy of backprop, {DEEPEST} levels", "accuracy, deepest", "%", "at_least", FORWARD, target=LEARNED,
            condition=True,
        ),
        Criterion(
            "levels that learn", "levels that learn", "levels", "at_least", OWN, target=100.0,
            words="stable for 100+ effective layers", beside=(FORWARD,),
        ),
        Criterion(
            "gradients neither vanish nor explode", "log ratio of gradients, first to last level", "log10", "between",
            OWN, aim=RANGE, words="fixes vanishing gradients", beside=(FORWARD,),
        ),
        Criterion(
            f"gradient after {LONG} steps", "cosine of the gradient, all steps against a tenth", "", "at_least", OWN,
            aim=0.99, words="100+ effective layers in loops",
        ),
        Criterion(
            f"gradient of the first joint after {LONG} steps", "cosine of the first joint's gradient", "", "at_least",
            OWN, aim=0.99, words="100+ effective layers in loops",
        ),
        Criterion(
            f"residual after {LONG} steps", "residual after all steps", "relative", "at_most", OWN, aim=1e-3,
            words="stable",
        ),
    ),
    protocol=f"""
    Dense networks of 2, 8, 32 and {DEEPEST} levels (32 units quick, 96 full) joined both ways under one bound on the
    norm of all couplings, half of the units opened, slopes that rise from level to level as in T2's deep Hopfield
    networks, trained for two epochs of 10,000 (quick) or three of 20,000 digits of MNIST by Adam at {RATE:g}. A depth
    is learned from {LEARNED:g}% on; the deepest counts only where backprop learns it. On the deepest the norms of the
    gradients of the first and the last joint are compared, and its phases are run by the plain iteration for {LONG:,}
    and for {SHORT} steps without a stop. Settling runs through every level in each step, so that {LONG:,} steps are as
    many effective layers. The twin has the same widths and slopes and is trained by backprop.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Accuracy against levels", x_label="levels", y_label="test accuracy (%)", curves=("accuracy",), log_x=True
    ),
)  # fmt: skip
