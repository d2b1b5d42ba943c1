"""D4: digits drawn by annealed Langevin dynamics, their distance from real ones, and what the same weights classify."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toreq.data import Dataset
from toreq.diagnostics.samples import grid, png
from toreq.estimators import Implicit
from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.difftoreqprop import nets
from toreq.evidence.difftoreqprop.features import Moments, classes_found, digit_fid, shipped
from toreq.evidence.difftoreqprop.generators import SPAN, VAE, PlainDenoiser, auroc, evaluations
from toreq.evidence.tpeqprop.fitting import Plan, Progress, accuracy
from toreq.io import atomic_write_bytes
from toreq.systems import Anneal, DiffTorEqProp, Seen

OWN, MEMORY, EQ, PLAIN = "difftoreqprop", "memory alone", "bp-eq", "bp denoiser"
AUTO, REAL = "vae", "test images"
SIDES = {
    OWN: "a convolution, a dense layer and an associative memory about a visible node that settles, by centered EqProp",
    MEMORY: "the same before any training: its patterns are means of training images alike, its couplings nearly 0",
    EQ: "the same energy by the implicit gradient",
    PLAIN: "a feed-forward denoiser of about as many parameters by backprop, on the same ring of noise levels",
    AUTO: "a variational autoencoder of about as many parameters",
    REAL: "as many images of the test set in the place of samples: the floor of the distance",
}
FID, CLASSES, ACCURACY = "digit FID", "classes among the samples", "accuracy of the same weights"
LEFT = "error of denoising over that of the linear filter"
LEVELS, TESTED = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2), 500
DOWN, LABEL = 1 / 16, 128.0
"""Slope of the dense layer over that of the convolution, which makes the way down from it strong, and of the label node
over that of the dense layer."""
SHARE = 0.02
"""Of the samples that a class must have to be counted: a fifth of its part in the data."""


@dataclass(frozen=True)
class Size:
    """What a budget buys: training images, epochs and their batch, Adam's rates (of couplings, whose norms are bounded,
    and of the others), images tested, samples drawn, noise
    levels, chains in a slot, channels and width of the denoisers, the width of the one by
    backprop, which has no weights tied, patterns of the memory, and the autoencoder's sizes."""

    train: int
    epochs: float
    batch: int
    bounded: float
    rate: float
    test: int
    samples: int
    levels: int
    slot: int
    channels: int
    width: int
    plain: int
    memory: int
    auto: tuple[tuple[int, int], int, int]


SIZES = {
    "smoke": Size(32, 1.0, 16, 1e-2, 1e-2, 24, 24, 3, 12, 2, 3, 3, 4, ((2, 3), 3, 2)),
    "quick": Size(10_000, 2.0, 64, 2e-2, 2e-3, 1000, 500, 25, 100, 16, 128, 125, 250, ((16, 32), 300, 16)),
    "full": Size(60_000, 4.0, 64, 1e-2, 2e-3, 10_000, 10_000, 25, 100, 24, 256, 425, 2000, ((32, 64), 740, 16)),
}


def build(side: str, trial: Trial, size: Size) -> nn.Module:
    """The untrained network of a side."""
    if side in (OWN, MEMORY, EQ):
        how: dict[str, Any] = {"estimator": Implicit(tolerance=1e-2)} if side == EQ else {}
        return nets.build(
            trial.seed, arch="conv", channels=(size.channels,), dense=(size.width,), denoising=1.0, span=SPAN,
            gain=DOWN, label_gain=LABEL, memory=size.memory, coupling_scale=0.1, norm_bound=0.9, settings="fast",
            **how,
        )  # fmt: skip
    torch.manual_seed(trial.seed)
    return PlainDenoiser(size.channels, size.plain) if side == PLAIN else VAE(*size.auto)


@functools.lru_cache(maxsize=2)
def reference(train: int) -> Moments:
    """The moments of the training images' features."""
    data = shared.mnist(train, 10)
    return Moments.of(shipped().features(data.inputs("train", slice(None))))


