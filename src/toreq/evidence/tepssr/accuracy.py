"""S3: sequential MNIST with few parameters, in rows and pixel by pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toreq.data import Dataset, seeded
from toreq.data.sequences import sequential_mnist
from toreq.diagnostics.relaxation import couplings_off
from toreq.estimators import Implicit
from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.protocols.sequences import models
from toreq.evidence.tepssr import nets
from toreq.evidence.tpeqprop import fitting
from toreq.evidence.tpeqprop.fitting import Plan
from toreq.layer import equilibria
from toreq.systems.tepssr_nets import StateSpaceClassifier
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

MOST_PARAMETERS, CLASSES, PIXELS = 50_000, 10, 784
PERMUTATION = 3
"""Key of the permutation's random stream; the same for all sides and seeds."""
RATE, TRIALS, BATCH = 4e-3, 3, 64
SPACE = Space({"rate": Real(1e-3, 1.5e-2, log=True)})
ACCURACY, PARAMETERS = "accuracy", "parameters"
ROWS: dict[str, Any] = {"features": 64, "hidden": 96, "states": 2, "window": 4}
"""Of the network on rows; time-invariant maps and no attention, as on pixels. A token is made of the last four rows."""
POINTS: dict[str, Any] = {"features": 32, "hidden": 64, "states": 4, "window": 57, "pool": 28}
"""On pixels in reading order, a token for each: made of those of two rows up to it, by a convolution that looks back as
Mamba's short one does, only longer."""
PERMUTED: dict[str, Any] = {"features": 32, "hidden": 64, "states": 4, "window": 4, "pool": 14}
"""On permuted pixels, whose neighbours say little."""
SMALL: dict[str, Any] = {"features": 8, "hidden": 8, "layers": 1, "pool": 2}


@dataclass(frozen=True)
class Task:
    """A way of reading the digits.

    Attributes:
        chunk: pixels at each position.
        permuted: shuffled, all images alike.
        options: of the network.
        seeds: prescribed.
        sides: trained on it.
        aim: accuracy.
        seconds: of processor time of a training in a full run.
        words: for the tables.
    """

    chunk: int
    permuted: bool
    options: Mapping[str, Any]
    seeds: int
    sides: tuple[str, ...]
    aim: float
    seconds: float
    words: str


TASKS = {
    "rows": Task(
        28, False, ROWS, 5, (nets.OWN, nets.IMPLICIT, nets.FORWARD, nets.LOOPED_BP, nets.LSTM, nets.DIAGONAL), 99.0,
        220.0, "28 rows of 28 pixels",
    ),
    "pixels": Task(1, False, POINTS, 1, (nets.OWN, nets.DIAGONAL), 99.0, 3600.0, "784 pixels"),
    "permuted": Task(1, True, PERMUTED, 1, (nets.OWN, nets.DIAGONAL), 97.5, 1300.0, "784 permuted pixels"),
}  # fmt: skip
SIDES = {f"{name} {side}": f"{task.words}: {nets.WORDS[side]}" for name, task in TASKS.items() for side in task.sides}


@dataclass(frozen=True)
class Size:
    """Images for training and test, most epochs, and the share of a task's seconds of a training and of a trial."""

    train: int
    test: int
    epochs: float
    share: float
    trial: float


SIZES = {
    "smoke": Size(32, 20, 1, 0.0005, 0.0002),
    # both pixel tasks and five seeds of six sides on rows fit in six minutes
    "quick": Size(5000, 2000, 2, 0.03, 0.005),
    "full": Size(60_000, 10_000, 20, 1.0, 0.06),
}


class Scanned(nn.Module):
    """A model of sequences on images, whose pixels are read one after the other, ``(B, 1, 28, 28)`` to ``(B, C)``.

    Args:
        inner: from ``(B, N, chunk)`` to logits ``(B, C)``, or ``(B, N, C)`` whose last or mean is taken.
        chunk: pixels at each position.
        permuted: shuffle them, all images alike.
    """

    order: Tensor

    def __init__(self, inner: nn.Module, chunk: int, permuted: bool) -> None:
        super().__init__()
        self.inner, self.chunk = inner, chunk
        order = torch.randperm(PIXELS, generator=seeded(PERMUTATION)) if permuted else torch.arange(PIXELS)
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        out = self.inner(x.flatten(1)[:, self.order].unflatten(1, (-1, self.chunk)))
        if out.dim() == 2:
            return out
        return out[:, -1] if getattr(self.inner, "pool", "mean") == "last" else out.mean(1)


