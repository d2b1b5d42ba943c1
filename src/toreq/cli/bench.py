"""`toreq bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from toreq.cli.parsing import literal
from toreq.errors import ConfigError


@dataclass(frozen=True)
class Bench:
    """Measure epochs, overhead, rates, memory, settling and scaling, on a machine with nothing else to do.

    Benches: epoch, overhead, roofline, memory, settling, systems, scaling, time-to-accuracy. `epoch`, `memory` and
    `time-to-accuracy` compare with torchdeq: `pip install "toreq[bench]"`.
    """

    names: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME...]", help_behavior_hint="")
    ] = ()
    """Benches to run; all of them, in this order, when left out."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the numbers to this file after each bench; other benches' results that it holds are kept."""
    plots: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Draw one picture per bench into this folder."""
    threads: Annotated[
        tuple[int, ...], tyro.conf.arg(metavar="COUNT...", help_behavior_hint="(default: those of each bench, 1 2)")
    ] = ()
    """Numbers of threads to measure at."""
    set: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE", help_behavior_hint="")
    ] = ()
    """A parameter of the one bench named, as in repetitions=5. (repeatable)"""

    def run(self, console: Console, command: str) -> int:
        """Measure; returns the exit code."""
        from toreq.bench.registry import run_benches

        run_benches(
            self.names,
            console,
            threads=self.threads or None,
            chosen=_chosen(self.set),
            json_path=self.json,
            plots=self.plots,
        )
        return 0


def _chosen(assignments: tuple[str, ...]) -> dict[str, object]:
    chosen: dict[str, object] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key or key in chosen:
            raise ConfigError(f"--set: expected key=value, each key once, got {assignment!r}; e.g. --set repetitions=5")
        chosen[key] = literal(text)
    return chosen
