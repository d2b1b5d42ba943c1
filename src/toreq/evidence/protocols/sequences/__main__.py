"""``python -m toreq.evidence.protocols.sequences``: measure the sides, and write table and picture of the docs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from toreq.errors import ToreqError
from toreq.evidence.budgets import BUDGETS
from toreq.evidence.protocols.sequences import models, plans, report, running

NAME = "python -m toreq.evidence.protocols.sequences"
OUT = Path("evidence/results/protocols")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or with ``--report`` write what the docs show; returns the exit code."""
    parser = argparse.ArgumentParser(prog=NAME, description="Tasks on sequences: six sides, one trainer.")
    parser.add_argument("--tasks", nargs="+", choices=plans.tasks(), default=plans.tasks())
    parser.add_argument("--sides", nargs="+", choices=list(models.SIDES), default=list(models.SIDES))
    parser.add_argument("--budget", choices=list(BUDGETS), default="quick")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 .. N-1")
    parser.add_argument("--trials", type=int, default=3, help="of tuning for each side and task; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file of the results; finished runs in it are kept")
    parser.add_argument("--report", action="store_true", help="write the docs' table and picture from the file")
    parser.add_argument("--page", type=Path, default=report.PAGE, help="the docs' page, with --report")
    given = parser.parse_args(arguments)
    file = given.out or OUT / f"sequences-{given.budget}.json"
    # without the place of the file, which belongs to the machine
    typed = ["--tasks", *given.tasks, "--sides", *given.sides, "--budget", given.budget]
    typed += ["--seeds", str(given.seeds), "--trials", str(given.trials)]
    try:
        if given.report:
            report.write(running.read(file), given.page)
            return 0
        running.measure(
            file,
            BUDGETS[given.budget],
            seeds=range(given.seeds),
            tasks=given.tasks,
            sides=given.sides,
            trials=given.trials,
            command=f"{NAME} {shlex.join(typed)}",
            threads=given.threads,
            device=given.device,
            say=lambda text: print(text, flush=True),
        )
    except ToreqError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
