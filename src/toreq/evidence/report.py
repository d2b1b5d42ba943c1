"""What there is to say about every claim: for the terminal, and written as pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from toreq.evidence import store
from toreq.evidence.budgets import BUDGETS
from toreq.evidence.claim import Claim, Criterion
from toreq.evidence.registry import claim, claims
from toreq.evidence.store import Result
from toreq.evidence.verdicts import Finding, Judgement

NOT_RUN, STALE = "not run", "stale"
GIVEN = ("side", "what it is", "parameters", "FLOPs", "samples", "seconds")
"""What `given` tells: operations and samples of a whole run, seconds the mean over seeds."""
TUNED = ("side", "tuned values", "searched", "trials", "size of the search", "value", "seconds")
"""What `tuned` tells."""


@dataclass(frozen=True)
class Entry:
    """A claim with the result of its largest budget; ``others`` are its smaller ones, budget -> verdict."""

    claim: Claim
    result: Result | None
    judgement: Judgement | None
    stale: bool
    others: dict[str, str]

    @property
    def verdict(self) -> str:
        """``holds``, ``fails``, ``not settled``, ``stale`` or ``not run``."""
        if self.result is None or self.judgement is None:
            return NOT_RUN
        return STALE if self.stale else self.judgement.verdict

    @property
    def aim(self) -> str:
        """Whether the aim is reached, in a word; a dash where the claim has none of its own."""
        if self.judgement is None or self.stale or all(c.aim is None for c in self.claim.criteria):
            return "-"
        return {True: "yes", False: "no", None: "not settled"}[self.judgement.aim_reached]

    @property
    def command(self) -> str:
        """What to run for this result, or for the one that is missing."""
        if self.result is not None and self.result.command and not self.stale:
            return self.result.command
        return f"toreq evidence run {self.claim.id} --budget full"

    @property
    def seeds(self) -> int:
        """Seeds that were run."""
        return 0 if self.result is None else len({seed for _, seed in self.result.runs})


def entries(results: Path) -> list[Entry]:
    """Every registered claim with what the folder holds of it."""
    found = []
    for one in claims():
        known = [(name, store.load(results, one.id, name)) for name in reversed(BUDGETS)]
        present = [(name, result) for name, result in known if result is not None]
        if not present:
            found.append(Entry(one, None, None, False, {}))
            continue
        # a fresh result of a smaller budget says more than a stale one of a larger
        present.sort(key=lambda pair: pair[1].stale(one))
        _, best = present[0]
        others = {name: STALE if r.stale(one) else r.judged(one).verdict for name, r in present[1:]}
        found.append(Entry(one, best, best.judged(one), best.stale(one), others))
    return found


def number(value: float | None, digits: int = 4) -> str:
    """A value with so many significant digits, and no fewer nines than tell a cosine from 1; a dash for None."""
    if value is None:
        return "-"
    if 0.99 < abs(value) < 1:
        # 0.99997 must not read as 1
        return f"{value:.6f}".rstrip("0") if abs(value) < 0.9999995 else f"1 - {1 - value:.1e}"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.{digits}g}"


def between(finding: Finding) -> str:
    """The interval of what is judged; for a single seed, that it is one."""
    if finding.mean is None:
        return "-"
    if finding.low is None or finding.high is None:
        return "one seed"
    return f"{number(finding.low)} .. {number(finding.high)}"


def ours(finding: Finding) -> str:
    """The judged side's own number."""
    return _side(finding, finding.side)


def baselines(finding: Finding) -> str:
    """The other sides' numbers, by name."""
    return "; ".join(f"{side}: {_side(finding, side)}" for side in finding.sides if side != finding.side) or "-"


def _side(finding: Finding, side: str) -> str:
    mean = finding.sides.get(side, {}).get("mean")
    return number(None if mean is None else float(mean))


def judged(finding: Finding) -> str:
    """What the interval is of: the number itself, or its difference from a side."""
    if finding.against is None:
        return "-" if finding.mean is None else number(finding.mean)
    return f"{number(finding.mean)} against {finding.against}"


def target(criterion: Criterion) -> str:
    """The seed's words, and the bound that stands for them."""
    if criterion.target is None:
        return criterion.words or "-"
    bound = criterion.describe(criterion.target)
    return f"{criterion.words} ({bound})" if criterion.words else bound


