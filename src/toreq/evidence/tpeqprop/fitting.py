"""Training on images: as many epochs as a side is allowed, or as its processor time holds; resumable at every test."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toreq.data import Batches, Dataset
from toreq.diagnostics.gradients import criterion
from toreq.diagnostics.relaxation import predictions
from toreq.errors import ConfigError, DivergenceError
from toreq.evidence import counting, resuming
from toreq.layer import equilibria
from toreq.training import rng
from toreq.training.interrupt import Interrupted, StopRequest

TIMED, WARMED = 3, 1
"""Steps that are timed before a training, and steps before them."""


@dataclass(frozen=True)
class Plan:
    """How a side is trained; the same for all sides but for what is tuned.

    Attributes:
        epochs: the most.
        rate: Adam's; it falls as a half cosine to 0 over the steps that are run, after rising over the first ones.
        batch: images in a step.
        seconds: of processor time, by which the steps are limited before they begin; None for no limit.
        clocked: limit them by the time that they take instead, which changes while a network learns: the rate follows
            the share of `seconds` that is used up, and the training ends with it.
        tests: in an epoch, at equal distances.
        tested: test images that these use, the same ones for every side and seed.
        warmup: share of the steps over which the rate rises.
        clip: largest norm of the gradient.
        decay: of the weights, decoupled from the gradient (AdamW).
        save_every: seconds from one saving to the next; 0 saves after every step.
    """

    epochs: float
    rate: float
    batch: int = 100
    seconds: float | None = None
    tests: int = 4
    tested: int = 2000
    warmup: float = 0.05
    clip: float = 1.0
    decay: float = 0.0
    save_every: float = 30.0
    clocked: bool = False

    def __post_init__(self) -> None:
        if self.clocked and self.seconds is None:
            raise ConfigError("Plan: expected seconds of a clocked plan, got None; give them, or leave clocked out")


@dataclass
class Progress:
    """Where a training is.

    Attributes:
        step, steps: done and planned.
        samples: seen.
        curve: (epochs, test accuracy in percent).
        marks: (epochs, what a watcher measured).
        diverged: why it ended early, empty where it did not.
        seconds: of the processor in training steps.
        resumed: how often it was gone on with.
    """

    step: int = 0
    steps: int = 0
    samples: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)
    marks: list[tuple[float, float]] = field(default_factory=list)
    diverged: str = ""
    seconds: float = 0.0
    resumed: int = 0

    @property
    def best(self) -> float:
        """The best accuracy of all tests, 0 without one."""
        return max((accuracy for _, accuracy in self.curve), default=0.0)

    def epochs_to(self, threshold: float) -> float | None:
        """Epochs after which a test first was as good as this; None if none was."""
        return next((epoch for epoch, accuracy in self.curve if accuracy >= threshold), None)


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of images classified correctly, 0 where the state is not finite."""
    try:
        found = predictions(net, x)
    except DivergenceError:
        return 0.0
    return 100 * float((found == y).double().mean())


