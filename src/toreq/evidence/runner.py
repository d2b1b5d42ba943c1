"""`toreq evidence run`: plan the jobs, run what is missing, keep every result as it comes."""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from toreq.bench.timing import commit
from toreq.errors import ConfigError, ToreqError, nearest
from toreq.evidence import budgets, store
from toreq.evidence.budgets import Budget
from toreq.evidence.claim import Claim, Trial
from toreq.evidence.registry import chosen
from toreq.evidence.store import RESULTS, Result
from toreq.evidence.workers import Job, Local, Report, Scheduler
from toreq.training.environment import environment
from toreq.tuning import require_optuna

SCHEDULERS = ("local", "ray")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def scheduler(name: str, jobs: int, threads: int) -> Scheduler:
    """A scheduler by name.

    Raises:
        ConfigError: an unknown name, or counts below 1.
    """
    if name not in SCHEDULERS:
        raise ConfigError(f"evidence: expected a scheduler, got {name!r}; {nearest(name, SCHEDULERS)}")
    if jobs < 1 or threads < 1:
        raise ConfigError(f"evidence: expected at least one job and one thread, got {jobs} and {threads}; use 1")
    if name == "local":
        return Local(jobs, threads)
    from toreq.evidence.cluster import Ray

    return Ray(jobs, threads)


