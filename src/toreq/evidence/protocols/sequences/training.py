"""Training on a task: a curve over the samples seen, resumable at every step without a change of numbers."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toreq.data import Batches, SequenceTask
from toreq.errors import ConfigError, DivergenceError
from toreq.evidence import counting, resuming
from toreq.evidence.protocols.sequences import scores
from toreq.layer import equilibria
from toreq.training.interrupt import Interrupted, StopRequest


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for all sides but for what is tuned.

    Attributes:
        steps: optimizer steps.
        batch: sequences in each.
        rate: Adam's; it rises to this over the first `warmup` steps and stays, so that a curve does not depend on when
            the training ends.
        threshold: of the metric; the samples needed to reach it are counted.
        evaluate_every: steps from one test to the next, the resolution of that count.
        tested: sequences of the test set that these tests use; all at the end.
        warmup: steps.
        clip: largest norm of the gradient.
        save_every: seconds from one saving to the next; 0 saves after every step.
    """

    steps: int
    batch: int
    rate: float
    threshold: float
    evaluate_every: int
    tested: int = 500
    warmup: int = 50
    clip: float = 1.0
    save_every: float = 30.0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.evaluate_every, self.tested) < 1 or not self.rate > 0:
            raise ConfigError(
                f"sequences.Recipe: expected positive steps, batch, evaluate_every, tested and rate, got {self}; "
                "use larger ones"
            )


@dataclass
class Progress:
    """Where a training is, and what it has shown.

    Attributes:
        step: steps done.
        seconds: of training, tests and savings left out, breaks too.
        processor: likewise, seconds of the processor, which do not depend on what runs beside.
        curve: (samples, metric) of every test, the first one before any step.
        losses: (samples, test loss), likewise.
        reached: samples after which the threshold was reached first, None before.
        relaxed: sum over steps of the mean number of relaxation steps, free and nudged.
        settled: likewise of the share of examples whose free phase settled.
        resumed: how often it was gone on with.
    """

    step: int = 0
    seconds: float = 0.0
    processor: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)
    reached: int | None = None
    relaxed: float = 0.0
    settled: float = 0.0
    resumed: int = 0


def train(
    model: nn.Module,
    task: SequenceTask,
    recipe: Recipe,
    *,
    seed: int,
    scratch: Path | None = None,
    device: torch.device | str = "cpu",
    watch: Callable[[Progress], None] | None = None,
    cooldown: float = 0.0,
) -> Progress:
    """Train a model in place by Adam.

    The order of the sequences depends on (seed, epoch) alone. With a scratch folder, weights, optimizer, generators and
    curve are kept there, and a training that was cut off goes on at the step that was saved last; on one thread its
    numbers are those of an unbroken one (seconds aside).

    Args:
        model: maps the task's inputs to (B, N, C), or to (B, C) where a sequence has one target.
        task: what is learned.
        recipe: how.
        seed: of the order.
        scratch: the folder; None keeps nothing.
        device: where the model is.
        watch: called after every test.
        cooldown: share of the steps, the last ones, over which the rate falls linearly to 0; for a claim about what is
            learned in the end, and not about a curve.

    Raises:
        ConfigError: a cooldown outside [0, 1].
        DivergenceError: the loss is no longer finite.
        CheckpointError: the folder holds another training.
        Interrupted: after SIGINT or SIGTERM, when all is saved.
    """
    if not 0 <= cooldown <= 1:
        raise ConfigError(f"sequences.train: expected a cooldown in [0, 1], got {cooldown}; e.g. 0.5")
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.rate)
    folder = None if scratch is None else scratch / "training"
    identity = {"task": task.variant, "recipe": asdict(recipe), "seed": seed, "model": type(model).__name__}
    if cooldown:
        identity["cooldown"] = cooldown
    at = _resumed(folder, identity, model, optimizer)
    number = torch.arange(len(task.train))
    batches = Batches(number, number, recipe.batch, seed=seed, drop_last=len(number) >= recipe.batch)
    saved = time.monotonic()
    with StopRequest() as stop:
        if not at.curve:
            _test(model, task, recipe, at, device, watch)
        while at.step < recipe.steps:
            epoch, start = divmod(at.step, len(batches))
            for index, _ in batches.epoch(epoch, start=start):
                left = (recipe.steps - at.step) / (cooldown * recipe.steps) if cooldown else 1.0
                rate = recipe.rate * min(1.0, (at.step + 1) / max(1, recipe.warmup), left)
                _step(model, task, recipe, rate, at, optimizer, index, device)
                if at.step % recipe.evaluate_every == 0 or at.step == recipe.steps:
                    _test(model, task, recipe, at, device, watch)
                stopping = stop.signal is not None
                if folder is not None and (stopping or time.monotonic() - saved >= recipe.save_every):
                    resuming.save(folder, identity, model, optimizer, asdict(at))
                    saved = time.monotonic()
                if stopping:
                    raise Interrupted(
                        f"stopped at step {at.step} of {recipe.steps}"
                        + ("; nothing is kept" if folder is None else ", which is kept; the same call goes on")
                    )
                if at.step == recipe.steps:
                    break
    if folder is not None:
        resuming.save(folder, identity, model, optimizer, asdict(at))
    return at


