"""``python -m toreq.evidence.protocols.continual``: measure the baselines, and write table and picture of the docs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from toreq.errors import ToreqError
from toreq.evidence.budgets import BUDGETS
from toreq.evidence.protocols.continual import report, running, sides

NAME = "python -m toreq.evidence.protocols.continual"
OUT = Path("evidence/results/protocols")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or with ``--report`` write what the docs show; returns the exit code."""
    parser = argparse.ArgumentParser(prog=NAME, description="Continual learning: the shared baselines on the streams.")
    parser.add_argument("--budget", choices=list(BUDGETS), default="quick")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 .. N-1")
    parser.add_argument("--streams", nargs="+", choices=list(sides.STREAMS), default=list(sides.STREAMS))
    parser.add_argument("--sides", nargs="+", choices=list(sides.SIDES), default=list(sides.SIDES))
    parser.add_argument("--trials", type=int, default=sides.TRIALS, help="of tuning for each side; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file of the results; finished runs in it are kept")
    parser.add_argument("--report", action="store_true", help="write the docs' tables and picture from the file")
    given = parser.parse_args(arguments)
    file = given.out or OUT / f"continual-{given.budget}.json"
    # without the place of the file, which belongs to the machine
    typed = ["--budget", given.budget, "--seeds", str(given.seeds)]
    typed += [] if given.trials == sides.TRIALS else ["--trials", str(given.trials)]
    try:
        if given.report:
            report.write(file)
            return 0
        running.measure(
            file,
            BUDGETS[given.budget],
            seeds=range(given.seeds),
            streams=given.streams,
            names=given.sides,
            trials=given.trials,
            threads=given.threads,
            device=given.device,
            command=f"{NAME} {shlex.join(typed)}",
            say=lambda text: print(text, flush=True),
        )
    except ToreqError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
