"""From the numbers of every side and seed to a verdict; nothing here is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from toreq.evidence.budgets import Budget
from toreq.evidence.claim import Bound, Claim, Criterion, Outcome
from toreq.evidence.statistics import Interval, Verdict, interval, paired, standing

Outcomes = Mapping[tuple[str, int], Outcome]
"""(side, seed) -> what its run returned."""


@dataclass(frozen=True)
class Finding:
    """One criterion, judged.

    ``mean``, ``low`` and ``high`` are of the value judged (a difference with ``against``), ``sides`` the plain metric
    of the judged side and those beside it. ``verdict`` is on the bound, ``aim_verdict`` on the aim (None: no aim).
    """

    name: str
    metric: str
    unit: str
    side: str
    against: str | None
    claimed: str
    target: Bound | None
    words: str
    aim: Bound | None
    mean: float | None
    low: float | None
    high: float | None
    seeds: int
    prescribed: int
    one_seed: bool
    condition: bool
    verdict: Verdict
    aim_verdict: Verdict | None
    reason: str
    sides: dict[str, dict[str, float | int | None]]


@dataclass(frozen=True)
class Judgement:
    """A claim, judged: ``aim_reached`` is None when not settled, or without an aim."""

    verdict: Verdict
    aim_reached: bool | None
    findings: tuple[Finding, ...]
    reasons: tuple[str, ...]

    @property
    def holding(self) -> list[str]:
        """The criteria that hold: of a failed claim, the closest statement that does."""
        return [f.name for f in self.findings if f.verdict == "holds" and not f.condition]

    def to_json(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "verdict": self.verdict,
            "aim_reached": self.aim_reached,
            "reasons": list(self.reasons),
            "holding": self.holding,
            "criteria": [asdict(finding) for finding in self.findings],
        }


def numbers(outcomes: Outcomes, side: str, metric: str) -> dict[int, float]:
    """The finite values of a side's metric by seed."""
    found = {}
    for (name, seed), outcome in sorted(outcomes.items()):
        quantity = outcome.metrics.get(metric)
        if name == side and quantity is not None and quantity.value is not None and math.isfinite(quantity.value):
            found[seed] = quantity.value
    return found


def judge(claim: Claim, outcomes: Outcomes, budget: Budget) -> Judgement:
    """Judge every criterion by its interval, and the claim by its criteria.

    The claim fails when a criterion fails and holds when all hold. It is not settled when neither is so, when a side
    has no run, when what must be printed is missing, when a condition is not met, or when the budget is no conclusive
    one.
    """
    findings = tuple(_finding(claim, criterion, outcomes) for criterion in claim.criteria)
    blocked = _blocked(claim, outcomes, budget, findings)
    judged = [f for f in findings if not f.condition]
    said = [*blocked, *_grouped([(f.name, f.reason) for f in judged if f.verdict == "not settled"])]
    verdict: Verdict
    if blocked:
        verdict = "not settled"
    elif any(f.verdict == "fails" for f in judged):
        verdict = "fails"
    else:
        verdict = "holds" if all(f.verdict == "holds" for f in judged) else "not settled"
    aims = [f.aim_verdict for f in judged if f.aim_verdict is not None]
    reached: bool | None = None
    if aims and not blocked:
        reached = False if "fails" in aims else True if all(a == "holds" for a in aims) else None
    return Judgement(verdict, reached, findings, tuple(said))


def _blocked(claim: Claim, outcomes: Outcomes, budget: Budget, findings: tuple[Finding, ...]) -> list[str]:
    said = []
    if not budget.conclusive:
        said.append(f"the {budget.name} budget only shows that the protocol runs")
    present = {side for side, _ in outcomes}
    said += [f"the side {side!r} has no run" for side in claim.sides if side not in present]
    judged = {criterion.side for criterion in claim.criteria if not criterion.condition}
    for side in sorted(judged & present):
        runs = [outcome for (name, _), outcome in outcomes.items() if name == side]
        for metric in claim.printed:
            if any(metric not in run.metrics or run.metrics[metric].value is None for run in runs):
                said.append(f"{side!r} does not print {metric!r}")
    unmet = [f for f in findings if f.condition and f.verdict != "holds"]
    said += _grouped(
        [(f"the condition '{f.name}' ({f.claimed})", f.reason or f"it is {f.mean:.3g}") for f in unmet], "conditions"
    )
    return said