def run(
    names: Sequence[str] | Sequence[Claim],
    *,
    budget: str = "full",
    seeds: int | None = None,
    jobs: int | None = None,
    threads: int = 1,
    results: Path = RESULTS,
    scheduler_name: str = "local",
    device: str = "cpu",
    again: bool = False,
    console: Console | None = None,
    command: str = "",
) -> list[Result]:
    """Run claims at a budget and return their results; runs that a file in ``results`` holds already are kept.

    Sides that are tuned are tuned first, each in a job of its own, and then run with what was found.

    Args:
        names: ids of claims, or claims; all of them when empty.
        budget: ``smoke``, ``quick`` or ``full``.
        seeds: seeds 0 .. N-1 of every side; each claim's own number when None (1 at a smoke budget).
        jobs: at once; one for each core when None.
        threads: of each job.
        results: folder of the results.
        scheduler_name: ``local`` or ``ray``.
        device: where the protocols compute.
        again: run finished jobs anew, searches included.
        console: where progress is shown.
        command: what was typed, for the message after Ctrl-C; results record a command that has no local paths in it.

    Raises:
        ConfigError: an unknown claim, budget or scheduler, a count below 1, or no optuna where sides are tuned.
        ToreqError: after Ctrl-C, with the command that goes on.
    """
    wanted = [n if isinstance(n, Claim) else chosen([n])[0] for n in names] or chosen([])
    wanted = list({c.id: c for c in wanted}.values())
    size = budgets.find(budget)
    if seeds is not None and seeds < 1:
        raise ConfigError(f"evidence: expected at least one seed, got {seeds}; leave it out for the claim's own")
    width = jobs if jobs is not None else max(1, cores() // max(1, threads))
    shared, alone = scheduler(scheduler_name, width, threads), scheduler(scheduler_name, 1, threads)
    session = _Session(size, results, device, console or Console(quiet=True), command)
    flags = ["--budget", budget, *([] if seeds is None else ["--seeds", str(seeds)])]
    flags += [
        *([] if threads == 1 else ["--threads", str(threads)]),
        *([] if device == "cpu" else ["--device", device]),
    ]
    for claim in wanted:
        session.open(claim, seeds, again)
        session.commands[claim.id] = shlex.join(["toreq", "evidence", "run", claim.id, *flags])
    if session.searches:
        require_optuna()
    with session:
        if session.searches:
            shared.run(session.searches, session.done)
        session.hand_over()
        # timing and memory claims come last, one after the other, with nothing beside them
        together = [job for job in session.todo if not job.claim.exclusive]
        if together:
            shared.run(together, session.done)
        for claim in wanted:
            mine = [job for job in session.todo if job.claim is claim and claim.exclusive]
            if mine:
                alone.run(mine, session.done)
    return [session.results[c.id] for c in wanted]


class _Session:
    """What one call of `run` has done and has yet to do."""

    def __init__(self, budget: Budget, results: Path, device: str, console: Console, command: str) -> None:
        self.budget, self.folder, self.device, self.console = budget, results, device, console
        self.command, self.commands = command, dict[str, str]()
        self.commit, self.environment = commit(), environment(torch.device(device))
        self.results: dict[str, Result] = {}
        self.searches: list[Job] = []
        self.todo: list[Job] = []
        self.finished: set[int] = set()  # ids of the jobs that have ended
        self.seconds: dict[tuple[str, str, bool], list[float]] = {}
        self.started = time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def open(self, claim: Claim, seeds: int | None, again: bool) -> None:
        """Read what is there of a claim and plan what is missing."""
        result = store.load(self.folder, claim.id, self.budget.name)
        if result is not None and result.stale(claim):
            kept = store.set_aside(store.path(self.folder, claim.id, self.budget.name), "stale")
            warnings.warn(
                f"evidence: expected results of the present protocol of {claim.id}, got those of an earlier one; they "
                f"are kept as {kept.name}, and every run is made anew",
                stacklevel=2,
            )
            result = None
        if result is None:
            result = Result(claim.id, self.budget.name, claim.fingerprint)
        self.results[claim.id] = result
        self._plan_searches(claim, result, again)
        result.forget_untuned(claim)
        default = {side: claim.prescribed(side) if self.budget.conclusive else 1 for side in claim.sides}
        counts = default if seeds is None else dict.fromkeys(claim.sides, seeds)
        for seed in range(max(counts.values())):
            for side in claim.sides:
                if seed >= counts[side]:
                    continue
                if again or (side, seed) not in result.runs:
                    where = store.scratch(self.folder, claim, self.budget.name, side, seed).resolve()
                    self.todo.append(Job(claim, Trial(self.budget, side, seed, self.device, where)))
                else:
                    self._took(claim, side, False, result.runs[side, seed]["seconds"])

    def _plan_searches(self, claim: Claim, result: Result, again: bool) -> None:
        if claim.tuning is None:
            return
        for side in claim.tuning.spaces:
            if side in result.tuning and not again:
                self._took(claim, side, True, result.tuning[side].seconds)
                continue
            where = store.scratch(self.folder, claim, self.budget.name, side, "tuning").resolve()
            trial = Trial(self.budget, side, claim.tuning.seed, self.device, where)
            self.searches.append(Job(claim, trial, tunes=True))

    def hand_over(self) -> None:
        """Give the runs what the searches found; those of a side whose search failed are left out."""
        found: list[Job] = []
        for job in self.todo:
            tuning, side = job.claim.tuning, job.trial.side
            if tuning is None or side in tuning.untuned:
                found.append(job)
            elif side in self.results[job.claim.id].tuning:
                best = self.results[job.claim.id].tuning[side].best
                where = store.tuned_scratch(job.trial.scratch, best)
                found.append(dataclasses.replace(job, trial=dataclasses.replace(job.trial, tuned=best, scratch=where)))
        self.todo = found

    @property
    def jobs(self) -> list[Job]:
        """All jobs of this session, searches first."""
        return self.searches + self.todo

    def _took(self, claim: Claim, side: str, tunes: bool, seconds: float) -> None:
        self.seconds.setdefault((claim.id, side, tunes), []).append(seconds)

    def __enter__(self) -> _Session:
        store.prepare_scratch(self.folder)
        self.progress.start()
        self.task = self.progress.add_task("evidence", total=len(self.jobs), left="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.progress.stop()
        if isinstance(error, KeyboardInterrupt):
            again = f"; go on with: {self.command}" if self.command else "; the same call goes on"
            raise ToreqError(
                f"stopped after {len(self.finished)} of {len(self.jobs)} runs, which are kept{again}"
            ) from error

    def done(self, job: Job, report: Report) -> None:
        """Keep a job's outcome in its claim's file at once."""
        claim, trial = job.claim, job.trial
        result, key = self.results[claim.id], (trial.side, trial.seed)
        result.failures.pop(key, None)
        if report.outcome is None:
            result.failures[key] = {
                "reason": f"tuning: {report.reason}" if job.tunes else report.reason,
                "exit_code": report.exit_code,
                "attempts": report.attempts,
            }
            if job.tunes:
                result.tuning.pop(trial.side, None)
                result.forget_untuned(claim)
        elif job.tunes:
            assert report.outcome.search is not None
            result.tuning[trial.side] = report.outcome.search
            result.forget_untuned(claim)
        else:
            result.runs[key] = {
                "outcome": report.outcome,
                "seconds": report.seconds,
                "attempts": report.attempts,
                "commit": self.commit,
                **({} if claim.tuning is None else {"tuned": dict(trial.tuned)}),
            }
        if report.outcome is not None:
            self._took(claim, trial.side, job.tunes, report.seconds)
        result.command, result.commit = self.commands[claim.id], self.commit
        result.environment = self.environment
        store.save(self.folder, claim, result)
        if report.outcome is not None:
            store.drop_scratch(trial.scratch)
        self.finished.add(id(job))
        self._say(job, report)

    def _say(self, job: Job, report: Report) -> None:
        left = self._left()
        self.progress.update(self.task, completed=len(self.finished), total=len(self.jobs), left=left)
        how = f"{report.seconds:.1f} s" if report.outcome is not None else f"failed: {report.reason}"
        line = f"{job.name}: {how}"
        self.console.print(f"{line}  ({len(self.finished)} of {len(self.jobs)}{left})", soft_wrap=True, markup=False)

    def _left(self) -> str:
        """The time left: what the runs yet to come took in other seeds, at the pace of this session."""
        known = [s for taken in self.seconds.values() for s in taken]
        if not known or len(self.finished) == len(self.jobs):
            return ""
        mean = sum(known) / len(known)

        def expected(job: Job) -> float:
            taken = self.seconds.get((job.claim.id, job.trial.side, job.tunes), [])
            return sum(taken) / len(taken) if taken else mean

        ahead = sum(expected(j) for j in self.jobs if id(j) not in self.finished)
        behind = sum(expected(j) for j in self.jobs if id(j) in self.finished)
        if behind <= 0:
            return ""
        seconds = ahead * (time.perf_counter() - self.started) / behind
        return f", about {seconds:.0f} s left" if seconds < 120 else f", about {seconds / 60:.0f} min left"
