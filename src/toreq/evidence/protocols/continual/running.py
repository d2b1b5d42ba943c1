"""Measure the baselines on the streams, tuned with equal trials, into one file that is written after every run."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from toreq.bench.timing import commit
from toreq.errors import ConfigError
from toreq.evidence import budgets, store
from toreq.evidence.budgets import Budget
from toreq.evidence.claim import TUNING_SEED, Outcome, Trial
from toreq.evidence.protocols.continual import sides
from toreq.evidence.tuning import tune_side
from toreq.evidence.workers import perform
from toreq.io import atomic_write_json
from toreq.training.environment import environment
from toreq.tuning import Tuned

FORMAT = "toreq-continual"
Key = tuple[str, str, int]
"""Stream, side, seed."""


@dataclass
class Results:
    """What a file holds.

    Attributes:
        budget: name of the budget.
        trials: of tuning, for each side and stream.
        streams: name -> `Stream.describe`.
        tuned: (stream, side) -> what the search found.
        runs: key -> outcome, seconds, the tuned values it had.
        command, commit, environment: of the latest run.
    """

    budget: str
    trials: int
    streams: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuned: dict[tuple[str, str], Tuned] = field(default_factory=dict)
    runs: dict[Key, dict[str, Any]] = field(default_factory=dict)
    command: str = ""
    commit: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def outcomes(self) -> dict[Key, Outcome]:
        """Key -> outcome."""
        return {key: run["outcome"] for key, run in self.runs.items()}

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "format": FORMAT,
            "budget": self.budget,
            "trials": self.trials,
            "protocol": fingerprint(self.budget, self.trials),
            "command": self.command,
            "commit": self.commit,
            "environment": self.environment,
            "streams": self.streams,
            "tuning": [{"stream": a, "side": b, **t.to_json()} for (a, b), t in sorted(self.tuned.items())],
            "runs": [
                {"stream": a, "side": b, "seed": n, **{k: v for k, v in run.items() if k != "outcome"}}
                | run["outcome"].to_json()
                for (a, b, n), run in sorted(self.runs.items())
            ],
        }


def load(file: Path) -> Results:
    """The results of a file; raises KeyError, TypeError or ValueError for something else."""
    values = json.loads(file.read_text(encoding="utf-8"))
    if values["format"] != FORMAT:
        raise ValueError(f"its format is {values['format']!r}")
    found = Results(values["budget"], values["trials"], dict(values["streams"]))
    found.command, found.commit, found.environment = values["command"], values["commit"], values["environment"]
    for entry in values["tuning"]:
        stream, side = entry.pop("stream"), entry.pop("side")
        found.tuned[stream, side] = Tuned.from_json(entry)
    for run in values["runs"]:
        key = (str(run["stream"]), str(run["side"]), int(run["seed"]))
        found.runs[key] = {
            "outcome": Outcome.from_json(run),
            "seconds": run["seconds"],
            "tuned": run["tuned"],
            "commit": run["commit"],
        }
    return found


def fingerprint(budget: str, trials: int) -> str:
    """Sixteen hexadecimal digits of what the numbers depend on: sizes, sides and their search."""
    size = budgets.find(budget)
    described = {
        "sizes": asdict(sides.sizes(size)),
        "streams": {name: sides.create(name, size, 0).fingerprint for name in sides.STREAMS},
        "tuning": {name: sides.tuning(name, trials).describe() for name in sides.STREAMS} if trials else None,
        "shipped": {name: dict(side.shipped) for name, side in sides.SIDES.items()},
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def opened(file: Path, budget: str, trials: int) -> tuple[Results, str]:
    """The results to go on with, and what was set aside for it; corrupt and stale files are renamed, never deleted."""
    if not file.exists():
        return Results(budget, trials), ""
    try:
        if json.loads(file.read_text(encoding="utf-8"))["protocol"] == fingerprint(budget, trials):
            return load(file), ""
        why = "stale"
    except (ValueError, KeyError, TypeError):
        why = "corrupt"
    kept = store.set_aside(file, why)
    return Results(budget, trials), f"{file.name} is {why}; it is kept as {kept.name}, and every run is made anew"


def measure(
    file: Path,
    budget: Budget,
    *,
    seeds: Sequence[int],
    streams: Sequence[str] = tuple(sides.STREAMS),
    names: Sequence[str] = tuple(sides.SIDES),
    trials: int = sides.TRIALS,
    threads: int = 1,
    device: str = "cpu",
    command: str = "",
    say: Callable[[str], None] = print,
) -> Results:
    """Tune and run sides on streams; what the file holds already is kept, and an interrupted run goes on.

    Args:
        file: of the results.
        budget: picks the sizes.
        seeds: of the runs; tuning has a seed of its own.
        streams, names: what is measured.
        trials: of tuning; 0 takes the values that sides ship with.
        threads: of torch.
        device: where learners compute.
        command: what was typed, for the record.
        say: told of every run.

    Raises:
        ConfigError: a name that is unknown, or a negative number of trials.
        ToreqError: after Ctrl-C; the same call goes on.
    """
    if trials < 0 or not seeds:
        raise ConfigError(f"continual: expected trials >= 0 and a seed, got {trials} and {list(seeds)}; give both")
    results, news = opened(file, budget.name, trials)
    if news:
        say(news)
    store.prepare_scratch(file.parent)
    # another one for another protocol, so that nothing old is continued
    scratch = file.parent / store.SCRATCH / f"{file.stem}-{fingerprint(budget.name, trials)}"
    results.command, results.commit = command, commit()
    torch.set_num_threads(threads)
    results.environment = environment(torch.device(device))
    for stream in streams:
        results.streams[stream] = sides.create(stream, budget, 0).describe()
        for name in names:
            if not sides.fits(name, stream) or sides.too_dear(name, stream, budget.name):
                continue
            place = f"{stream}-{name}".replace(" ", "-").replace(",", "")
            trial = Trial(budget, name, 0, device, (scratch / place).resolve())
            _measure(results, stream, trial, seeds, trials, threads, functools.partial(_keep, file, results), say)
    return results


def _keep(file: Path, results: Results) -> None:
    atomic_write_json(file, results.to_json(), indent=1)


def _measure(
    results: Results,
    stream: str,
    trial: Trial,
    seeds: Sequence[int],
    trials: int,
    threads: int,
    keep: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    name = trial.side
    missing = [seed for seed in seeds if (stream, name, seed) not in results.runs]
    if not missing:
        return
    tuned = _tuned(results, stream, trial, trials, threads, keep, say) if trials else {}
    for seed in missing:
        own = Trial(trial.budget, name, seed, trial.device, trial.scratch / f"seed{seed}", tuned)
        outcome, seconds = perform(functools.partial(_side, stream=stream), own, threads)
        results.runs[stream, name, seed] = {
            "outcome": outcome,
            "seconds": seconds,
            "tuned": dict(tuned),
            "commit": results.commit,
        }
        keep()
        shutil.rmtree(own.scratch, ignore_errors=True)
        say(f"{stream}, {name}, seed {seed}: {outcome.metrics['final accuracy'].value:.2f} % in {seconds:.1f} s")


def _side(trial: Trial, stream: str) -> Outcome:
    return sides.side(trial.side, trial, stream)


def _tuned(
    results: Results,
    stream: str,
    trial: Trial,
    trials: int,
    threads: int,
    keep: Callable[[], None],
    say: Callable[[str], None],
) -> Mapping[str, Any]:
    """The tuned values of a side: found before, those of another side, or searched now."""
    side = sides.find(trial.side)
    if side.like:
        if (stream, side.like) not in results.tuned:
            raise ConfigError(
                f"continual: expected {side.like!r} to be tuned before {trial.side!r}, which takes its values; run it "
                "too"
            )
        return results.tuned[stream, side.like].best
    if side.space is None:
        return {}
    if (stream, trial.side) not in results.tuned:
        own = Trial(trial.budget, trial.side, TUNING_SEED, trial.device, trial.scratch / "tuning")
        search = functools.partial(tune_side, sides.tuning(stream, trials))
        found = perform(search, own, threads)[0].search
        assert found is not None
        results.tuned[stream, trial.side] = found
        keep()
        shutil.rmtree(own.scratch, ignore_errors=True)
        best = ", ".join(f"{k} {v:.3g}" for k, v in found.best.items())
        say(f"{stream}, {trial.side}: {found.value:.2f} % on held-out images with {best} ({found.seconds:.0f} s)")
    return results.tuned[stream, trial.side].best
