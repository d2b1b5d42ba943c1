"""`toreq show`, `toreq check` and `toreq doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

_Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True)
class Show:
    """Draw a run: learning curve, residual against step, energy descent, steps and confusion matrix."""

    run_folder: _Run
    """The run folder."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: RUN/plots)")] = None
    """Where the plots are written."""

    def run(self, console: Console, command: str) -> int:
        """Draw; returns the exit code."""
        from toreq.diagnostics.show import run_show

        return run_show(self.run_folder, self.out, console)


@dataclass(frozen=True)
class Check:
    """Compare the gradient of each supported estimator with the implicit gradient and finite differences.

    Also memory against steps, the radius of the relaxation and, for a run, the accuracy with couplings off.
    """

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SYSTEM|RUN")]
    """A system by name, or a run folder."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the results to this file."""

    def run(self, console: Console, command: str) -> int:
        """Check; returns the exit code."""
        from toreq.diagnostics.check import run_check

        return run_check(self.target, json_path=self.json, console=console)


@dataclass(frozen=True)
class Doctor:
    """Say what keeps a run from settling or learning, and the remedy of each."""

    run_folder: _Run
    """The run folder."""

    def run(self, console: Console, command: str) -> int:
        """Examine; returns the exit code."""
        from toreq.diagnostics.doctor import run_doctor

        return run_doctor(self.run_folder, console)
