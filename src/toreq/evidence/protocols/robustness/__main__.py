"""``python -m toreq.evidence.protocols.robustness``: measure the shared sides."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from toreq.errors import ToreqError
from toreq.evidence.budgets import BUDGETS
from toreq.evidence.protocols.robustness import report, running, sides

NAME = "python -m toreq.evidence.protocols.robustness"
RESULTS = Path("evidence/results/protocols")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or with ``--report`` write the tables and pictures of files that are there; 1 on an error that is named."""
    parser = argparse.ArgumentParser(prog=NAME, description="Robustness of the shared sides.")
    parser.add_argument("--budget", choices=list(BUDGETS), default="quick")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1")
    parser.add_argument("--sides", nargs="+", default=list(sides.SIDES), help="all by default")
    parser.add_argument("--no-attacks", action="store_true", help="noise and corruptions only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file; runs that it holds are kept")
    parser.add_argument("--report", nargs="+", type=Path, metavar="FILE", help="write docs and pictures, run nothing")
    given = parser.parse_args(arguments)
    typed = list(sys.argv[1:]) if arguments is None else list(arguments)
    try:
        if given.report:
            report.write(given.report)
            return 0
        running.run(
            given.budget,
            given.seeds,
            given.sides,
            RESULTS / f"robustness-{given.budget}.json" if given.out is None else given.out,
            attacked=not given.no_attacks,
            device=given.device,
            threads=given.threads,
            command=f"{NAME} {shlex.join(typed)}".strip(),
            say=lambda text: print(text, flush=True),
        )
    except ToreqError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