def draw(net: nn.Module, count: int, size: Size, seed: int, labels: Tensor | None = None) -> Tensor:
    """Samples of a trained side, clipped to [0, 1], on the CPU."""
    low, high = SPAN
    anneal = Anneal(levels=size.levels, high=high, low=low)
    g = torch.Generator().manual_seed(seed)
    assert isinstance(net, DiffTorEqProp | PlainDenoiser | VAE)
    return net.sample(count, anneal=anneal, labels=labels, batch=min(size.slot, count), generator=g).clamp(0, 1).cpu()


def run(trial: Trial) -> Outcome:
    """Train one side, draw, and compare."""
    size = SIZES[trial.budget.name]
    data = shared.mnist(size.train, size.test)
    if trial.side == REAL:
        return _real(data, size)
    net = build(trial.side, trial, size).to(trial.device)
    if isinstance(net, PlainDenoiser):
        net.observe(data.inputs("train", slice(None)))
    done = _trained(net, data, trial, size)
    started = time.process_time()
    x = draw(net, size.samples, size, trial.seed)
    seconds = time.process_time() - started
    atomic_write_bytes(trial.scratch / "samples.png", png(grid(x[:100], 10)))
    metrics = _judged(x, size) | _named(net, size, trial.seed) | _scores(net, data, trial)
    tx, ty = nets.shown(data, trial.device)
    metrics[ACCURACY] = Quantity(accuracy(net, tx, ty), "%")
    metrics["denoisings of a sample"] = Quantity(float(evaluations(net, _anneal(size))), "")
    metrics["processor time of 1,000 samples"] = Quantity(1000 * seconds / size.samples, "s")
    metrics["operations of a sample"] = Quantity(_flops(net, size, trial.seed), "FLOPs")
    metrics |= _left(net, tx)
    metrics |= nets.coupled(net, tx[:500], ty[:500])
    return Outcome(metrics, {}, done.cost, done.notes)


def _trained(net: nn.Module, data: Dataset, trial: Trial, size: Size) -> nets.Trained:
    if trial.side == MEMORY:
        assert isinstance(net, DiffTorEqProp)
        net.observe(data.inputs("train", slice(None)))
        return nets.Trained(net, data, Progress())
    rate = size.bounded if trial.side in (OWN, EQ) else size.rate
    plan = Plan(size.epochs, rate, size.batch, tests=1, tested=min(500, size.test), clip=5.0)
    return nets.fit(net, data, plan, trial.seed, trial.scratch)


def _left(net: nn.Module, tx: Tensor) -> dict[str, Quantity]:
    """Of the mean square error of the linear filter, averaged over noise levels."""
    if not isinstance(net, DiffTorEqProp | PlainDenoiser):
        return {}
    assert net.filter is not None
    x, g, shares = tx[:TESTED], torch.Generator().manual_seed(9), []
    with torch.no_grad():
        for s in LEVELS:
            level = torch.full((len(x),), s)
            clean = net.denoise(Seen(x + s * torch.randn(x.shape, generator=g).to(x.device), level.to(x.device)))
            shares.append(float((clean - x).square().mean()) / float(net.filter.left(level.to(x.device))[0]))
    return {LEFT: Quantity(sum(shares) / len(shares), "")}


def _anneal(size: Size) -> Anneal:
    return Anneal(levels=size.levels, high=SPAN[1], low=SPAN[0])


def _real(data: Dataset, size: Size) -> Outcome:
    x = data.inputs("test", slice(0, size.samples))
    metrics = _judged(x, size)
    right = classes_found(x) == data.test_y[: len(x)]
    metrics["labels named by the fixed network"] = Quantity(100 * float(right.double().mean()), "%")
    return Outcome(metrics)


def _judged(x: Tensor, size: Size) -> dict[str, Quantity]:
    found = torch.bincount(classes_found(x), minlength=nets.CLASSES).double() / len(x)
    return {
        FID: Quantity(digit_fid(x, reference(size.train)), ""),
        CLASSES: Quantity(float((found >= SHARE).sum()), ""),
        "rarest class": Quantity(100 * float(found.min()), "%"),
    }


def _named(net: nn.Module, size: Size, seed: int) -> dict[str, Quantity]:
    """How many samples of a class are taken for it."""
    labels = torch.arange(min(size.samples, 1000)) % nets.CLASSES
    x = draw(net, len(labels), size, seed + 1, labels)
    right = (classes_found(x) == labels).double().mean()
    return {"labels named by the fixed network": Quantity(100 * float(right), "%")}


