"""`toreq show`, `toreq check` and `toreq doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from toreq.cli.parsing import parse_set
from toreq.errors import ConfigError

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
    set: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE", help_behavior_hint="")
    ] = ()
    """An option of the system, as in arch=conv; not for a run, which has its own. (repeatable)"""

    def run(self, console: Console, command: str) -> int:
        """Check; returns the exit code."""
        from toreq import systems
        from toreq.diagnostics.check import run_check

        options = None
        if self.set:
            if Path(self.target).is_dir():
                raise ConfigError("check: expected --set beside a system's name, got it beside a run; leave it out")
            options = parse_set(self.set, lambda arch: systems.options(self.target, arch))
        return run_check(self.target, json_path=self.json, console=console, options=options)


@dataclass(frozen=True)
class Doctor:
    """Say what keeps a run from settling or learning, and the remedy of each."""

    run_folder: _Run
    """The run folder."""

    def run(self, console: Console, command: str) -> int:
        """Examine; returns the exit code."""
        from toreq.diagnostics.doctor import run_doctor

        return run_doctor(self.run_folder, console)