def build(name: str, side: str, seed: int, small: bool) -> Scanned:
    """The model of a side on a task, freshly drawn; baselines with as many parameters as the network has."""
    task = TASKS[name]
    chunk = 196 if small else task.chunk
    options: dict[str, Any] = {"selective": False, "attention": "none", **(SMALL if small else task.options)}
    torch.manual_seed(seed)
    estimator = Implicit() if side == nets.IMPLICIT else None
    net = StateSpaceClassifier((PIXELS // chunk, chunk), CLASSES, estimator=estimator, **options)
    net.equilibrium.hasten()
    if side in (nets.OWN, nets.IMPLICIT):
        model: nn.Module = net
    elif side == nets.FORWARD:
        torch.manual_seed(seed)
        model = net.feedforward()
    else:
        # the sequences say what inputs and outputs are; the images themselves come later
        made = sequential_mnist(10, 10, chunk=chunk)
        model = models.build(nets.BASELINES[side], made, counting.parameters(net), seed)
    for layer in equilibria(model):
        layer.warn = False
    return Scanned(model, chunk, task.permuted)


def _plan(trial: Trial, task: Task, params: Mapping[str, Value], share: float) -> Plan:
    size = SIZES[trial.budget.name]
    rate = float(str(params.get("rate", RATE)))
    batch = trial.budget.pick(16, BATCH, BATCH)
    return Plan(size.epochs, rate, batch, share * task.seconds, tests=1 if size.epochs > 4 else 4, clocked=True)


def run(trial: Trial) -> Outcome:
    """Train one side on one task; an interrupted run goes on."""
    name, side = trial.side.split()
    size, small = SIZES[trial.budget.name], not trial.budget.conclusive
    data = shared.mnist(size.train, size.test)
    model = build(name, side, trial.seed, small).to(trial.device)
    plan = _plan(trial, TASKS[name], trial.tuned, size.share)
    at = fitting.fit(model, data, plan, seed=trial.seed, scratch=trial.scratch)
    x, y = data.inputs("test", slice(None)).to(trial.device), data.test_y.to(trial.device)
    parameters = counting.parameters(model)
    metrics = {
        ACCURACY: Quantity(fitting.accuracy(model, x, y), "%"),
        PARAMETERS: Quantity(float(parameters), ""),
        "epochs": Quantity(at.samples / len(data.train_y), "epochs"),
        "processor time": Quantity(at.seconds, "s"),
        "rate": Quantity(plan.rate, ""),
    }
    if side in (nets.OWN, nets.IMPLICIT):
        inner = model.inner
        assert isinstance(inner, StateSpaceClassifier)
        seen = x[:8].flatten(1)[:, model.order].unflatten(1, (-1, model.chunk))
        metrics["radius"] = Quantity(inner.radius(seen), "")
        with couplings_off(model):
            metrics["accuracy, couplings off"] = Quantity(fitting.accuracy(model, x, y), "%")
    flops = fitting.step_flops(model, data, 2) * at.samples
    notes = (*(("continued from a checkpoint",) if at.resumed else ()), *((at.diverged,) if at.diverged else ()))
    return Outcome(metrics, {name: list(at.curve)}, Cost(parameters, flops, at.samples), notes)


def held_out_accuracy(trial: Trial, params: Mapping[str, Value]) -> float:
    """Percent of held-out training images that are right after a short training."""
    name, side = trial.side.split()
    size, small = SIZES[trial.budget.name], not trial.budget.conclusive
    data: Dataset = fitting.held_out(shared.mnist(size.train, size.test).limit(size.train // 2, None))
    plan = replace(_plan(trial, TASKS[name], params, size.trial), epochs=1)
    model = build(name, side, trial.seed, small).to(trial.device)
    return fitting.fit(model, data, plan, seed=trial.seed, scratch=trial.scratch).curve[-1][1]


def _criteria() -> tuple[Criterion, ...]:
    found: list[Criterion] = []
    for name, task in TASKS.items():
        own = f"{name} {nets.OWN}"
        others = tuple(f"{name} {side}" for side in task.sides if side != nets.OWN)
        found.append(
            Criterion(
                f"{task.words}: accuracy", ACCURACY, "%", "at_least", own, words=">99% accuracy",
                target=99.0 if name != "permuted" else None, aim=task.aim, beside=others, seeds=task.seeds,
            )
        )  # fmt: skip
        found.append(
            Criterion(
                f"{task.words}: parameters", PARAMETERS, "", "at_most", own, words="with fewer parameters",
                aim=MOST_PARAMETERS, seeds=task.seeds,
            )
        )  # fmt: skip
    return tuple(found)


def _protocol() -> str:
    full, quick = SIZES["full"], SIZES["quick"]
    times = "; ".join(f"{name}: {t.seconds:g} seconds, {t.seeds} seeds" for name, t in TASKS.items())
    said = "; ".join(f"{name}: " + ", ".join(f"{k} {v}" for k, v in t.options.items()) for name, t in TASKS.items())
    return f"""
    MNIST digits as sequences: {PIXELS} pixels in reading order, the same permuted (one fixed permutation), and 28 rows.
    The network of TEP-SSR has time-invariant maps and no attention here ({said}; its window, of positions that a token
    is made of, is 4 on rows, and pool is the number of parts whose means are read, 7 there). Every baseline gets the
    width that brings it nearest to that number of parameters. The feed-forward twin has window and parts too; the LSTM,
    the diagonal state-space model and the looped transformer take position by position and are read out once, by the
    last state or the mean. Each side is trained until the same processor time is used up ({times}), or {full.epochs:g}
    epochs are; a quick run takes {100 * quick.share:g}% of that on {quick.train:,} images, at most {quick.epochs:g}
    epochs. Adam, batches of {BATCH}, the gradient's norm clipped to 1, a rate that rises over a twentieth of that time
    and falls as a cosine to 0 with what is left of it. That rate is tuned for each side in {TRIALS} trials of
    {100 * full.trial:g}% of the time ({100 * quick.trial:g}% quick), or an epoch, on four fifths of half the training
    images, judged by the last fifth. Accuracy is that of the last step on all test images. No augmentation. On pixels
    only the diagonal state-space model with backprop through time stands beside it: an LSTM and softmax attention would
    see a small part of an epoch in the same time.
    """


CLAIM = Claim(
    id="S3",
    system="tepssr",
    seed_file=nets.SEED_FILE,
    sentence="Sequential MNIST is learned to 99% with few parameters.",
    criteria=_criteria(),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture(
        "Sequential MNIST: test accuracy against epochs, rows", x_label="epochs", y_label="test accuracy (%)",
        curves=("rows",),
    ),
    printed=("radius", "accuracy, couplings off"),
    tuning=Tuning(held_out_accuracy, dict.fromkeys(SIDES, SPACE), TRIALS, {side: {"rate": RATE} for side in SIDES}),
)  # fmt: skip
