"""What a claim is: a sentence, the criteria that settle it, the sides it is measured against, and its protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from toreq.errors import ConfigError, nearest
from toreq.evidence.budgets import Budget
from toreq.tuning import Space, Tuned
from toreq.tuning.space import Value

Direction = Literal["at_least", "at_most", "between"]
Scale = Literal["linear", "log"]
Bound = float | tuple[float, float]
Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Quantity:
    """A number with its unit; ``value`` is None where there is none (a side that did not settle)."""

    value: float | None
    unit: str


@dataclass(frozen=True)
class Cost:
    """What a side was given: trainable parameters, floating-point operations, and training samples seen.

    ``flops`` counts a multiplication and an addition as two; None for what does not apply.
    """

    parameters: int | None = None
    flops: float | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a protocol returns for one budget, side, seed and device.

    ``curves`` map a name to points (x, y), y None where there is no number. ``search`` is what a tuning job found; None
    for every other one.
    """

    metrics: Mapping[str, Quantity]
    curves: Mapping[str, Points] = field(default_factory=dict)
    cost: Cost = Cost()
    notes: tuple[str, ...] = ()
    search: Tuned | None = None

    def to_json(self) -> dict[str, Any]:
        """The outcome as JSON-able values."""
        return {
            "metrics": {name: {"value": q.value, "unit": q.unit} for name, q in self.metrics.items()},
            "curves": {name: [list(point) for point in points] for name, points in self.curves.items()},
            "cost": {"parameters": self.cost.parameters, "flops": self.cost.flops, "samples": self.cost.samples},
            "notes": list(self.notes),
            **({} if self.search is None else {"search": self.search.to_json()}),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Outcome:
        """The outcome that `to_json` wrote; raises KeyError or TypeError for something else."""
        return cls(
            metrics={name: Quantity(q["value"], q["unit"]) for name, q in values["metrics"].items()},
            curves={name: [(x, y) for x, y in points] for name, points in values["curves"].items()},
            cost=Cost(**values["cost"]),
            notes=tuple(values["notes"]),
            search=Tuned.from_json(values["search"]) if "search" in values else None,
        )


@dataclass(frozen=True)
class Trial:
    """One run of a protocol.

    Attributes:
        budget: what the sizes are picked by.
        side: a name of the claim's sides.
        seed: of weights, data order and noise; the same for all sides.
        device: a torch device.
        scratch: a folder of this trial alone, kept after an interruption, so that a long protocol can go on from there.
        tuned: the side's tuned parameters, where the claim tunes it; empty otherwise.
    """

    budget: Budget
    side: str
    seed: int
    device: str
    scratch: Path
    tuned: Mapping[str, Value] = field(default_factory=dict)


Protocol = Callable[[Trial], Outcome]
TUNING_SEED = 10_000
"""The seed of tuning, apart from those that are evaluated."""


@dataclass(frozen=True)
class Tuning:
    """How every side of a claim is tuned: by the same objective, in the same number of trials.

    Args:
        objective: (trial, parameters) -> a number from held-out training data, never from the test data. A function at
            the top level of a module, as the protocol; its scratch folder is the search trial's own, and survives an
            interruption.
        spaces: side -> what is searched; all of one size.
        trials: of every side, at least 1; two of them at a smoke budget.
        start: side -> a point to try first, as the settings that a method ships with.
        untuned: side -> why there is nothing to tune.
        direction: ``maximize`` or ``minimize``.
        seed: of searches and of the trials in them, apart from the seeds that are evaluated.

    Raises:
        ConfigError: no side, spaces of different size, or a start outside its space.
    """

    objective: Callable[[Trial, Mapping[str, Value]], float]
    spaces: Mapping[str, Space]
    trials: int
    start: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    untuned: Mapping[str, str] = field(default_factory=dict)
    direction: Literal["maximize", "minimize"] = "maximize"
    seed: int = TUNING_SEED

    def __post_init__(self) -> None:
        if not self.spaces or self.trials < 1:
            raise ConfigError(
                f"Tuning: expected a space for some side and at least one trial, got {len(self.spaces)} and "
                f"{self.trials}; give them"
            )
        sizes = {side: space.size for side, space in self.spaces.items()}
        (first, size), *others = sizes.items()
        for side, other in others:
            if other != size:
                raise ConfigError(
                    f"Tuning: expected spaces of one size for all sides, got {size} for {first!r} and {other} for "
                    f"{side!r}; give every side as much to tune"
                )
        for side, point in self.start.items():
            if side not in self.spaces:
                raise ConfigError(f"Tuning: expected a start of a tuned side, got {side!r}; {nearest(side, sizes)}")
            self.spaces[side].check(point)

    def count(self, budget: Budget) -> int:
        """Trials of each side at a budget."""
        return self.trials if budget.conclusive else min(2, self.trials)

    def describe(self) -> dict[str, Any]:
        """What makes results stale when it changes."""
        return {
            "spaces": {side: space.describe() for side, space in sorted(self.spaces.items())},
            "start": {side: dict(point) for side, point in sorted(self.start.items())},
            "untuned": sorted(self.untuned),
            "trials": self.trials,
            "direction": self.direction,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Criterion:
    r"""One number that the claim stands or falls by.

    With :math:`x_s` the metric of ``side`` under seed s, the value judged is :math:`x_s`, or with ``versus`` the
    paired difference :math:`x_s - y_s` from the best of these sides. The bound of the verdict is ``target``; where the
    seed names no number it is ``aim``, and where there is neither it is 0, which a paired difference must exclude.

    Args:
        name: what the tables call it.
        metric: key of `Outcome.metrics`.
        unit: of the metric.
        direction: ``at_least``, ``at_most`` or ``between`` (both ends included).
        side: whose metric is judged.
        target: the number of the seed (two for ``between``); None where it names none.
        words: the seed's own words.
        aim: what this project tries to reach; None for no number of its own.
        versus: sides for a paired comparison.
        beside: further sides to show in the table.
        seeds: how many are prescribed; 1 is judged on its value and labelled so.
        scale: ``log`` for a metric above 0 whose mean and interval are taken on logarithms.
        condition: what must hold for the others to mean anything (a radius): unmet, the claim is not settled.
    """

    name: str
    metric: str
    unit: str
    direction: Direction
    side: str
    target: Bound | None = None
    words: str = ""
    aim: Bound | None = None
    versus: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    seeds: int = 3
    scale: Scale = "linear"
    condition: bool = False

    def __post_init__(self) -> None:
        for bound in (self.target, self.aim):
            if bound is not None and isinstance(bound, tuple) != (self.direction == "between"):
                raise ConfigError(
                    f"Criterion {self.name!r}: expected a pair of bounds for 'between' and one number otherwise, got "
                    f"{bound}; change the direction or the bound"
                )
        if self.target is None and self.aim is None and not self.versus:
            raise ConfigError(
                f"Criterion {self.name!r}: expected a target, an aim or sides to compare with, got none; give one"
            )
        if self.scale == "log" and self.versus:
            raise ConfigError(f"Criterion {self.name!r}: expected differences on a linear scale, got 'log'; drop it")

    def describe(self, bound: Bound | None) -> str:
        """A bound in words, as in ``>= 0.999``; a dash for none."""
        if bound is None:
            return "-"
        if isinstance(bound, tuple):
            return f"{bound[0]:g} .. {bound[1]:g}"
        return f"{'≥' if self.direction == 'at_least' else '≤'} {bound:g}"


@dataclass(frozen=True)
class Picture:
    """How a claim is drawn: one line per side and curve, mean over seeds with its interval; or a metric per side.

    Args:
        title, x_label, y_label: what the axes say.
        curves: names of `Outcome.curves` to draw; empty for a metric of every side.
        metrics: names of the metrics to draw where there are no curves.
        log_x, log_y: logarithmic axes.
        complement: draw ``1 - value``, for cosines near 1.
    """

    title: str
    x_label: str = ""
    y_label: str = ""
    curves: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    log_x: bool = False
    log_y: bool = False
    complement: bool = False


@dataclass(frozen=True)
class Claim:
    """A claim with everything that settles it.

    Args:
        id: short and unique, as in ``B1``.
        system: the system it is about.
        seed_file: the file that makes the claim.
        sentence: the claim in one sentence.
        criteria: all must hold.
        protocol: what is done, in words.
        sides: name -> what it is; a result without every side is not settled.
        run: the protocol; a function at the top level of a module, since it is sent to worker processes.
        picture: how the results are drawn.
        exclusive: timing and memory claims run with nothing beside them.
        printed: metrics that every outcome of the judged sides must hold (radius, accuracy with couplings off).
        version: raised when the protocol, or what a side is, changes in a way that the protocol's words do not show.
        tuning: how the sides are tuned before they are run; None for a claim with nothing to tune.
    """

    id: str
    system: str
    seed_file: str
    sentence: str
    criteria: tuple[Criterion, ...]
    protocol: str
    sides: Mapping[str, str]
    run: Protocol
    picture: Picture
    exclusive: bool = False
    printed: tuple[str, ...] = ()
    version: int = 1
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        if self.tuning is not None:
            named = [*self.tuning.spaces, *self.tuning.untuned]
            if sorted(named) != sorted(self.sides):
                raise ConfigError(
                    f"Claim {self.id}: expected each of the sides {sorted(self.sides)} either in a space of the tuning "
                    f"or among the untuned ones, got {sorted(named)}; name all, each once"
                )
        for criterion in self.criteria:
            for side in (criterion.side, *criterion.versus, *criterion.beside):
                if side not in self.sides:
                    raise ConfigError(
                        f"Claim {self.id}: expected sides of {list(self.sides)}, got {side!r}; "
                        f"{nearest(side, self.sides)}"
                    )

    @property
    def seeds(self) -> int:
        """Seeds to run: the most that a criterion prescribes."""
        return max(criterion.seeds for criterion in self.criteria)

    def prescribed(self, side: str) -> int:
        """Seeds to run of a side: the most that a criterion in which it takes part prescribes."""
        parts = [c.seeds for c in self.criteria if side in (c.side, *c.versus, *c.beside)]
        return max(parts, default=self.seeds)

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with the protocol's words, the version and the tuning.

        Not with sides and criteria: what was run stays true when a side is added, which then is missing, or when a
        target moves, by which the same numbers are judged anew.
        """
        described = {
            "protocol": " ".join(self.protocol.split()),
            "version": self.version,
            **({} if self.tuning is None else {"tuning": self.tuning.describe()}),
        }
        text = json.dumps(described, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
