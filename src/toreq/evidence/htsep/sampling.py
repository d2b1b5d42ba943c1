"""H7: how long digits take to be drawn, by gates and spikes and by DiffTorEqProp's dense network."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toreq.data import Dataset
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.difftoreqprop import nets as denoisers
from toreq.evidence.difftoreqprop.features import Moments, classes_found, digit_fid, shipped
from toreq.evidence.htsep import nets
from toreq.evidence.tpeqprop import fitting
from toreq.solvers import Spiking
from toreq.systems import Anneal, DiffTorEqProp
from toreq.systems.difftoreqprop_filter import LinearFilter
from toreq.systems.difftoreqprop_parts import (
    FREQUENCIES,
    LevelFeatures,
    Seen,
    denoising_cost,
    drawn_like,
    own_generator,
    views,
)
from toreq.systems.difftoreqprop_sampling import Conveyor, stream

DENSE, GATED, OPEN, SPIKES = "difftoreqprop", "gates", "gates off", "gates and spikes"
SIDES = {
    DENSE: "DiffTorEqProp with a dense hidden layer, all of it settling for every denoising",
    GATED: "HTSEP's hidden layer, half of it opened by a context that the noisy image and its noise level choose",
    OPEN: "the same with all units open",
    SPIKES: "the gated network sampled by sigma-delta spikes instead of Anderson's method",
}
SPAN, PIXELS, CLASSES = (0.02, 4.0), 784, 10
LEVELS = (5, 10, 25)
TIME, SPEED, FID = "processor time of 1,000 samples", "speed", "digit FID"
RATE, BOUNDED, BATCH, CONTEXTS = 2e-3, 1e-2, 64, 8
BLOCK = 8
"""Batches of the same noise in the stream that opens the contexts."""
STEPS = 200
"""Most steps of a spiking run."""


@dataclass(frozen=True)
class Size:
    """Training images, epochs, samples and hidden units."""

    train: int
    epochs: float
    samples: int
    hidden: int


SIZES = {
    "smoke": Size(64, 2.0, 20, 16),
    "quick": Size(10_000, 4.0, 500, 256),
    "full": Size(60_000, 4.0, 2000, 512),
}


class GatedDenoiser(nn.Module):
    r"""HTSEP behind the linear filter that DiffTorEqProp has: :math:`D = \mu + W_s(x) + (r_s/0.3)\,F`, F its read-out.

    Contexts are levels of noise: they open on a stream in which it falls (the filtered image is then less and less like
    the mean), and in training every batch has one level.

    Args:
        hidden: units.
        gates: mode of the gates in training and sampling.
        seed: of the weights.
    """

    def __init__(self, hidden: int, gates: str, seed: int) -> None:
        super().__init__()
        self.filter = LinearFilter((1, 28, 28), SPAN)
        # what a level, two views of the image, and perhaps a class say
        inputs = 2 * PIXELS + 2 * len(FREQUENCIES) + 2 + CLASSES
        self.inner = nets.build(
            "dense", seed, (inputs,), PIXELS + CLASSES, hidden=(hidden,), torus=(CONTEXTS,), gates=gates
        )
        nn.init.zeros_(self._head.weight[CLASSES:])
        self.generator = own_generator()
        self.solver: Spiking | None = None
        self.events, self.steps, self.denoised = 0.0, 0.0, 0
        self._clean: Tensor | None = None

    @property
    def _head(self) -> nn.Linear:
        assert isinstance(self.inner.head, nn.Linear)
        return self.inner.head

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Fit the filter to training images, and show the torus a stream of them whose noise falls."""
        self.filter.observe(x)
        if self.inner.context.mode == "off":
            return
        low, high = (math.log(s) for s in SPAN)
        for i in range(CONTEXTS):
            level = math.exp(high - (high - low) * i / (CONTEXTS - 1))
            for _ in range(BLOCK):
                part = x[torch.randint(len(x), (BATCH,), generator=self.generator)]
                noisy = part + level * drawn_like(part, self.generator)
                self.inner.context.observe(self._inputs(self.filter(Seen(noisy, part.new_full((BATCH,), level)))))

    def _inputs(self, seen: Seen) -> Tensor:
        assert seen.level is not None
        level = LevelFeatures.waves(seen.level.to(seen.x.dtype))
        named = seen.x.new_zeros(len(seen.x), CLASSES)
        if seen.labels is not None:
            named = F.one_hot(seen.labels.clamp_min(0), CLASSES).to(named) * (seen.labels >= 0)[:, None]
        return torch.cat([views(seen).flatten(1), level, named], 1)

    def _answer(self, seen: Seen) -> Tensor:
        if self.solver is None or self.training:
            return self.inner(self._inputs(seen))
        given = self._inputs(seen)
        out, run = self.inner.spike(given, self.solver)
        self.events += sum(float(s.sum()) for s in run.spikes.values())
        self.steps, self.denoised = self.steps + float(run.steps.sum()), self.denoised + len(given)
        return out

    def denoise(self, given: Seen) -> Tensor:
        """The denoised images, of the shape of the input."""
        seen = self.filter(given)
        return self.filter.restored(seen, self._answer(seen)[:, CLASSES:].view_as(seen.x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)`` of images ``(B, 1, 28, 28)``."""
        self._clean = x if self.training else None
        return self._answer(self.filter(x))[:, :CLASSES]

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross entropy; in training also the denoising cost of the latest batch, at one level of noise."""
        total = F.cross_entropy(logits, y)
        x, self._clean = self._clean, None
        if x is None or len(x) != len(y):
            return total
        low, high = (math.log(s) for s in SPAN)
        level = math.exp(low + (high - low) * float(torch.rand((), generator=self.generator)))
        one = (level, level * (1 + 1e-6))
        return total + denoising_cost(self.denoise, self.filter.left, x, y, one, self.generator)


def trained(trial: Trial, size: Size, data: Dataset) -> tuple[DiffTorEqProp | GatedDenoiser, fitting.Progress]:
    """The network of a side after its training."""
    if trial.side == DENSE:
        net: DiffTorEqProp | GatedDenoiser = denoisers.build(
            trial.seed, hidden=(size.hidden,), denoising=1.0, span=SPAN, settings="fast"
        )
    else:
        torch.manual_seed(trial.seed)
        net = GatedDenoiser(size.hidden, "off" if trial.side == OPEN else "probabilistic", trial.seed)
    net.observe(data.inputs("train", slice(None)))
    plan = fitting.Plan(size.epochs, BOUNDED if trial.side == DENSE else RATE, BATCH, tests=1, clip=5.0)
    return net, fitting.fit(net, data, plan, seed=trial.seed, scratch=trial.scratch)


def drawn(net: DiffTorEqProp | GatedDenoiser, count: int, levels: int, seed: int) -> tuple[Tensor, float]:
    """Samples in [0, 1], and the processor time that they took."""
    assert net.filter is not None
    ring = Conveyor(
        lambda x, level, labels: net.denoise(Seen(x, level, labels)),
        (1, 28, 28),
        min(100, count),
        Anneal(levels=levels, high=SPAN[1], low=SPAN[0]),
        torch.Generator().manual_seed(seed),
        limit=math.ceil(count / min(100, count)),
        begin=net.filter.drawn,
    )
    started = time.process_time()
    with torch.no_grad():
        found = torch.cat(list(stream(ring)))[:count]
    return found.clamp(0, 1), time.process_time() - started


def run(trial: Trial) -> Outcome:
    """Train one side, and draw with few and with many levels."""
    size = SIZES[trial.budget.name]
    data = nets.digits(size.train, 500)
    net, at = trained(trial, size, data)
    if trial.side == SPIKES:
        assert isinstance(net, GatedDenoiser)
        net.solver = Spiking(max_steps=STEPS)
    reference = Moments.of(shipped().features(data.inputs("train", slice(None))))
    points, metrics = [], {}
    drawn(net, min(100, size.samples), LEVELS[0], trial.seed)  # warms up
    for levels in LEVELS:
        x, seconds = drawn(net, size.samples, levels, trial.seed)
        fid, each = digit_fid(x, reference), 1000 * seconds / size.samples
        points.append((each, fid))
        metrics[f"{FID}, {levels} levels"] = Quantity(fid, "")
        metrics[f"{TIME}, {levels} levels"] = Quantity(each, "s")
        found = torch.bincount(classes_found(x), minlength=CLASSES)
        metrics[f"classes among the samples, {levels} levels"] = Quantity(float((found >= 0.02 * len(x)).sum()), "")
    metrics |= _of_dense(trial, size, data, points)
    metrics["accuracy"] = Quantity(fitting.accuracy(net, *_tested(data)), "%")
    if isinstance(net, GatedDenoiser):
        metrics["contexts"] = Quantity(float(net.inner.context.contexts), "")
        if net.denoised:
            metrics["steps of a denoising"] = Quantity(net.steps / net.denoised, "")
            metrics["spikes of a denoising"] = Quantity(net.events / net.denoised, "")
    cost = Cost(sum(p.numel() for p in net.parameters()), None, at.samples)
    notes = (f"training ended early: {at.diverged}",) if at.diverged else ()
    return Outcome(metrics, {FID: points}, cost, notes)


def _of_dense(trial: Trial, size: Size, data: Dataset, points: list[tuple[float, float]]) -> dict[str, Quantity]:
    """How many times as fast as the dense network at the least distance that both reach; both are timed here, one after
    the other in one process."""
    if trial.side == DENSE:
        return {}
    other, _ = trained(replace(trial, side=DENSE, scratch=trial.scratch / "dense"), size, data)
    reference = Moments.of(shipped().features(data.inputs("train", slice(None))))
    dense = []
    drawn(other, min(100, size.samples), LEVELS[0], trial.seed)  # warms up
    for levels in LEVELS:
        x, seconds = drawn(other, size.samples, levels, trial.seed)
        dense.append((1000 * seconds / size.samples, digit_fid(x, reference)))
    aim = max(min(f for _, f in points), min(f for _, f in dense))
    own, theirs = (min(s for s, f in which if f <= aim) for which in (points, dense))
    return {SPEED: Quantity(theirs / own, ""), "digit FID that both reach": Quantity(aim, "")}


def _tested(data: Dataset) -> tuple[Tensor, Tensor]:
    return data.inputs("test", slice(None)), data.test_y


CLAIM = Claim(
    id="H7",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="Gates and spikes draw digits twice as fast as a dense network, at equal quality.",
    criteria=(
        Criterion(
            "gates: speed at equal distance", SPEED, "", "at_least", GATED, target=2.0, words="2x", scale="log",
            beside=(OPEN,),
        ),
        Criterion(
            "spikes: speed at equal distance", SPEED, "", "at_least", SPIKES, target=2.0, words="2x", scale="log"
        ),
        Criterion(
            "distance at 25 levels beside the dense network", f"{FID}, 25 levels", "", "at_most", GATED,
            versus=(DENSE,), beside=(OPEN, SPIKES), words="equal FID",
        ),
    ),
    protocol=f"""
    MNIST ({SIZES["quick"].train:,} images at quick, {SIZES["full"].train:,} at full), {SIZES["quick"].epochs:g} epochs
    in batches of {BATCH}, Adam at {RATE:g} ({BOUNDED:g} for DiffTorEqProp, whose couplings are bounded) with a half
    cosine. All sides stand behind the same linear filter and learn what it misses of noise of {SPAN[0]:g} to
    {SPAN[1]:g}, half of the time without the class, beside the classes of clean images. Hidden layers have
    {SIZES["quick"].hidden} units ({SIZES["full"].hidden} at full). DiffTorEqProp's settles with the visible node;
    HTSEP's settles under lateral couplings and is read out linearly. Of its units half are open in each of
    up to {CONTEXTS} contexts, which open on a stream of falling noise and are inferred from what the network sees; in
    training each batch has one noise level.
    Spikes run at most {STEPS} steps or to a residual of 0.01. Samples
    ({SIZES["quick"].samples} and {SIZES["full"].samples:,}) come from rings of {", ".join(map(str, LEVELS))} levels. Of
    each side the shortest processor time is taken at which it is within the larger of both least digit FIDs (the
    distance of D4); speed is that of the dense network over the side's, both timed in one process on one thread.
    Closed units are multiplied by zero here, so that the processor saves nothing by them: only hardware that skips them
    would.
    """,
    sides=SIDES,
    run=run,
    picture=Picture("Distance of the samples by time", "processor time of 1,000 samples (s)", "digit FID", (FID,),
                    log_x=True),
    exclusive=True,
)  # fmt: skip
