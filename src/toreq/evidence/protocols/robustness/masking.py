"""Signs that a defence only hides its gradients (Athalye, Carlini and Wagner 2018), each computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SLACK = 1.0
"""Points by which an attack may fall behind one that it should beat: attacks are random, and examples few."""
LOSS_SLACK = 5.0
"""Points by which the margin loss may beat the cross entropy: a little is usual, much says that this stands still."""
BROKEN = 1.0
"""Accuracy in percent that counts as none, at the largest perturbation."""
VANISHED = 5.0
"""Percent of the examples whose gradient may be exactly zero."""


@dataclass(frozen=True)
class Check:
    """One sign: whether the gradients pass, and the number that says so (``limit`` is the most it may be)."""

    name: str
    value: float
    limit: float

    @property
    def passes(self) -> bool:
        """Whether the number is within its limit (not a number is not)."""
        return self.value <= self.limit


def percent(survived: Tensor) -> list[float]:
    """Accuracy in percent for each row of survivors."""
    return [100 * float(row.double().mean()) for row in survived]


def falls(survived: Tensor, clean: Tensor) -> Check:
    """Accuracy must fall as eps grows; the largest rise from one eps to the next, in points."""
    line = torch.tensor([100 * float(clean.double().mean()), *percent(survived)], dtype=torch.float64)
    return Check("accuracy falls with eps", float((line[1:] - line[:-1]).max()), SLACK)


def reaches_zero(survived: Tensor) -> Check:
    """At the largest eps nothing may be left; accuracy there, in percent."""
    return Check("nothing survives the largest eps", percent(survived)[-1], BROKEN)


def at_least_as_strong(name: str, strong: Tensor, weak: Tensor, limit: float = SLACK) -> Check:
    """The strong attack must leave no more alive than the weak one, on the same examples; the worst gap in points."""
    number = weak.shape[1]
    gaps = [a - b for a, b in zip(percent(strong[:, :number]), percent(weak), strict=True)]
    return Check(name, max(gaps), limit)


def more_steps(by_steps: Mapping[int, Tensor]) -> Check:
    """More steps must not be weaker; the largest rise in accuracy from fewer steps to more, in points."""
    line = [percent(by_steps[steps])[0] for steps in sorted(by_steps)]
    rises = [b - a for a, b in pairwise(line)]
    return Check("more steps are not weaker", max(rises), SLACK)


def not_vanishing(share: float) -> Check:
    """Percent of the examples without any input gradient."""
    return Check("gradients do not vanish", 100 * share, VANISHED)


def all_pass(checks: Sequence[Check]) -> bool:
    """Whether no sign speaks for masked gradients."""
    return all(check.passes for check in checks)
