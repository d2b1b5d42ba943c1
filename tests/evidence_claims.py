"""Claims for the tests of the evidence harness; a module of its own, so that worker processes can import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from toreq.evidence import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.workers import Done, Job, Report, perform

OURS, BASE = "ours", "baseline"


def scores(trial: Trial) -> Outcome:
    """90 for ours and 80 for the baseline, a little more with every seed."""
    note(trial)
    value = {OURS: 90.0, BASE: 80.0}[trial.side] + 0.1 * trial.seed
    curve = [(1.0, value - 1), (2.0, value), (3.0, None)]
    return Outcome({"score": Quantity(value, "%"), "radius": Quantity(0.5, "")}, {"score": curve}, Cost(12, 3.5e6, 100))


def noisy(trial: Trial) -> Outcome:
    """Numbers of the global generators: the same wherever and beside whatever they are drawn."""
    import torch

    draws = torch.randn(1000)
    value = float(draws.sum()) + float((torch.randn(64, 64) @ torch.randn(64, 64)).sum()) + len(trial.side)
    return Outcome({"score": Quantity(value, "%")})


def note(trial: Trial) -> None:
    """Append what runs to the file that the environment names."""
    if "EVIDENCE_LOG" in os.environ:
        with open(os.environ["EVIDENCE_LOG"], "a", encoding="utf-8") as log:
            log.write(f"{trial.side} {trial.seed}\n")


def mishaps(trial: Trial) -> Outcome:
    """What the side's name says."""
    if trial.side == "dies once" and not (trial.scratch / "been").exists():
        (trial.scratch / "been").touch()
        os._exit(7)
    if trial.side == "dies always":
        os.kill(os.getpid(), signal.SIGKILL)
    if trial.side == "raises":
        raise ValueError("no such luck")
    if trial.side == "warns":
        import warnings

        warnings.warn("a word of caution", stacklevel=1)
    return Outcome({"score": Quantity(1.0 + trial.seed, "%")}, notes=(f"process {os.getpid()}",))


def sleepy(trial: Trial) -> Outcome:
    """Seed 0 ends at once, the others do not end."""
    if trial.seed:
        time.sleep(120)
    return Outcome({"score": Quantity(1.0, "%")})


def make(run: Callable[[Trial], Outcome] = scores, sides: Sequence[str] = (OURS, BASE), **changes: Any) -> Claim:
    """A claim that ours scores at least 85 and more than the baseline."""
    own = sides[0]
    versus = (sides[1],) if len(sides) > 1 else ()
    fields: dict[str, Any] = {
        "id": "X1",
        "system": "toreqprop",
        "seed_file": "none",
        "sentence": "Ours <scores>.",
        "criteria": (
            Criterion("score", "score", "%", "at_least", own, target=85.0, words="about 85", aim=95.0),
            *(Criterion("ahead", "score", "%", "at_least", own, versus=(side,)) for side in versus),
        ),
        "protocol": "Run it and read the score.",
        "sides": dict.fromkeys(sides, "a side"),
        "run": run,
        "picture": Picture("Score", x_label="epoch", y_label="score (%)", curves=("score",)),
    }
    return Claim(**{**fields, **changes})


class Inline:
    """A scheduler that runs jobs in this process; ``stop_after`` raises Ctrl-C after so many."""

    width = 1

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        for number, job in enumerate(jobs):
            if number == self.stop_after:
                raise KeyboardInterrupt
            outcome, seconds = perform(job.claim.run, job.trial, 1)
            done(job, Report(outcome, seconds, 1))