def verdict(finding: Finding) -> str:
    """A criterion's verdict with the reason where it is not settled, and the label of a single seed."""
    text = finding.verdict
    if finding.verdict == "not settled" and finding.reason:
        text += f" ({finding.reason})"
    if finding.one_seed and finding.verdict != "not settled":
        text += ", one seed"
    return text


def count(value: float | None) -> str:
    """A large number with three digits and the prefix of its size, as in 14.2 T; a dash for None."""
    if value is None:
        return "-"
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    step = 0 if value < 1 else min(int(math.log10(value) / 3), len(prefixes) - 1)
    return f"{value / 1000**step:.3g} {prefixes[step]}".strip()


def given(claim: Claim, result: Result) -> list[list[str]]:
    """One row for each side: what it was given."""
    rows = []
    for side, what in claim.sides.items():
        runs = [run for (name, _), run in sorted(result.runs.items()) if name == side]
        if not runs:
            rows.append([side, what, *["no run"] * 4])
            continue
        cost = runs[0]["outcome"].cost
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        counts = ["-" if v is None else f"{v:,}" for v in (cost.parameters, cost.samples)]
        rows.append([side, what, counts[0], count(cost.flops), counts[1], number(seconds, 3)])
    return rows


def tuned(claim: Claim, result: Result) -> list[list[str]]:
    """One row for each side of a claim that tunes: what was searched and found."""
    if claim.tuning is None:
        return []
    rows = []
    for side in claim.sides:
        found = result.tuning.get(side)
        if found is None:
            rows.append([side, claim.tuning.untuned.get(side, "not tuned yet"), *["-"] * 5])
            continue
        trials = f"{len(found.trials)}" + (f", {found.failed} failed" if found.failed else "")
        searched = "; ".join(f"{name}: {span}" for name, span in found.space.items())
        rows.append(
            [side, settings(found.best), searched, trials, found.size, number(found.value), number(found.seconds, 3)]
        )
    return rows


def settings(params: Mapping[str, Any]) -> str:
    """Parameters in a line."""
    return ", ".join(f"{k} {number(v) if isinstance(v, float) else v}" for k, v in params.items())


def tuning_notes(result: Result) -> list[str]:
    """The sides whose best value lies at an end of its range, where a larger range might have done better."""
    return [
        f"the best {' and '.join(found.at_edge)} of {side} lies at an end of its range"
        for side, found in sorted(result.tuning.items())
        if found.at_edge
    ]


def show_list(results: Path, console: Console) -> None:
    """Print the claims with their verdicts."""
    table = Table(title="claims", show_lines=True)
    for column in ("id", "claim", "sides", "seeds", "verdict", "aim reached"):
        table.add_column(column, overflow="fold")
    for entry in entries(results):
        budget = "" if entry.result is None else f" ({entry.result.budget})"
        table.add_row(
            entry.claim.id,
            entry.claim.sentence,
            ", ".join(entry.claim.sides),
            str(entry.claim.seeds),
            entry.verdict + budget,
            entry.aim,
        )
    console.print(table)


def show_verdicts(found: Sequence[Result], console: Console) -> None:
    """Print the criteria of some results, and what failed to run."""
    for result in found:
        judgement = result.judged(claim(result.claim))
        table = Table(title=f"{result.claim} ({result.budget}): {judgement.verdict}")
        for column in ("criterion", "claimed", "ours", "others", "judged", "95% interval", "verdict"):
            table.add_column(column, overflow="fold")
        for f in judgement.findings:
            table.add_row(f.name, f.claimed, ours(f), baselines(f), judged(f), between(f), verdict(f))
        console.print(table)
        one = claim(result.claim)
        _show(console, f"{result.claim}: what each side was given", GIVEN, given(one, result))
        if one.tuning is not None:
            _show(console, f"{result.claim}: how each side was tuned", TUNED, tuned(one, result))
        for note in tuning_notes(result):
            console.print(f"{result.claim}: {note}", markup=False, soft_wrap=True)
        for reason in judgement.reasons:
            console.print(f"{result.claim}: {reason}", markup=False, soft_wrap=True)
        for (side, seed), why in sorted(result.failures.items()):
            console.print(f"{result.claim} {side}, seed {seed} failed: {why['reason']}", markup=False, soft_wrap=True)


def _show(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_report(results: Path, out: Path) -> list[Path]:
    """Write ``report.html`` (self-contained), ``index.md`` (for the docs) and one SVG per claim; return their paths."""
    from toreq.evidence.page import write

    return write(entries(results), out)
