"""Results of the protocol on disk: one JSON file for a task and budget, written after every run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toreq.errors import DataError
from toreq.evidence.claim import Outcome
from toreq.io import atomic_write_json
from toreq.tuning import Tuned

FORMAT = "toreq-protocol-control-1"


@dataclass
class Results:
    """All runs of one task at one budget.

    Attributes:
        task, budget: their names.
        settings: task and sizes, in values that JSON keeps; runs of other settings are not mixed with these.
        command: that makes the file.
        commit: of the code, None outside a repository.
        environment: what it ran on.
        tuned: side -> what the search found.
        runs: (side, seed) -> outcome.
        seconds: (side, seed) -> wall-clock seconds of the run.
    """

    task: str
    budget: str
    settings: dict[str, Any]
    command: str = ""
    commit: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, Tuned] = field(default_factory=dict)
    runs: dict[tuple[str, int], Outcome] = field(default_factory=dict)
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Replace the file at once."""
        runs = [
            {"side": side, "seed": seed, "seconds": self.seconds[side, seed], **outcome.to_json()}
            for (side, seed), outcome in self.runs.items()
        ]
        values = {
            "format": FORMAT,
            "task": self.task,
            "budget": self.budget,
            "settings": self.settings,
            "command": self.command,
            "commit": self.commit,
            "environment": self.environment,
            "tuning": {side: tuned.to_json() for side, tuned in self.tuned.items()},
            "runs": runs,
        }
        atomic_write_json(path, values)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file.

        Raises:
            DataError: for one that is missing, damaged or of something else.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"it is of format {values['format']!r}")
            runs = {(run["side"], run["seed"]): run for run in values["runs"]}
            return cls(
                task=values["task"],
                budget=values["budget"],
                settings=values["settings"],
                command=values["command"],
                commit=values["commit"],
                environment=values["environment"],
                tuned={side: Tuned.from_json(found) for side, found in values["tuning"].items()},
                runs={key: Outcome.from_json(run) for key, run in runs.items()},
                seconds={key: run["seconds"] for key, run in runs.items()},
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"control: expected a result of this protocol in {path}, got {type(error).__name__}: {error}; move it "
                "away and run again"
            ) from error

    def sides(self) -> list[str]:
        """The sides that have runs, in their order."""
        return list(dict.fromkeys(side for side, _ in self.runs))

    def seeds(self, side: str) -> list[int]:
        """The seeds of a side."""
        return sorted(seed for own, seed in self.runs if own == side)

    def numbers(self, side: str, metric: str) -> list[float | None]:
        """A metric of every seed of a side that has it; None where it has no value."""
        found = [self.runs[side, seed].metrics for seed in self.seeds(side)]
        return [metrics[metric].value for metrics in found if metric in metrics]

    def by_seed(self, side: str, metric: str) -> dict[int, float]:
        """Seed -> a metric of a side, where it has a value."""
        found = {seed: self.runs[side, seed].metrics.get(metric) for seed in self.seeds(side)}
        return {seed: q.value for seed, q in found.items() if q is not None and q.value is not None}


def settings(values: Sequence[Any]) -> dict[str, Any]:
    """Frozen dataclasses as the values that JSON gives back."""
    merged: Mapping[str, Any] = {type(value).__name__.lower(): asdict(value) for value in values}
    return json.loads(json.dumps(merged))
