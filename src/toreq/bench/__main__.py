"""``python -m toreq.bench [epoch] [settling] [systems] [--json FILE]``: run benchmarks alone on a quiet machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from toreq.bench import epoch, settling, systems
from toreq.io import atomic_write_json

BENCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "epoch": epoch.run,
    "settling": settling.run,
    "systems": systems.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks named (all when none is) and print their rows; exit code 0, or 2 for bad usage."""
    parser = argparse.ArgumentParser(prog="python -m toreq.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(BENCHES)}; all when left out")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in BENCHES:
            parser.error(f"expected any of {', '.join(BENCHES)}, got {name!r}")
    console = Console()
    results = []
    for name in arguments.names or list(BENCHES):
        result = BENCHES[name]()
        results.append(result)
        for part in ("rows", "ratios"):
            console.print(_table(f"{name}: {part}", result[part]))
    if arguments.json is not None:
        atomic_write_json(arguments.json, {"results": results})
        console.print(f"written to {arguments.json}")
    return 0


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key)
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else "-" if v is None else str(v) for v in row.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