def _step(
    model: nn.Module,
    task: SequenceTask,
    recipe: Recipe,
    rate: float,
    at: Progress,
    optimizer: torch.optim.Optimizer,
    index: torch.Tensor,
    device: torch.device | str,
) -> None:
    started, worked = time.perf_counter(), time.process_time()
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    batch = task.batch(task.train, index, device)
    loss = scores.loss(task, scores.read_out(model, task, batch), batch)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    if not bool(torch.isfinite(norm) & torch.isfinite(loss)):
        raise DivergenceError(
            f"sequences.train: expected a finite loss and gradient, got {float(loss.detach())}, {float(norm)} at step "
            f"{at.step + 1}; use a lower rate than {recipe.rate:g}"
        )
    optimizer.step()
    at.step += 1
    at.seconds += time.perf_counter() - started
    at.processor += time.process_time() - worked
    for layer in equilibria(model):
        free, nudged = layer.last.free, layer.last.nudged
        assert free is not None
        at.settled += float(free.converged.double().mean())
        at.relaxed += float(free.steps.double().mean()) + (
            0.0 if nudged is None else float(nudged.steps.double().mean())
        )


def _test(
    model: nn.Module,
    task: SequenceTask,
    recipe: Recipe,
    at: Progress,
    device: torch.device | str,
    watch: Callable[[Progress], None] | None,
) -> None:
    score = scores.evaluate(model, task, task.test.first(recipe.tested), device=device)
    samples = at.step * recipe.batch
    at.curve.append((float(samples), score.metric))
    at.losses.append((float(samples), score.loss))
    if at.reached is None and scores.reached(task, score.metric, recipe.threshold):
        at.reached = samples
    if watch is not None:
        watch(at)


def _resumed(
    folder: Path | None, identity: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    values = resuming.restored(folder, "sequences.train", identity, model, optimizer)
    if values is None:
        return Progress()
    # JSON has no tuples
    curves = {name: [(float(x), float(y)) for x, y in values[name]] for name in ("curve", "losses")}
    at = Progress(**{**values, **curves})
    at.resumed += 1
    return at


def flops_per_sample(model: nn.Module, task: SequenceTask, batch: int = 4) -> float:
    """Operations of a training step for one sequence: those that torch counts, and three times (forward, and twice that
    backward) the ``uncounted_flops(length)`` that a model says it has beside them."""
    twin = copy.deepcopy(model).cpu().train()
    chosen = task.batch(task.train, slice(0, batch))

    def step() -> None:
        with torch.enable_grad():
            scores.loss(task, scores.read_out(twin, task, chosen), chosen).backward()

    with warnings.catch_warnings():
        # torch names a setting of other devices whenever these flags are set
        warnings.filterwarnings("ignore", message="TF32 acceleration")
        # the fused recurrent kernels have no formula; their plain form has
        with torch.backends.mkldnn.flags(enabled=False):
            counted = counting.flops(step) / len(chosen.x)
    uncounted = getattr(twin, "uncounted_flops", None)
    return counted + (0.0 if uncounted is None else 3 * uncounted(task.length))
