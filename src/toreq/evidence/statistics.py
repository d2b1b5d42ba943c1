"""Intervals over seeds, and where an interval stands to a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from toreq.errors import ConfigError
from toreq.evidence.claim import Bound, Direction, Scale

Verdict = Literal["holds", "fails", "not settled"]
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """Mean over ``n`` seeds and its confidence interval; ``low`` and ``high`` are None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


def interval(values: Sequence[float], level: float = LEVEL, scale: Scale = "linear") -> Interval:
    r"""Mean and Student's interval :math:`\bar x \pm t_{n-1}\,s/\sqrt n`, s the sample's standard deviation.

    Args:
        values: one of each seed, at least one, finite.
        level: confidence in (0, 1).
        scale: ``log`` takes mean and interval of the logarithms (values above 0) and returns their exponentials.

    Raises:
        ConfigError: no values, one that is not finite, or one that has no logarithm.
    """
    if not values or not all(math.isfinite(v) for v in values) or not 0 < level < 1:
        raise ConfigError(
            f"interval: expected finite values and a level in (0, 1), got {list(values)} and {level}; leave out runs "
            "without a number"
        )
    if scale == "log":
        if min(values) <= 0:
            raise ConfigError(f"interval: expected values above 0 on a log scale, got {list(values)}; use 'linear'")
        inner = interval([math.log(v) for v in values], level)
        low, high = (None if end is None else math.exp(end) for end in (inner.low, inner.high))
        return Interval(math.exp(inner.mean), low, high, inner.n)
    # fsum: the same for every order of the seeds
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    if min(values) == max(values):
        # not x +- rounding error: a number that does not depend on the seed is known
        return Interval(values[0], values[0], values[0], n)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired(own: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    """Differences own - other for each seed that both have, in the order of the seeds."""
    return {seed: own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())}


def standing(found: Interval, direction: Direction, bound: Bound, *, strict: bool = False) -> Verdict:
    """``holds`` when the whole interval is on the claimed side of the bound, ``fails`` when none of it is.

    Args:
        found: the interval; a single seed stands by its value.
        direction: ``at_least``, ``at_most`` or ``between``.
        bound: the number, or a pair for ``between``.
        strict: the interval must exclude the bound itself (a difference that must exclude 0).
    """
    low = found.mean if found.low is None else found.low
    high = found.mean if found.high is None else found.high
    if isinstance(bound, tuple):
        if low >= bound[0] and high <= bound[1]:
            return "holds"
        return "fails" if high < bound[0] or low > bound[1] else "not settled"
    if direction == "at_most":
        low, high, bound = -high, -low, -bound
    if low > bound or (low == bound and not strict):
        return "holds"
    return "fails" if high < bound or (strict and high == bound) else "not settled"


def mean_curve(
    curves: Sequence[Sequence[tuple[float, float | None]]],
) -> list[tuple[float, float, float | None, float | None]]:
    """(x, mean, low, high) over seeds for every x at which each of the curves has a number."""
    tables = [{x: y for x, y in points if y is not None and np.isfinite(y)} for points in curves]
    shared = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
    found = []
    for x in shared:
        at = interval([table[x] for table in tables])
        found.append((x, at.mean, at.low, at.high))
    return found
