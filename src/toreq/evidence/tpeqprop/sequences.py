"""T6: samples to a threshold on sequences, against backprop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toreq.data import SequenceTask, sequence_task
from toreq.estimators import Implicit
from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.protocols.sequences import plans, scores
from toreq.evidence.protocols.sequences.looped import Looped
from toreq.evidence.protocols.sequences.parts import Embedding
from toreq.evidence.protocols.sequences.training import Recipe, flops_per_sample, train
from toreq.evidence.tpeqprop import nets
from toreq.systems.tpeqprop import chain
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

HOW = {
    nets.OWN: "transformer blocks as a chain of levels, one nudged phase",
    nets.FORWARD: "backprop through the same blocks",
    nets.IMPLICIT: "the implicit gradient of the same chain",
    nets.CENTERED: "the looped transformer, tied and symmetric, centered EqProp, fast settings",
}
WIDTH, HEADS, BLOCKS, BATCH, TESTS = 32, 4, 2, 32, 40
RATE, TRIALS = 2e-3, 3
SPACE = Space({"rate": Real(5e-4, 2e-2, log=True)})
SAVED, WORDS = 0.2, ">20-50% sample efficiency gain on sequence tasks"
"""The least share of samples that the seed claims to be saved."""


@dataclass(frozen=True)
class Task:
    """A task: its threshold, and its options and steps at each budget."""

    threshold: float
    options: Mapping[str, dict[str, Any]]
    steps: Mapping[str, int]


_SMALL = {"train": 16, "test": 8}
TASKS = {
    "copy": Task(
        95.0,
        {
            "smoke": {**_SMALL, "length": 3},
            "quick": {"train": 20_000, "test": 1000, "length": 5},
            "full": {"train": 40_000, "test": 1000, "length": 10},
        },
        {"smoke": 2, "quick": 200, "full": 600},
    ),
    "adding": Task(
        90.0,
        {
            "smoke": {**_SMALL, "length": 6},
            "quick": {"train": 20_000, "test": 1000, "length": 10},
            "full": {"train": 40_000, "test": 1000, "length": 20},
        },
        {"smoke": 2, "quick": 300, "full": 1000},
    ),
    "text": Task(
        3.2,
        {"quick": {"length": 32, "test": 200}, "full": {"length": 64, "test": 200}},
        {"smoke": 2, "quick": 200, "full": 1000},
    ),
}


class Block(nn.Module):
    """PyTorch's own pre-norm encoder layer; a position sees no later ones where the task is causal.

    Args:
        width: of a token.
        causal: whether it is.
    """

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.inner = nn.TransformerEncoderLayer(
            width, HEADS, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )

    def forward(self, h: Tensor) -> Tensor:
        """The next level ``(B, N, D)``."""
        if not self.causal:
            return self.inner(h)
        future = nn.Transformer.generate_square_subsequent_mask(h.shape[1], device=h.device, dtype=h.dtype)
        return self.inner(h, src_mask=future, is_causal=True)


class Reader(nn.Module):
    """Blocks between an embedding and a read-out of every token: ``(B, N)`` or ``(B, N, F)`` to ``(B, N, C)``.

    Args:
        made: the task.
        how: a key of `HOW` but that of the looped transformer.
        width: of a token.
    """

    pool = "mean"

    def __init__(self, made: SequenceTask, how: str, width: int) -> None:
        super().__init__()
        embed = Embedding(made, width, positioned=True)
        blocks = [Block(width, made.causal) for _ in range(BLOCKS)]
        self.inner: nn.Module = nn.Sequential(embed, *blocks)
        if how != nets.FORWARD:
            estimator = Implicit() if how == nets.IMPLICIT else None
            example = made.batch(made.train, slice(0, 1)).x
            layer = chain(embed, *blocks, example=example, estimator=estimator)
            layer.warn = False
            self.inner = layer
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, made.outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


def build(how: str, made: SequenceTask, width: int, seed: int, device: str = "cpu") -> nn.Module:
    """A side's model, freshly drawn; sides of the same blocks begin with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if how != nets.CENTERED:
            return Reader(made, how, width).to(device)
        embed = Embedding(made, width, positioned=True)
        model = Looped(
            embed, width, HEADS, 2 * width, made.outputs, made.length, causal=made.causal, implicit=False
        )  # fmt: skip
        return model.to(device)


def task(name: str, trial: Trial) -> SequenceTask:
    """The sequences of one task; generated ones are drawn anew for each seed. A smoke run takes copying, causal, in the
    place of text, which does not come with the package."""
    if name == "text" and trial.budget.name == "smoke":
        return replace(sequence_task("copy", **TASKS["copy"].options["smoke"], seed=trial.seed), causal=True)
    seeded = {} if name == "text" else {"seed": trial.seed}
    return sequence_task(name, **TASKS[name].options[trial.budget.name], **seeded)


