"""Interleaved timing: every repetition runs each side once, so that a drifting machine moves all sides alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one side over all repetitions: median and minimum of the wall clock, and the median CPU time."""

    median: float
    minimum: float
    cpu: float


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
    return {n: Timing(statistics.median(wall[n]), min(wall[n]), statistics.median(cpu[n])) for n in sides}


def environment() -> dict[str, Any]:
    """What a timing depends on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads_available": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def ratio(name: str, value: float, target: float | None, at_most: bool = True) -> dict[str, Any]:
    """One line of a benchmark's verdict; without a target nothing is judged."""
    holds = None if target is None else bool(value <= target if at_most else value >= target)
    return {"name": name, "value": value, "target": target, "holds": holds}
