"""Running the shared sides over seeds into one file, and reading it again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toreq.bench.timing import commit
from toreq.errors import DataError
from toreq.evidence import budgets, store
from toreq.evidence.claim import Outcome, Trial
from toreq.evidence.protocols.robustness import sides
from toreq.evidence.protocols.robustness.protocol import side
from toreq.evidence.workers import perform
from toreq.io import atomic_write_json
from toreq.training.environment import environment

PROTOCOL = "robustness"
VERSION = 1
"""Raised when the protocol changes, so that runs of two versions are never in one file."""


@dataclass(frozen=True)
class Measured:
    """A shared side as a protocol of one trial, with or without attacks."""

    attacked: bool

    def __call__(self, trial: Trial) -> Outcome:
        """Train and measure the trial's side."""
        return side(trial.side, trial, attacked=self.attacked)


def run(
    budget: str,
    seeds: int,
    names: Sequence[str],
    out: Path,
    *,
    attacked: bool = True,
    device: str = "cpu",
    threads: int = 1,
    command: str = "",
    say: Callable[[str], None] = print,
) -> Mapping[str, Any]:
    """Run sides over seeds 0 .. seeds - 1; every run is written as it ends, and one that is there is kept.

    Raises:
        ConfigError: for an unknown budget or side.
        DataError: ``out`` holds something else, or runs of another version, budget or setting.
    """
    chosen = budgets.find(budget)
    for name in names:
        sides.find(name)
    head = {"protocol": PROTOCOL, "version": VERSION, "budget": budget, "attacked": attacked}
    runs = load(out, head)["runs"] if out.exists() else []
    store.prepare_scratch(out.parent)
    done = {(run["side"], run["seed"]) for run in runs}
    for seed in range(seeds):
        for name in names:
            if (name, seed) in done:
                continue
            scratch = out.parent / store.SCRATCH / f"{out.stem}-{_slug(name)}-{seed}"
            started = time.perf_counter()
            outcome, seconds = perform(Measured(attacked), Trial(chosen, name, seed, device, scratch), threads)
            runs.append({"side": name, "seed": seed, "seconds": seconds, "commit": commit(), **outcome.to_json()})
            runs.sort(key=lambda entry: (list(sides.SIDES).index(entry["side"]), entry["seed"]))
            about = {"command": command, "environment": environment(torch.device(device))}
            atomic_write_json(out, {**head, **about, "runs": runs}, indent=1)
            store.drop_scratch(scratch)
            say(f"{name}, seed {seed}: {time.perf_counter() - started:.0f} s")
    return load(out, head)


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def load(file: Path, head: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of a file that `run` wrote.

    Raises:
        DataError: it is no such file, or not of the settings in ``head``.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        wanted = {"protocol": PROTOCOL, "version": VERSION, **(head or {})}
        differing = {key: found[key] for key, value in wanted.items() if found[key] != value}
        for entry in found["runs"]:
            Outcome.from_json(entry)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"robustness: expected results in {file}, got something else ({type(error).__name__}: {error}); move the "
            "file away, or write to another"
        ) from error
    if differing:
        raise DataError(
            f"robustness: expected results with {wanted} in {file}, got {differing}; move the file away, or write to "
            "another"
        )
    return found


def outcomes(found: Mapping[str, Any]) -> dict[tuple[str, int], Outcome]:
    """(side, seed) -> outcome."""
    return {(entry["side"], entry["seed"]): Outcome.from_json(entry) for entry in found["runs"]}
