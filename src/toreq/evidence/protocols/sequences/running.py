"""Measuring sides on tasks, one after the other, into one JSON file that is whole after every run."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from toreq.bench.timing import commit
from toreq.errors import ConfigError, DataError
from toreq.evidence.budgets import Budget
from toreq.evidence.claim import TUNING_SEED, Outcome, Trial
from toreq.evidence.protocols.sequences import plans, protocol
from toreq.evidence.store import SCRATCH
from toreq.evidence.workers import perform
from toreq.io import atomic_write_json
from toreq.training.environment import environment
from toreq.tuning import Tuned, tune

FORMAT = "toreq-sequences"
Key = tuple[str, str, int]


@dataclass
class Results:
    """What a file holds.

    Attributes:
        budget: that all runs are of.
        plans: task -> its plan, as JSON-able values.
        tuned: (task, side) -> the search for its rate.
        runs: (task, side, seed) -> outcome, seconds, commit, command.
        environment: of the latest run.
    """

    budget: str
    plans: dict[str, Any] = field(default_factory=dict)
    tuned: dict[tuple[str, str], Tuned] = field(default_factory=dict)
    runs: dict[Key, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def outcomes(self, task: str, side: str) -> list[Outcome]:
        """The outcomes of one side on one task, by seed."""
        return [run["outcome"] for key, run in sorted(self.runs.items()) if key[:2] == (task, side)]

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "format": FORMAT,
            "budget": self.budget,
            "plans": self.plans,
            "environment": self.environment,
            "tuning": [{"task": t, "side": s, **found.to_json()} for (t, s), found in sorted(self.tuned.items())],
            "runs": [
                {"task": task, "side": side, "seed": seed, **run, "outcome": run["outcome"].to_json()}
                for (task, side, seed), run in sorted(self.runs.items())
            ],
        }


def read(file: Path) -> Results:
    """Read what `measure` wrote.

    Raises:
        DataError: the file cannot be read, or is none of these.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise KeyError(values["format"])
        found = Results(values["budget"], values["plans"], environment=values["environment"])
        for entry in values["tuning"]:
            key = entry.pop("task"), entry.pop("side")
            found.tuned[key] = Tuned.from_json(entry)
        for run in values["runs"]:
            number = run.pop("task"), run.pop("side"), run.pop("seed")
            found.runs[number] = {**run, "outcome": Outcome.from_json(run["outcome"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"sequences: expected results of this protocol in {file}, got {type(error).__name__}: {error}; move the "
            "file away, or name another"
        ) from error
    return found


def measure(
    file: Path,
    budget: Budget,
    *,
    seeds: Sequence[int],
    tasks: Sequence[str],
    sides: Sequence[str],
    trials: int,
    command: str,
    threads: int = 1,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> Results:
    """Tune every side on every task, then train it with every seed; what the file holds is not done again.

    Args:
        file: JSON, written anew after every search and run.
        budget: picks the sizes.
        seeds: to run; all sides and tasks of one seed come before those of the next.
        tasks: of `plans.tasks()`.
        sides: of `models.SIDES`.
        trials: of the search for each side's rate; 0 leaves the shared one.
        command: noted beside each run.
        threads, device: of torch.
        say: gets a line about each run.

    Raises:
        ConfigError: trials below 0.
        DataError: the file holds something else, or runs of another plan.
    """
    if trials < 0:
        raise ConfigError(f"sequences.measure: expected trials >= 0, got {trials}; 0 is for no tuning")
    results = read(file) if file.exists() else Results(budget.name)
    wanted = {task: json.loads(json.dumps(asdict(plans.plan(task, budget)))) for task in tasks}
    for task, plan in wanted.items():
        if results.budget != budget.name or results.plans.get(task, plan) != plan:
            raise DataError(
                f"sequences.measure: expected runs of {task!r} by today's plan for the budget {budget.name!r} in "
                f"{file}, got others; name another file, or move this one away"
            )
    results.plans |= wanted
    results.environment = environment(torch.device(device))
    scratch = file.parent / SCRATCH / file.stem
    for seed in seeds:
        for task in tasks:
            for side in sides:
                folder = scratch / re.sub(r"[^\w-]", "_", f"{task} {side}")
                if (task, side) not in results.tuned and trials:
                    trial = Trial(budget, side, TUNING_SEED, device, folder / "tuning")
                    results.tuned[task, side] = _search(trial, task, trials, threads)
                    atomic_write_json(file, results.to_json(), indent=1)
                    say(f"{task}, {side}: rate {float(str(results.tuned[task, side].best['rate'])):.2g}")
                if (task, side, seed) in results.runs:
                    continue
                best = results.tuned[task, side].best if (task, side) in results.tuned else {}
                trial = Trial(budget, side, seed, device, folder / f"seed-{seed}", best)
                outcome, seconds = perform(functools.partial(_run, task), trial, threads)
                results.runs[task, side, seed] = {
                    "outcome": outcome,
                    "seconds": seconds,
                    "commit": commit(),
                    "command": command,
                }
                atomic_write_json(file, results.to_json(), indent=1)
                shutil.rmtree(trial.scratch, ignore_errors=True)
                say(_line(task, side, seed, outcome, seconds))
    shutil.rmtree(scratch, ignore_errors=True)
    return results


def _run(task: str, trial: Trial) -> Outcome:
    return protocol.side(trial.side, trial, task)


def _search(trial: Trial, task: str, trials: int, threads: int) -> Tuned:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    trial.scratch.mkdir(parents=True, exist_ok=True)

    def objective(number: int, parameters: Any) -> float:
        own = Trial(trial.budget, trial.side, trial.seed, trial.device, trial.scratch / str(number))
        return protocol.rate_of(trial.side, task, own, parameters)

    start = {"rate": plans.plan(task, trial.budget).recipe.rate}
    return tune(
        objective, protocol.SPACE, trials, seed=trial.seed, storage=trial.scratch / "search.sqlite", start=start
    )


def _line(task: str, side: str, seed: int, outcome: Outcome, seconds: float) -> str:
    (metric, quantity), *_ = outcome.metrics.items()
    samples = outcome.metrics["samples to threshold"].value
    reached = "threshold not reached" if samples is None else f"threshold after {samples:.0f} samples"
    value = "none" if quantity.value is None else f"{quantity.value:.4g} {quantity.unit}"
    return f"{task}, {side}, seed {seed}: {metric} {value}, {reached}, {seconds:.0f} s"
