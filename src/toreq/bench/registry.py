"""The benches by name, and the runner behind ``toreq bench``."""

from __future__ import annotations

import importlib
import inspect
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from toreq.errors import ConfigError, nearest
from toreq.io import atomic_write_json

Result = dict[str, Any]
"""What a bench returns: ``bench``, ``environment``, ``rows`` and ``ratios``, further tables beside them."""

MODULES = {
    "epoch": "epoch",
    "gradients": "gradients",
    "overhead": "overhead",
    "roofline": "roofline",
    "memory": "memory",
    "settling": "settling",
    "systems": "systems",
    "compiled": "compiled",
    "scaling": "scaling",
    "profile": "profile",
    "time-to-accuracy": "accuracy",
}
"""Name of each bench -> its module, in the order in which they run."""

TABLES = ("rows", "fits", "ratios")


def names() -> list[str]:
    """The benches in the order in which they run."""
    return list(MODULES)


def find(name: str) -> Callable[..., Result]:
    """The function of one bench; its module is imported only now, since some need an extra.

    Raises:
        ConfigError: for an unknown name, with the nearest one.
    """
    if name not in MODULES:
        raise ConfigError(f"bench: expected a benchmark, got {name!r}; {nearest(name, MODULES)}")
    return importlib.import_module(f"toreq.bench.{MODULES[name]}").run


def options(name: str) -> dict[str, Any]:
    """The parameters of one bench with their defaults."""
    return {p.name: p.default for p in inspect.signature(find(name)).parameters.values()}


def run_benches(
    wanted: Sequence[str],
    console: Console,
    *,
    threads: Sequence[int] | None = None,
    chosen: Mapping[str, Any] | None = None,
    json_path: Path | None = None,
    plots: Path | None = None,
) -> list[Result]:
    """Run benches in order, all when none is named, print their tables, and save after each one.

    Args:
        wanted: names.
        console: where the tables go.
        threads: thread counts, for the benches that take time; each bench's own when None.
        chosen: parameters of the bench, when a single one is named.
        json_path: written anew after each bench; results of other benches that it holds already are kept.
        plots: folder for one picture per bench.

    Raises:
        ConfigError: for an unknown bench or parameter, a thread count below 1, or a file that holds something else.
    """
    chosen = dict(chosen or {})
    todo = list(dict.fromkeys(wanted)) or names()
    if threads is not None and (not threads or any(t < 1 for t in threads)):
        raise ConfigError(f"bench: expected thread counts of at least 1, got {list(threads)}; for example 1 2")
    if chosen and len(todo) != 1:
        raise ConfigError(f"bench: expected one benchmark beside --set, got {len(todo)}; name it")
    for name in todo:
        _check(name, chosen)
    kept = {} if json_path is None else _read(json_path)
    results = []
    for name in todo:
        parameters = dict(chosen)
        if threads is not None and "threads" in options(name):
            parameters["threads"] = tuple(threads)
        console.print(f"{name}: running")
        started = time.perf_counter()
        result = find(name)(**parameters)
        result = {**result, "options": parameters, "seconds": time.perf_counter() - started}
        results.append(result)
        if json_path is not None:
            kept[name] = result
            atomic_write_json(json_path, {"results": list(kept.values())})
        show(result, console)
        if plots is not None:
            from toreq.bench.plots import write

            console.print(f"{name}: drawn in {write(result, plots)}", soft_wrap=True)
    if json_path is not None:
        console.print(f"written to {json_path}", soft_wrap=True)
    return results


def _check(name: str, chosen: Mapping[str, Any]) -> None:
    legal = options(name)
    for key in chosen:
        if key not in legal:
            raise ConfigError(f"bench: expected a parameter of {name!r}, got {key!r}; {nearest(key, legal)}")


def _read(path: Path) -> dict[str, Result]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {result["bench"]: result for result in found["results"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"bench: expected {path} to hold results of `toreq bench`, got something else; choose another file"
        ) from error


def show(result: Result, console: Console) -> None:
    """Print the tables of one result."""
    for part in TABLES:
        if result.get(part):
            console.print(_table(f"{result['bench']}: {part}", result[part]))


def cell(value: Any) -> str:
    """A value as text: three significant digits, a dash for what is missing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def verdict(line: Mapping[str, Any]) -> str:
    """``holds``, ``missed``, or a dash where nothing was aimed at."""
    return "-" if line["holds"] is None else "holds" if line["holds"] else "missed"


def columns(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every key of the lines, in order of first appearance."""
    return list(dict.fromkeys(key for line in lines for key in line))


def _table(title: str, lines: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title)
    keys = columns(lines)
    for key in keys:
        table.add_column(key)
    for line in lines:
        table.add_row(*(verdict(line) if key == "holds" else cell(line.get(key)) for key in keys))
    return table