def _scores(net: nn.Module, data: Dataset, trial: Trial) -> dict[str, Quantity]:
    """How well the energy tells digits from upside-down ones and from their negatives."""
    if not isinstance(net, DiffTorEqProp):
        return {}
    x = data.inputs("test", slice(0, 500)).to(trial.device)
    inside = net.energy(x).cpu()
    strange = {"negatives": 1 - x, "upside-down digits": x.flip(2)}
    return {
        f"energy as a score: {name} (AUROC)": Quantity(auroc(inside, net.energy(other).cpu()), "%")
        for name, other in strange.items()
    }


def _flops(net: nn.Module, size: Size, seed: int) -> float:
    count = min(4, size.samples)
    return counting.flops(lambda: draw(net, count, size, seed)) / count


CLAIM = Claim(
    id="D4",
    system="difftoreqprop",
    seed_file=nets.SEED_FILE,
    sentence="It generates digits of all classes, and the same weights classify.",
    criteria=(
        Criterion("distance of the samples", FID, "", "at_most", OWN, target=20.0, words="FID score (~20)", aim=15.0),
        Criterion("all classes", CLASSES, "", "at_least", OWN, aim=10.0, words="coherent digits"),
        Criterion("steps of a chain", "denoisings of a sample", "", "at_most", OWN, target=100.0, words="100 steps"),
        Criterion("the same weights classify", ACCURACY, "%", "at_least", OWN, aim=97.0,
                  words="without extra parameters"),
        # one seed: the others are dear, and shown to place the numbers above
        Criterion("distance beside that of other generators", FID, "", "at_most", OWN, versus=(PLAIN, AUTO),
                  beside=(MEMORY, EQ, REAL), seeds=1),
        Criterion("classification beside theirs", ACCURACY, "%", "at_least", OWN, aim=-0.5, versus=(PLAIN, AUTO),
                  beside=(MEMORY, EQ), seeds=1),
        Criterion("it denoises as after the implicit gradient", LEFT, "", "at_most", OWN, aim=0.02, versus=(EQ,),
                  beside=(MEMORY, PLAIN), seeds=1),
    ),
    protocol=f"""
    MNIST ({SIZES["full"].train:,} images, {SIZES["full"].epochs:g} epochs; quick: {SIZES["quick"].train:,}, two),
    batches of {SIZES["full"].batch}, Adam at {SIZES["full"].bounded:g} (energies, whose couplings
    are bounded) or {SIZES["full"].rate:g} (the others) with a half cosine, settings fast. Denoisers have the
    images' mean and covariance and learn what the best linear filter misses of Gaussian noise of {SPAN[0]} to
    {SPAN[1]}, drawn log-uniformly, half of the time without the class, and beside it the classes of clean
    images; the autoencoder maximises its bound beside the same classification. The energy's memory begins with
    {SIZES["full"].memory:,} means of training images that are alike (quick: {SIZES["quick"].memory}), found by Lloyd's
    iteration; the memory alone is a row. Samples
    ({SIZES["full"].samples:,}; quick: {SIZES["quick"].samples}) come from one ring of {SIZES["full"].levels} noise
    levels, geometric, all noise fresh (eta 1), clipped to [0, 1]; chains begin with
    noise about draws of the Gaussian law of that mean and covariance. The distance is the squared Frechet distance of
    the features of a small fixed network (scripts/digit_features.py; 98.8% of the test images right) from the training
    images; its scale is its own, and not that of Inception features, of which the seed speaks. As many test images give
    the floor. A class counts with {100 * SHARE:g}% of the samples. Class-conditional samples clamp the label node. The
    energy's scores compare 500 test images with their negatives and upside-down ones. What is left of the linear
    filter's error is the mean over noise of {LEVELS[0]:g} to {LEVELS[-1]:g} on {TESTED} test images. Parameters are
    matched to about 15%. Nothing is tuned but for short trials of the energies' slopes, rate and patterns.
    """,
    sides=SIDES,
    run=run,
    picture=Picture("Distance of the samples from digits", y_label="digit FID", metrics=(FID,)),
    printed=(FID,),
)  # fmt: skip
