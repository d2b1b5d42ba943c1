"""`toreq evidence`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console


def _option(metavar: str, hint: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


_Ids = tuple[str, ...]
_Results = Annotated[Path, _option("DIR", "(default: evidence/results)")]


@dataclass(frozen=True)
class List:
    """List the claims: criteria, seeds, sides, and the verdict where a result is there."""

    results: _Results = Path("evidence/results")
    """Folder of the results."""

    def run(self, console: Console, command: str) -> int:
        """Print the table; returns the exit code."""
        from toreq.evidence.report import show_list

        show_list(self.results, console)
        return 0


@dataclass(frozen=True)
class Run:
    """Run claims; finished runs are kept, and what is missing is run.

    Each run of a side under a seed is a job of its own, written as it ends. Ctrl-C keeps what is done, and the same
    command goes on. Claims about time and memory run alone, after the others.
    """

    ids: Annotated[_Ids, tyro.conf.Positional, _option("[ID...]", "")] = ()
    """Claims; all of them when left out."""
    budget: Annotated[str, _option("NAME", "(default: full)")] = "full"
    """smoke (seconds), quick (minutes) or full."""
    seeds: Annotated[int | None, _option("N", "(default: what the claim prescribes; 1 at smoke)")] = None
    """Seeds of every side, from 0 on; fewer than prescribed settle nothing."""
    jobs: Annotated[int | None, _option("N", "(default: one for each core)")] = None
    """Jobs at once."""
    threads: Annotated[int, _option("N", "(default: 1)")] = 1
    """Threads of each job."""
    results: _Results = Path("evidence/results")
    """Folder of the results, one file for each claim and budget."""
    scheduler: Annotated[str, _option("NAME", "(default: local)")] = "local"
    """local: worker processes; ray: a Ray cluster (RAY_ADDRESS, else one on this machine)."""
    device: Annotated[str, _option("NAME", "(default: cpu)")] = "cpu"
    """Where the protocols compute."""
    again: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run finished jobs anew."""

    def run(self, console: Console, command: str) -> int:
        """Run and print the verdicts; returns 1 when a job failed, whatever the verdicts."""
        from toreq.evidence.registry import chosen
        from toreq.evidence.report import show_verdicts
        from toreq.evidence.runner import run

        claims = chosen(self.ids)
        found = run(
            claims,
            budget=self.budget,
            seeds=self.seeds,
            jobs=self.jobs,
            threads=self.threads,
            results=self.results,
            scheduler_name=self.scheduler,
            device=self.device,
            again=self.again,
            console=console,
            command=command,
        )
        show_verdicts(found, console)
        return 1 if any(result.failures for result in found) else 0


@dataclass(frozen=True)
class Report:
    """Write the results as one self-contained HTML page, and as a Markdown page with pictures for the docs."""

    out: Annotated[Path, _option("DIR", "(default: docs/claims)")] = Path("docs/claims")
    """Where report.html, index.md and the pictures are written."""
    results: _Results = Path("evidence/results")
    """Folder of the results."""

    def run(self, console: Console, command: str) -> int:
        """Write the pages; returns the exit code."""
        from toreq.evidence.report import write_report

        for path in write_report(self.results, self.out):
            console.print(f"written to {path}", soft_wrap=True)
        return 0


@dataclass(frozen=True)
class Evidence:
    """Settle the claims about this library: list them, run their protocols, show the results."""

    action: Annotated[
        Annotated[List, tyro.conf.subcommand("list", prefix_name=False)]
        | Annotated[Run, tyro.conf.subcommand("run", prefix_name=False)]
        | Annotated[Report, tyro.conf.subcommand("report", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def run(self, console: Console, command: str) -> int:
        """Do what was asked for; returns the exit code."""
        return self.action.run(console, command)
