"""D6: noise in the relaxation as a regulariser, where there are few training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toreq.data import Dataset, load
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.difftoreqprop import nets
from toreq.evidence.tpeqprop.fitting import Plan, accuracy
from toreq.systems import create
from toreq.systems.difftoreqprop_parts import own_generator

ON, OFF, CONTROL = "noise on", "noise off", "dropout"
SIDES = {
    ON: "one draw of noise on the visible node's clamp for each relaxation, of a deviation that is learned",
    OFF: "the same network without noise",
    CONTROL: "the same network without noise, a share of the pixels set to zero in training",
}
NOISE, DROPPED = 0.2, 0.2
"""The noise's deviation at the start, and the share of dropped pixels."""


@dataclass(frozen=True)
class Size:
    """What a budget buys: numbers of training images, test images, filters, and steps of 50 images each."""

    train: tuple[int, ...]
    test: int
    channels: tuple[int, int]
    steps: int
    batch: int


SIZES = {
    "smoke": Size((20, 40), 20, (2, 2), 2, 10),
    "quick": Size((500, 2000), 1000, (8, 16), 100, 50),
    "full": Size((500, 2000, 5000), 5000, (16, 32), 400, 50),
}
RATE = 2e-3


class Dropped(nn.Module):
    """A network that sees its training images without some of their pixels, the others enlarged to make up for it.

    Args:
        inner: the network.
        share: of the pixels.
    """

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share, self.generator = inner, share, own_generator()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        if self.training:
            kept = torch.rand(x.shape, generator=self.generator).to(x.device) >= self.share
            x = x * kept / (1 - self.share)
        return self.inner(x)


def images(trial: Trial) -> Dataset:
    """CIFAR-10, JPEG-recompressed; a smoke run takes bundled digits, so that it needs no files."""
    return load("mnist") if trial.budget.name == "smoke" else load("cifar10")


def build(side: str, data: Dataset, trial: Trial, size: Size) -> nn.Module:
    """The untrained network of a side; all have the same weights at the start."""
    torch.manual_seed(trial.seed)
    noise: dict[str, Any] = {"noise": NOISE if side == ON else None}
    net = create(
        "difftoreqprop", data.input_shape, data.num_classes, arch="conv", channels=size.channels, direct=False,
        settings="fast", **noise,
    )  # fmt: skip
    return Dropped(net, DROPPED) if side == CONTROL else net


def run(trial: Trial) -> Outcome:
    """Train one side on each number of images and test it."""
    size = SIZES[trial.budget.name]
    whole = images(trial)
    metrics: dict[str, Quantity] = {}
    points: list[tuple[float, float]] = []
    notes: list[str] = []
    parameters = samples = 0
    for count in size.train:
        # other images for every seed, the same ones for every side
        data = whole.limit(count, size.test, torch.Generator().manual_seed(trial.seed))
        net = build(trial.side, data, trial, size).to(trial.device)
        epochs = size.steps * size.batch / count
        plan = Plan(epochs, RATE, size.batch, tests=1, tested=min(200, size.test), clip=5.0)
        folder = trial.scratch / f"images-{count}"
        folder.mkdir(parents=True, exist_ok=True)
        done = nets.fit(net, data, plan, trial.seed, folder)
        x, y = nets.shown(data, trial.device)
        found = accuracy(net, x, y)
        metrics[f"accuracy, {_ordinal(size, count)}"] = Quantity(found, "%")
        points.append((float(count), found))
        metrics[f"training accuracy, {_ordinal(size, count)}"] = Quantity(_trained(net, data, trial), "%")
        parameters, samples = done.cost.parameters or 0, samples + done.at.samples
        notes += done.notes
        for name, parameter in net.named_parameters():
            if name.endswith("log_noise"):
                found = float(parameter.detach().exp())
                metrics[f"deviation of the noise, learned, {_ordinal(size, count)}"] = Quantity(found, "")
        inner = net.inner if isinstance(net, Dropped) else net
        metrics |= {f"{name}, {_ordinal(size, count)}": q for name, q in nets.coupled(inner, x[:200], y[:200]).items()}
    return Outcome(metrics, {"accuracy": list(points)}, Cost(parameters, None, samples), tuple(notes))


def _ordinal(size: Size, count: int) -> str:
    """The same names at every budget, so that one criterion reads them all."""
    return {0: "fewest images", len(size.train) - 1: "most images"}.get(size.train.index(count), "images between")


def _trained(net: nn.Module, data: Dataset, trial: Trial) -> float:
    x = data.inputs("train", slice(0, 500)).to(trial.device)
    return 100 * float((shared.predictions(net, x).cpu() == data.train_y[:500]).double().mean())


CLAIM = Claim(
    id="D6",
    system="difftoreqprop",
    seed_file=nets.SEED_FILE,
    sentence="With few training images, noise in the relaxation gains 2 points of test accuracy.",
    criteria=tuple(
        Criterion(f"gain of the noise, {which}", f"accuracy, {which}", "points", "at_least", ON, target=2.0,
                  versus=(OFF, CONTROL), words="expect 2-5% better test accuracy in low-data regimes")
        for which in ("fewest images", "most images")
    ),
    protocol=f"""
    CIFAR-10, JPEG-recompressed: {", ".join(map(str, SIZES["full"].train))} training images (quick:
    {", ".join(map(str, SIZES["quick"].train))}), balanced over the classes, others for every seed; {SIZES["full"].test}
    test images (quick: {SIZES["quick"].test}). Two convolutions above a visible node through which all of the input
    passes ({SIZES["full"].channels[0]} and {SIZES["full"].channels[1]} filters), {SIZES["full"].steps} steps of
    {SIZES["full"].batch} images (quick: {SIZES["quick"].steps}), Adam at {RATE:g} with a half cosine, the same weights
    at the start on all sides. The noise is drawn once per relaxation, of deviation {NOISE:g} at the start, and learned;
    dropout sets {100 * DROPPED:g}% of the pixels to zero. The gain is over the better of both controls. Nothing is
    tuned. A smoke run takes digits.
    """,
    sides=SIDES,
    run=run,
    picture=Picture("Accuracy with few images", x_label="training images", y_label="test accuracy (%)",
                    curves=("accuracy",), log_x=True),
    printed=("accuracy, fewest images",),
)  # fmt: skip