def fit(
    net: nn.Module,
    data: Dataset,
    plan: Plan,
    *,
    seed: int,
    scratch: Path | None = None,
    watch: Callable[[nn.Module], float] | None = None,
) -> Progress:
    """Train a network in place by Adam and leave it in evaluation mode.

    A training that diverges (a state, loss or gradient that is no longer finite) ends there and says so. With a scratch
    folder an interrupted one goes on.

    Args:
        net: from images to logits.
        data: what it is trained on and tested on.
        plan: how.
        seed: of the order.
        scratch: the folder; None keeps nothing.
        watch: measures the network at every test.

    Raises:
        CheckpointError: the folder holds another training.
        Interrupted: after SIGINT or SIGTERM, when all is saved.
    """
    device = next(net.parameters()).device
    batches = Batches(*data.split("train"), plan.batch, seed=seed, device=device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=plan.rate, weight_decay=plan.decay)
    folder = None if scratch is None else scratch / "training"
    identity = {"plan": asdict(plan), "seed": seed, "parameters": counting.parameters(net)}
    at = _resumed(folder, identity, net, optimizer)
    if not at.steps:
        at.steps = _planned(net, batches, plan)
    # drawn at random: the first ones of MNIST's test set are harder than the others
    drawn = torch.Generator().manual_seed(0)
    shown = data.limit(None, min(plan.tested, len(data.test_y)), drawn)
    x, y = shown.inputs("test", slice(None)).to(device), shown.test_y.to(device)
    every = max(1, len(batches) // plan.tests)
    saved = time.monotonic()
    with StopRequest() as stop:
        while _share(plan, at) < 1 and not at.diverged:
            epoch, start = divmod(at.step, len(batches))
            for images, labels in batches.epoch(epoch, start=start):
                at.diverged = _step(net, optimizer, images, labels, plan, at)
                if at.diverged or _share(plan, at) >= 1:
                    break
                if at.step % every == 0:
                    _test(net.eval(), x, y, at, at.step / len(batches), watch)
                stopping = stop.signal is not None
                if folder is not None and (stopping or time.monotonic() - saved >= plan.save_every):
                    resuming.save(folder, identity, net, optimizer, asdict(at))
                    saved = time.monotonic()
                if stopping:
                    raise Interrupted(f"stopped at step {at.step} of {at.steps}; the same call goes on")
    net.eval()
    if not at.curve or at.curve[-1][0] < at.step / len(batches):
        _test(net, x, y, at, at.step / len(batches), watch)
    return at


def _test(
    net: nn.Module, x: Tensor, y: Tensor, at: Progress, epochs: float, watch: Callable[[nn.Module], float] | None
) -> None:
    at.curve.append((epochs, accuracy(net, x, y)))
    if watch is not None:
        at.marks.append((epochs, watch(net)))


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, plan: Plan, at: Progress) -> str:
    """One step; returns why it could not be made."""
    started = time.process_time()
    share, first = _share(plan, at), 1 / max(1, at.steps)
    factor = (share + first) / plan.warmup if share < plan.warmup else 0.5 * (1 + math.cos(math.pi * share))
    for group in optimizer.param_groups:
        group["lr"] = plan.rate * factor
    net.train()
    optimizer.zero_grad()
    try:
        loss = criterion(net)(net(x), y)
        loss.backward()
    except DivergenceError as error:
        return str(error)
    norm = nn.utils.clip_grad_norm_(net.parameters(), plan.clip)
    if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
        return f"loss {float(loss.detach()):g}, norm of the gradient {float(norm):g}"
    optimizer.step()
    at.step, at.samples = at.step + 1, at.samples + len(y)
    at.seconds += time.process_time() - started
    return ""


def _share(plan: Plan, at: Progress) -> float:
    """How much of a training is done."""
    done = at.step / at.steps
    return max(done, at.seconds / plan.seconds) if plan.clocked and plan.seconds else done


def _planned(net: nn.Module, batches: Batches, plan: Plan) -> int:
    """Steps of all epochs, or those that the processor time holds, by timing some on a copy."""
    wanted = max(1, round(plan.epochs * len(batches)))
    if plan.seconds is None or plan.clocked:
        return wanted
    with rng.preserved(net):
        twin = copy.deepcopy(net)
        optimizer = torch.optim.Adam(twin.parameters(), lr=1e-9)
        probe = Progress(steps=TIMED + WARMED)
        for x, y in islice(batches.epoch(0), TIMED + WARMED):
            if probe.step == WARMED:
                probe.seconds = 0.0
            if _step(twin, optimizer, x, y, Plan(1, 1e-9), probe):
                return wanted  # it will diverge, which is what is to be seen
    per_step = probe.seconds / max(1, probe.step - WARMED)
    return max(1, min(wanted, int(plan.seconds / max(per_step, 1e-9))))


def _resumed(
    folder: Path | None, identity: dict[str, Any], net: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    values = resuming.restored(folder, "fit", identity, net, optimizer)
    if values is None:
        return Progress()
    # JSON has no tuples
    curves = {name: [(float(x), float(y)) for x, y in values[name]] for name in ("curve", "marks")}
    at = Progress(**{**values, **curves})
    at.resumed += 1
    return at


def held_out(data: Dataset, share: float = 0.2) -> Dataset:
    """The data with the last of its training images in the place of its test images, which are gone."""
    cut = round((1 - share) * len(data.train_y))
    return replace(
        data,
        train_x=data.train_x[:cut],
        train_y=data.train_y[:cut],
        test_x=data.train_x[cut:],
        test_y=data.train_y[cut:],
    )


def step_flops(net: nn.Module, data: Dataset, batch: int = 8) -> float:
    """Operations of a training step for one image; 0 for a network whose state is not finite."""
    twin = copy.deepcopy(net).cpu().train()
    x, y = data.inputs("train", slice(0, batch)), data.train_y[:batch]
    for layer in equilibria(twin):
        layer.warn = False

    def step() -> None:
        with torch.enable_grad():
            criterion(twin)(twin(x), y).backward()

    try:
        return counting.flops(step) / batch
    except DivergenceError:
        return 0.0