def _recipe(trial: Trial, name: str, params: Mapping[str, Value], share: int = 1) -> Recipe:
    steps = max(1, TASKS[name].steps[trial.budget.name] // share)
    rate = float(str(params.get("rate", RATE)))
    batch, every = trial.budget.pick(4, BATCH, BATCH), max(1, steps // TESTS)
    return Recipe(steps, batch, rate, TASKS[name].threshold, every, warmup=min(50, steps))


def _width(trial: Trial) -> int:
    return trial.budget.pick(8, WIDTH, WIDTH)


def run(trial: Trial) -> Outcome:
    """Train one side on one task; an interrupted run goes on."""
    name, how = trial.side.split()
    made = task(name, trial)
    recipe = _recipe(trial, name, trial.tuned)
    model = build(how, made, _width(trial), trial.seed, trial.device)
    at = train(model, made, recipe, seed=trial.seed, scratch=trial.scratch, device=trial.device)
    score = scores.evaluate(model, made, made.test, device=trial.device)
    samples = at.step * recipe.batch
    spent = max(recipe.batch, samples if at.reached is None else at.reached)
    unit = scores.unit(made)
    metrics = {
        made.metric: Quantity(score.metric, unit),
        "samples to threshold": Quantity(at.reached, "samples"),
        "log samples to threshold": Quantity(math.log(spent), "ln samples"),
        "threshold reached": Quantity(float(at.reached is not None), ""),
        "threshold": Quantity(recipe.threshold, unit),
        "rate": Quantity(recipe.rate, ""),
        "processor time": Quantity(at.processor, "s"),
    }
    cost = Cost(counting.parameters(model), flops_per_sample(model, made) * samples, samples)
    notes = (made.variant, *(("continued from a checkpoint",) if at.resumed else ()))
    return Outcome(metrics, {name: list(at.curve)}, cost, notes)


def held_out_loss(trial: Trial, params: Mapping[str, Value]) -> float:
    """Minus the loss on held-out training sequences after a third of the training with ``params``."""
    name, how = trial.side.split()
    made = plans.held_out(task(name, trial), seed=trial.seed)
    recipe = _recipe(trial, name, params, share=3)
    recipe = replace(recipe, evaluate_every=recipe.steps)
    model = build(how, made, _width(trial), trial.seed, trial.device)
    return -train(model, made, recipe, seed=trial.seed, scratch=trial.scratch, device=trial.device).losses[-1][1]


# a symmetric coupling cannot be causal: no energy of EqProp for text
SIDES = {
    f"{name} {how}": words
    for name in TASKS
    for how, words in HOW.items()
    if (name, how) != ("text", nets.CENTERED)
}  # fmt: skip


def _criteria() -> tuple[Criterion, ...]:
    found: list[Criterion] = []
    for name in TASKS:
        own, forward = f"{name} {nets.OWN}", f"{name} {nets.FORWARD}"
        others = tuple(s for s in SIDES if s.startswith(f"{name} ") and s not in (own, forward))
        found.append(
            Criterion(
                f"{name}: log of samples to threshold, against backprop", "log samples to threshold", "ln samples",
                "at_most", own, target=math.log(1 - SAVED), words=WORDS, versus=(forward,), beside=others,
            )
        )  # fmt: skip
        found.append(
            Criterion(
                f"{name}: backprop reaches the threshold", "threshold reached", "", "at_least", forward, target=1.0,
                condition=True,
            )
        )  # fmt: skip
    return tuple(found)


def _protocol() -> str:
    said = "; ".join(
        f"{name}: threshold {t.threshold:g}, " + ", ".join(
            f"{budget} {t.options[budget]} and {t.steps[budget]:,} steps" for budget in ("quick", "full")
        )
        for name, t in TASKS.items()
    )  # fmt: skip
    return f"""
    Copying, adding and character-level text (Tiny Shakespeare) with {BLOCKS} transformer blocks of {WIDTH} features and
    {HEADS} heads (PyTorch's own encoder layers, sines and cosines of the position, causal for text), as levels of a
    chain or plainly one after the other, with the same weights at the start. {said}. Thresholds are percent of targets
    (copy), percent of numbers within 0.04 (adding) and bits per character (text). Batches of {BATCH}, Adam, the
    gradient's norm clipped to 1, a rate that rises over 50 steps and stays. That rate is tuned for each side and task
    in {TRIALS} trials of a third of the steps, judged by the loss on a tenth of the training sequences. The metric is
    the number of training samples at the first of {TESTS} tests (500 sequences) that reaches the threshold, all of them
    where none does; compared are logarithms, paired by seed: {math.log(1 - SAVED):.3f} is a fifth fewer samples. A task
    counts only where backprop reaches its threshold. EqProp has no causal energy, so text has no such side. On a
    chain the two gradients are the same up to rounding, so that a difference can only come from tuning and rounding. A
    smoke run copies under a causal mask instead of reading text.
    """


CLAIM = Claim(
    id="T6",
    system="tpeqprop",
    seed_file=nets.SEED_FILE,
    sentence="Sequence tasks are learned from a fifth to half fewer samples than by backprop.",
    criteria=_criteria(),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture(
        "Copying: accuracy against training sequences", x_label="sequences", y_label="test accuracy (%)",
        curves=("copy",),
    ),
    tuning=Tuning(held_out_loss, dict.fromkeys(SIDES, SPACE), TRIALS, {side: {"rate": RATE} for side in SIDES}),
)  # fmt: skip
