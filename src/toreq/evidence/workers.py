"""Running trials: in this process's children, several at once; one that dies is run again, once."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, Protocol

import torch

from toreq.evidence.claim import Claim, Outcome, Trial
from toreq.evidence.tuning import tune_side
from toreq.hardware import reuse_freed_memory

ATTEMPTS = 2
GRACE = 20.0
"""Seconds that a stopped worker has to save what it can."""


@dataclass(frozen=True)
class Job:
    """One trial of a claim, or with ``tunes`` the search for the parameters of its side."""

    claim: Claim
    trial: Trial
    tunes: bool = False

    @property
    def protocol(self) -> Callable[[Trial], Outcome]:
        """What is run, in a form that can be sent to another process."""
        if not self.tunes:
            return self.claim.run
        assert self.claim.tuning is not None
        return functools.partial(tune_side, self.claim.tuning)

    @property
    def name(self) -> str:
        """What is said of it: its claim, side and seed."""
        seed = "tuning" if self.tunes else f"seed {self.trial.seed}"
        return f"{self.claim.id} {self.trial.side}, {seed}"


@dataclass(frozen=True)
class Report:
    """How a job ended: an outcome, or the reason why there is none."""

    outcome: Outcome | None
    seconds: float
    attempts: int
    reason: str = ""
    exit_code: int | None = None


Done = Callable[[Job, Report], None]


class Scheduler(Protocol):
    """Something that runs jobs and calls ``done`` as each of them ends."""

    @property
    def width(self) -> int:
        """How many jobs run at once."""
        ...

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Run all jobs; an exception of ``done`` stops them."""
        ...


def perform(protocol: Callable[[Trial], Outcome], trial: Trial, threads: int) -> tuple[Outcome, float]:
    """Run one trial in this process and return its outcome with the seconds it took.

    Threads are pinned, subnormal numbers flushed, and the global generator seeded, so that the numbers do not depend
    on what ran before or beside it. Warnings become notes.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    reuse_freed_memory()
    torch.manual_seed(trial.seed)
    trial.scratch.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)
        outcome = protocol(trial)
    said = dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in caught)
    notes = (*outcome.notes, *said)
    return dataclasses.replace(outcome, notes=notes), time.perf_counter() - started


def _serve(pipe: Any, threads: int) -> None:
    """A worker's life: take orders until the pipe closes."""
    if hasattr(os, "setpgrp"):
        # Ctrl-C in the terminal goes to the parent alone, which passes it on once: a second one would not let us save.
        os.setpgrp()
    threading.Thread(target=_follow_parent, daemon=True).start()
    while True:
        try:
            order = pipe.recv()
        except (EOFError, OSError):
            return
        protocol, trial = order
        try:
            outcome, seconds = perform(protocol, trial, threads)
            answer: tuple[Any, ...] = ("done", outcome.to_json(), seconds)
        except KeyboardInterrupt:
            return
        except Exception as error:  # a protocol may raise anything: the parent records it and the other runs go on
            answer = ("failed", f"{type(error).__name__}: {error}", traceback.format_exc())
        pipe.send(answer)


def _follow_parent() -> None:
    """Stop this worker once its parent is gone, whatever killed that: nobody would read what it finds."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)  # a trainer saves
    time.sleep(GRACE)
    os._exit(1)


@dataclass
class _Worker:
    process: Any
    pipe: Any
    job: Job | None = None
    attempts: int = 0
    started: float = 0.0

    @classmethod
    def start(cls, threads: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends when the worker does
        return cls(process, ours)

    def give(self, job: Job, attempts: int) -> None:
        self.job, self.attempts, self.started = job, attempts, time.perf_counter()
        self.pipe.send((job.protocol, job.trial))


@dataclass(frozen=True)
class Local:
    """Jobs in worker processes of this machine.

    Args:
        jobs: workers at once, at least 1.
        threads: of each worker; the numbers do not depend on ``jobs``.
    """

    jobs: int = 1
    threads: int = 1

    @property
    def width(self) -> int:
        """How many jobs run at once."""
        return self.jobs

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Run all jobs; a worker that dies has its job run again once, the others go on."""
        waiting = deque((job, 1) for job in jobs)
        with _terminable(), _stopping() as workers:
            while waiting or any(w.job is not None for w in workers):
                _assign(waiting, workers, self.jobs, self.threads)
                for pipe in wait([w.pipe for w in workers if w.job is not None]):
                    worker = next(w for w in workers if w.pipe is pipe)
                    job, attempts = worker.job, worker.attempts
                    assert job is not None
                    seconds = time.perf_counter() - worker.started
                    try:
                        kind, content, detail = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.process.join()
                        workers.remove(worker)
                        code = worker.process.exitcode
                        if attempts < ATTEMPTS:
                            waiting.appendleft((job, attempts + 1))
                        else:
                            why = f"the worker died {attempts} times ({_exit(code)})"
                            done(job, Report(None, seconds, attempts, why, code))
                        continue
                    worker.job = None
                    if kind == "done":
                        done(job, Report(Outcome.from_json(content), detail, attempts))
                    else:
                        done(job, Report(None, seconds, attempts, content))


def _assign(waiting: deque[tuple[Job, int]], workers: list[_Worker], most: int, threads: int) -> None:
    while waiting:
        idle = next((w for w in workers if w.job is None), None)
        if idle is None:
            if len(workers) >= most:
                return
            idle = _Worker.start(threads)
            workers.append(idle)
        job, attempts = waiting.popleft()
        try:
            idle.give(job, attempts)
        except OSError:
            # it died while it waited for work: the job has not begun, and starts in another one
            idle.process.join()
            workers.remove(idle)
            waiting.appendleft((job, attempts))


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM counts as Ctrl-C; Python lets only the main thread say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _stopping() -> Iterator[list[_Worker]]:
    """The list of workers; at the end idle ones leave, and after Ctrl-C busy ones save first."""
    workers: list[_Worker] = []
    try:
        yield workers
    except BaseException:
        for worker in workers:
            if worker.job is not None and worker.process.pid is not None and worker.process.is_alive():
                os.kill(worker.process.pid, signal.SIGINT)
        deadline = time.monotonic() + GRACE
        for worker in workers:
            if worker.job is not None:
                # a trainer answers that it was stopped after it has saved, any other worker leaves
                worker.pipe.poll(max(0.0, deadline - time.monotonic()))
        raise
    finally:
        for worker in workers:
            worker.pipe.close()
        for worker in workers:
            worker.process.join(5.0)
            if worker.process.is_alive():
                worker.process.terminate()
                worker.process.join()
