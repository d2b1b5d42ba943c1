"""Interleaved timing: every repetition runs each side once, so that a drifting machine moves all sides alike."""

from __future__ import annotations

import contextlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toreq.hardware import reuse_freed_memory
from toreq.training.environment import environment as machine


@dataclass(frozen=True)
class Timing:
    """Seconds of one side over all repetitions: median and minimum of the wall clock, the median CPU time of the
    process, and the quartiles of the wall clock."""

    median: float
    minimum: float
    cpu: float
    lower: float
    upper: float

    @classmethod
    def of(cls, wall: list[float], cpu: list[float]) -> Timing:
        """The summary of the repetitions' wall-clock and CPU seconds."""
        lower, upper = (float(q) for q in np.quantile(wall, (0.25, 0.75)))
        return cls(statistics.median(wall), min(wall), statistics.median(cpu), lower, upper)

    def milliseconds(self) -> dict[str, float]:
        """The numbers as columns of a bench's rows."""
        return {
            "median_ms": self.median * 1e3,
            "minimum_ms": self.minimum * 1e3,
            "lower_quartile_ms": self.lower * 1e3,
            "upper_quartile_ms": self.upper * 1e3,
            "cpu_ms": self.cpu * 1e3,
        }


def interleaved(sides: Mapping[str, Callable[[], object]], repetitions: int, warmup: int = 3) -> dict[str, Timing]:
    """Time each side ``repetitions`` times, in turn.

    Args:
        sides: name -> what to run.
        repetitions: counted runs of each side, at least 1.
        warmup: uncounted runs of each side first.
    """
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + repetitions):
        for name, run in sides.items():
            started, used = time.perf_counter(), time.process_time()
            run()
            if turn >= warmup:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - used)
    return {name: Timing.of(wall[name], cpu[name]) for name in sides}


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """A context with ``count`` threads and subnormal numbers flushed to zero; the thread count is put back after it.

    Freed memory stays in the process, as in a training run, so that no side waits for the kernel's page clearing.
    A state that decays to subnormal numbers makes a step many times slower, on whichever side it happens. The flag
    stays set: torch cannot read it, and threads that exist already keep the one they were started with.
    """
    before = torch.get_num_threads()
    torch.set_flush_denormal(True)
    reuse_freed_memory()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def denormals_flushed() -> bool:
    """Whether this thread flushes subnormal float32 numbers to zero; measured."""
    return float(torch.tensor([1e-30]) * torch.tensor([1e-10])) == 0.0


def commit() -> str | None:
    """The commit of the checkout that holds this file, ``+`` behind it when the source differs; None outside of one."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # an installed copy may lie inside the checkout of something else
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    head, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--", "../")
    return None if head is None else head + ("+" if changed else "")


def environment() -> dict[str, Any]:
    """What a timing depends on: versions, processor, threads, whether subnormals are flushed, and the commit."""
    found = machine(torch.device("cpu"))
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": found["processor"],
        "cores": found["cores"],
        "threads_available": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "denormals_flushed": denormals_flushed(),
        "commit": commit(),
    }


def ratio(name: str, value: float | None, target: float | None, at_most: bool = True) -> dict[str, Any]:
    """One line of a benchmark's verdict; without a target nothing is judged, and a missing value holds nothing."""
    holds = None if target is None else value is not None and bool(value <= target if at_most else value >= target)
    return {"name": name, "value": value, "target": target, "holds": holds}