def _grouped(pairs: list[tuple[str, str]], what: str = "criteria") -> list[str]:
    """(name, reason) in lines; names with one reason share a line."""
    names: dict[str, list[str]] = {}
    for name, reason in pairs:
        names.setdefault(reason, []).append(name)
    return [f"{of[0] if len(of) == 1 else f'{len(of)} {what}'}: {reason}" for reason, of in names.items()]


def _finding(claim: Claim, criterion: Criterion, outcomes: Outcomes) -> Finding:
    own = numbers(outcomes, criterion.side, criterion.metric)
    ran = [seed for side, seed in outcomes if side == criterion.side]
    against, values, reason = None, own, ""
    if criterion.versus:
        others = {side: numbers(outcomes, side, criterion.metric) for side in criterion.versus}
        missing = [side for side, found in others.items() if not found]
        if missing:
            values, reason = {}, f"{' and '.join(missing)} {'has' if len(missing) == 1 else 'have'} no number"
        else:
            sign = -1.0 if criterion.direction == "at_most" else 1.0
            against = max(others, key=lambda side: sign * interval(list(others[side].values())).mean)
            values = paired(own, others[against])
    found = None
    if values and not (criterion.scale == "log" and min(values.values()) <= 0):
        found = interval(list(values.values()), scale=criterion.scale)
    if not reason:
        reason = _short(criterion, values, len(ran) - len(own))
    bound = _bound(criterion)
    return Finding(
        name=criterion.name,
        metric=criterion.metric,
        unit=criterion.unit,
        side=criterion.side,
        against=against,
        claimed=criterion.describe(bound),
        target=criterion.target,
        words=criterion.words,
        aim=criterion.aim,
        mean=None if found is None else found.mean,
        low=None if found is None else found.low,
        high=None if found is None else found.high,
        seeds=0 if found is None else found.n,
        prescribed=criterion.seeds,
        one_seed=found is not None and found.n == 1,
        condition=criterion.condition,
        verdict=_stand(found, criterion, bound, reason),
        aim_verdict=None if criterion.aim is None else _stand(found, criterion, criterion.aim, reason),
        reason=reason or _why(found, criterion, bound),
        sides=_beside(criterion, outcomes),
    )


def _bound(criterion: Criterion) -> Bound:
    """What the verdict is measured by."""
    if criterion.target is not None:
        return criterion.target
    return 0.0 if criterion.aim is None else criterion.aim


def _strict(criterion: Criterion, bound: Bound) -> bool:
    """A difference that is claimed to have a sign must exclude 0."""
    return bool(criterion.versus) and bound == 0


def _short(criterion: Criterion, values: Mapping[int, float], unsettled: int) -> str:
    """Why there are not the numbers that a verdict needs; empty when there are."""
    if unsettled > 0:
        return f"{unsettled} of the runs gave no number"
    if len(values) < criterion.seeds:
        return f"{len(values)} of {criterion.seeds} seeds"
    return ""


def _stand(found: Interval | None, criterion: Criterion, bound: Bound, reason: str) -> Verdict:
    if found is None or reason:
        return "not settled"
    return standing(found, criterion.direction, bound, strict=_strict(criterion, bound))


def _why(found: Interval | None, criterion: Criterion, bound: Bound) -> str:
    if found is None:
        return "no number"
    if standing(found, criterion.direction, bound, strict=_strict(criterion, bound)) == "not settled":
        return "the interval covers the bound"
    return ""


def _beside(criterion: Criterion, outcomes: Outcomes) -> dict[str, dict[str, float | int | None]]:
    found: dict[str, dict[str, float | int | None]] = {}
    for side in dict.fromkeys((criterion.side, *criterion.versus, *criterion.beside)):
        values = list(numbers(outcomes, side, criterion.metric).values())
        if values:
            at = interval(values)
            found[side] = {"mean": at.mean, "low": at.low, "high": at.high, "seeds": at.n}
    return found
