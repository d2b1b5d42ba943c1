"""Claims for the tests of the evidence harness; a module of its own, so that worker processes can import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from toreq.evidence import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.workers import Done, Job, Report, perform
from toreq.tuning import Real, Space

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


def note(trial: Trial, what: str = "") -> None:
    """Append what runs to the file that the environment names."""
    if "EVIDENCE_LOG" in os.environ:
        with open(os.environ["EVIDENCE_LOG"], "a", encoding="utf-8") as log:
            log.write(f"{trial.side} {what or trial.seed}\n")


BEST = {OURS: 0.8, BASE: 0.2}
"""Where the objective of `tuned_score` has its maximum."""


def tuned_score(trial: Trial) -> Outcome:
    """100, less the distance of what was tuned from where it is best."""
    note(trial)
    return Outcome({"score": Quantity(100.0 - abs(float(trial.tuned["x"] or 0.0) - BEST[trial.side]), "%")})


def objective(trial: Trial, params: Mapping[str, Any]) -> float:
    """Largest at `BEST`, with a little noise of the global generators, which must be the same in every order."""
    import torch

    note(trial, "trial")
    assert trial.scratch.is_dir()
    assert not list(trial.scratch.iterdir())
    (trial.scratch / "checkpoint").touch()
    return -abs(params["x"] - BEST[trial.side]) + 1e-3 * float(torch.rand(()))


def dying(trial: Trial, params: Mapping[str, Any]) -> float:
    """The worker dies at first, in the second trial of the search."""
    been = trial.scratch.parent / "been"
    if trial.scratch.name == "trial-1" and not been.exists():
        been.touch()
        os._exit(9)
    return objective(trial, params)


def diverges(trial: Trial, params: Mapping[str, Any]) -> float:
    """No number for the baseline."""
    from toreq.errors import DivergenceError

    if trial.side == BASE:
        raise DivergenceError("it grew without bound")
    return objective(trial, params)


def tuning(run: Callable[[Trial, Mapping[str, Any]], float] = objective, **changes: Any) -> Tuning:
    """Six trials for each of both sides."""
    space = Space({"x": Real(0.0, 1.0)})
    fields: dict[str, Any] = {"objective": run, "spaces": {OURS: space, BASE: space}, "trials": 6}
    return Tuning(**{**fields, **changes})


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
            outcome, seconds = perform(job.protocol, job.trial, 1)
            done(job, Report(outcome, seconds, 1))
