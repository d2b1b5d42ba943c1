"""What is run on each task at each budget: sizes, the same for every side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from toreq.data import Sequences, SequenceTask, sequence_task
from toreq.data.batches import seeded
from toreq.errors import ConfigError, nearest
from toreq.evidence.budgets import Budget
from toreq.evidence.protocols.sequences.training import Recipe

RATE = 3e-3
"""Where a side's rate is not tuned."""
SMOKE_PARAMETERS = 1500
_HELD_OUT = 0x4E1D
"""Key of the random stream of held-out parts."""
_SMOKE: dict[str, Any] = {"train": 16, "test": 8}
_SMOKE_RECIPE = Recipe(2, 4, RATE, 100.0, 1, tested=4, warmup=1)


@dataclass(frozen=True)
class Plan:
    """One task at one budget.

    Attributes:
        options: of `toreq.data.sequence_task`.
        parameters: trainable numbers of every side.
        recipe: of the training.
    """

    options: Mapping[str, Any]
    parameters: int
    recipe: Recipe


@dataclass(frozen=True)
class _Sizes:
    """A task's sizes at the quick and the full budget, and what is smaller in a smoke run."""

    threshold: float
    quick: dict[str, Any]
    full: dict[str, Any]
    steps: tuple[int, int]
    smoke: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[int, int] = (20_000, 50_000)
    batch: int = 32


_TASKS: dict[str, _Sizes] = {
    "copy": _Sizes(
        95.0,
        {"train": 20_000, "test": 1000, "length": 5},
        {"train": 100_000, "test": 2000, "length": 40},
        (500, 10_000),
        {"length": 3},
    ),
    "adding": _Sizes(
        90.0,
        {"train": 20_000, "test": 1000, "length": 20},
        {"train": 100_000, "test": 2000, "length": 100},
        (500, 10_000),
        {"length": 6},
    ),
    "parity": _Sizes(
        95.0,
        {"train": 20_000, "test": 1000, "length": 12},
        {"train": 100_000, "test": 2000, "length": 20},
        (500, 10_000),
        {"length": 4},
    ),
    "sort": _Sizes(
        95.0,
        {"train": 20_000, "test": 1000, "length": 8},
        {"train": 100_000, "test": 2000, "length": 16},
        (500, 10_000),
        {"length": 4},
    ),
    "maze": _Sizes(
        95.0,
        {"train": 20_000, "test": 1000, "length": 4},
        {"train": 100_000, "test": 2000, "length": 6},
        (500, 10_000),
        {"length": 2},
    ),
    "mnist-rows": _Sizes(90.0, {"train": 20_000, "test": 2000}, {}, (500, 10_000), parameters=(20_000, 50_000)),
    "mnist-pixels": _Sizes(90.0, {"train": 5000, "test": 1000, "chunk": 4}, {}, (200, 10_000), {"chunk": 28}),
    "mnist-permuted": _Sizes(90.0, {"train": 5000, "test": 1000, "chunk": 4}, {}, (200, 10_000), {"chunk": 28}),
    "cifar10-pixels": _Sizes(50.0, {"train": 5000, "test": 1000, "chunk": 8}, {}, (200, 10_000), {"chunk": 64}),
    "listops-small": _Sizes(60.0, {"train": 20_000, "test": 1000}, {"train": 96_000, "test": 2000}, (500, 10_000)),
    "listops": _Sizes(40.0, {"train": 2000, "test": 200}, {}, (50, 5000), parameters=(20_000, 100_000)),
    "text": _Sizes(3.0, {"length": 64, "test": 200}, {"length": 128}, (300, 10_000), {"length": 8}, (30_000, 100_000)),
}


def tasks() -> list[str]:
    """The tasks that have a plan."""
    return list(_TASKS)


def plan(task: str, budget: Budget) -> Plan:
    """What is run on a task at a budget.

    Raises:
        ConfigError: a task without a plan.
    """
    if task not in _TASKS:
        raise ConfigError(f"sequences.plan: expected a task, got {task!r}; {nearest(task, _TASKS)}")
    sizes = _TASKS[task]
    if budget.name == "smoke":
        longer = {} if "length" not in sizes.quick or task == "text" else {"longer": (2,)}
        return Plan(
            {**_SMOKE, **sizes.smoke, **longer}, SMOKE_PARAMETERS, replace(_SMOKE_RECIPE, threshold=sizes.threshold)
        )
    which = budget.pick(0, 0, 1)
    steps = sizes.steps[which]
    recipe = Recipe(steps, sizes.batch, RATE, sizes.threshold, max(1, steps // 20))
    return Plan((sizes.quick, sizes.full)[which], sizes.parameters[which], recipe)


def make(task: str, plan: Plan, seed: int) -> SequenceTask:
    """The task of a plan; generated ones are drawn anew for each seed."""
    generated = {"seed": seed} if task not in ("text",) and not task.startswith(("mnist", "cifar")) else {}
    return sequence_task(task, **plan.options, **generated)


def held_out(task: SequenceTask, share: float = 0.1, seed: int | None = None) -> SequenceTask:
    """The task with a part of its training sequences in the place of the test set, for tuning; the test set is gone.

    Args:
        task: what is learned.
        share: of the training sequences that is held out.
        seed: of a random part; None takes sequences at equal distances. That fits sets in any order but one in which
            classes take turns, as in balanced parts of the image sets: there a tenth at equal distances is one class.

    Raises:
        ConfigError: a share that leaves one of the two parts empty.
    """
    count = round(share * len(task.train))
    if not 0 < count < len(task.train):
        raise ConfigError(f"sequences.held_out: expected a share that leaves both parts some, got {share}; e.g. 0.1")
    # spread over the whole: text, and sets sorted by class, have an order
    chosen = torch.zeros(len(task.train), dtype=torch.bool)
    spread = torch.arange(count) * len(task.train) // count
    chosen[spread if seed is None else torch.randperm(len(task.train), generator=seeded(seed, _HELD_OUT))[:count]] = (
        True
    )

    def part(which: torch.Tensor) -> Sequences:
        whole = task.train
        mask, lengths = (None if p is None else p[which] for p in (whole.mask, whole.lengths))
        return Sequences(whole.x[which], whole.y[which], mask, lengths)

    return replace(task, variant=f"{task.variant}-held-out", train=part(~chosen), test=part(chosen), longer={})
