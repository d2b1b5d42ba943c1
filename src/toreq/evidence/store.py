"""Results on disk: one JSON file for each claim and budget, written anew after every run."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toreq.errors import DataError
from toreq.evidence import budgets
from toreq.evidence.claim import Claim, Outcome
from toreq.evidence.verdicts import Judgement, judge
from toreq.io import atomic_write_json, set_aside
from toreq.tuning import Tuned

FORMAT = "toreq-evidence"
RESULTS = Path("evidence/results")
SCRATCH = ".scratch"


@dataclass
class Result:
    """All that is kept of a claim at one budget.

    Attributes:
        claim, budget: what it is a result of.
        fingerprint: of the protocol that the runs followed.
        runs: (side, seed) -> outcome, seconds, attempts, commit.
        failures: (side, seed) -> reason, exit_code, attempts; a tuning that failed has the seed of the tuning.
        tuning: side -> what its tuning found.
        command, commit, environment: of the latest run.
    """

    claim: str
    budget: str
    fingerprint: str
    runs: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    tuning: dict[str, Tuned] = field(default_factory=dict)
    failures: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    command: str = ""
    commit: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def outcomes(self) -> dict[tuple[str, int], Outcome]:
        """(side, seed) -> outcome."""
        return {key: run["outcome"] for key, run in self.runs.items()}

    @property
    def seconds(self) -> float:
        """Seconds of all runs and searches together, one after the other."""
        return sum(run["seconds"] for run in self.runs.values()) + sum(t.seconds for t in self.tuning.values())

    def forget_untuned(self, claim: Claim) -> None:
        """Drop runs that were not made with the parameters that their side's tuning found."""
        if claim.tuning is None:
            return
        best = {side: found.best for side, found in self.tuning.items()} | {side: {} for side in claim.tuning.untuned}
        self.runs = {key: run for key, run in self.runs.items() if run.get("tuned") == best.get(key[0])}

    def stale(self, claim: Claim) -> bool:
        """Whether the claim's protocol has changed since these runs."""
        return self.fingerprint != claim.fingerprint

    def judged(self, claim: Claim) -> Judgement:
        """The verdict, computed from the runs."""
        return judge(claim, self.outcomes, budgets.find(self.budget))

    def to_json(self, claim: Claim) -> dict[str, Any]:
        """The file's content: what was computed first, then every run's own numbers."""
        judgement = self.judged(claim).to_json()
        return {
            "format": FORMAT,
            "claim": self.claim,
            "budget": self.budget,
            "system": claim.system,
            "seed_file": claim.seed_file,
            "sentence": claim.sentence,
            **judgement,
            "sides": dict(claim.sides),
            "seeds": sorted({seed for _, seed in self.runs}),
            "command": self.command,
            "commit": self.commit,
            "environment": self.environment,
            "seconds": self.seconds,
            "fingerprint": self.fingerprint,
            **({} if claim.tuning is None else {"tuning": {s: t.to_json() for s, t in sorted(self.tuning.items())}}),
            "failures": [{"side": s, "seed": n, **why} for (s, n), why in sorted(self.failures.items())],
            "runs": [
                {"side": s, "seed": n, **{k: v for k, v in run.items() if k != "outcome"}, **run["outcome"].to_json()}
                for (s, n), run in sorted(self.runs.items())
            ],
        }


def path(results: Path, claim: str, budget: str) -> Path:
    """The file of a claim and budget."""
    return results / f"{claim}-{budget}.json"


def save(results: Path, claim: Claim, result: Result) -> Path:
    """Write a result at once; on a full disk the old file stays and `WriteError` is raised."""
    file = path(results, result.claim, result.budget)
    atomic_write_json(file, result.to_json(claim), indent=1)
    return file


def load(results: Path, claim: str, budget: str) -> Result | None:
    """The result of a claim and budget, None where there is none.

    A file that is no such result is renamed to ``NAME.corrupt-N``, with a warning that names it, and never deleted.
    """
    file = path(results, claim, budget)
    if not file.exists():
        return None
    try:
        return _parse(json.loads(file.read_text(encoding="utf-8")), claim, budget)
    except (ValueError, KeyError, TypeError, AttributeError, DataError) as error:
        kept = set_aside(file, "corrupt")
        warnings.warn(
            f"evidence: expected a result of {claim} ({budget}) in {file}, got something else "
            f"({type(error).__name__}: {error}); it is kept as {kept.name}, its runs count as missing",
            stacklevel=2,
        )
        return None


def _parse(values: Any, claim: str, budget: str) -> Result:
    if values["format"] != FORMAT or (values["claim"], values["budget"]) != (claim, budget):
        raise DataError(f"it is of {values['claim']} ({values['budget']}), format {values['format']!r}")
    result = Result(
        claim,
        budget,
        str(values["fingerprint"]),
        command=str(values["command"]),
        commit=values["commit"],
        environment=dict(values["environment"]),
    )
    for run in values["runs"]:
        result.runs[str(run["side"]), int(run["seed"])] = {
            "outcome": Outcome.from_json(run),
            "seconds": float(run["seconds"]),
            "attempts": int(run["attempts"]),
            "commit": run["commit"],
            **({"tuned": dict(run["tuned"])} if "tuned" in run else {}),
        }
    result.tuning = {str(side): Tuned.from_json(found) for side, found in values.get("tuning", {}).items()}
    for failure in values["failures"]:
        why: Mapping[str, Any] = {key: failure[key] for key in ("reason", "exit_code", "attempts")}
        result.failures[str(failure["side"]), int(failure["seed"])] = dict(why)
    return result


def scratch(results: Path, claim: Claim, budget: str, side: str, seed: int | str) -> Path:
    """The scratch folder of one run, or with ``"tuning"`` for the seed that of a side's tuning.

    A changed protocol gets another one, so that nothing old is continued.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", side).strip("-")
    return (
        results
        / SCRATCH
        / f"{claim.id}-{budget}-{claim.fingerprint}"
        / f"{name}-{seed if isinstance(seed, str) else f'seed{seed}'}"
    )


def tuned_scratch(folder: Path, tuned: Mapping[str, Any]) -> Path:
    """The scratch folder of a run with tuned parameters: with others it must not go on where it was."""
    told = json.dumps(dict(tuned), sort_keys=True)
    return folder.with_name(f"{folder.name}-{hashlib.sha256(told.encode('utf-8')).hexdigest()[:8]}")


def prepare_scratch(results: Path) -> None:
    """Keep scratch folders out of version control, whatever the folder of the results."""
    folder = results / SCRATCH
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")


def drop_scratch(folder: Path) -> None:
    """Remove the scratch folder of a finished run, and its parents as far as they are empty."""
    shutil.rmtree(folder, ignore_errors=True)
    parent = folder.parent
    if parent.exists() and not any(parent.iterdir()):
        parent.rmdir()
