"""Find imports of the wrong direction by reading the source, so that also late and type-only imports count."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

# Lower may not import higher; packages of one number are peers.
RANK = {
    "errors": 0,
    "hardware": 0,
    "io": 0,
    "options": 0,
    "data": 0,
    "core": 1,
    "memory": 2,
    "solvers": 3,
    "estimators": 4,
    "settle": 5,
    "starts": 5,
    "layer": 5,
    "systems": 6,
    "training": 7,
    "tuning": 8,
    "diagnostics": 9,
    "evidence": 9,
    "bench": 9,
    "export": 9,
    "cli": 10,
}
DATA_MAY_IMPORT = {"torch", "numpy", "pooch", "PIL"}
# `toreq.data` is beside the chain: the network code does not know about data sets.
_FIRST_USER_OF_DATA = RANK["training"]


def violations(source: Path) -> list[str]:
    """Return one line for each import under `source`, the folder of the package, that breaks the order."""
    found = []
    for file in sorted(source.rglob("*.py")):
        relative = file.relative_to(source)
        parts = ("toreq", *relative.with_suffix("").parts)
        package = parts[:-1]
        if parts == ("toreq", "__init__"):
            continue
        importer = parts[1]
        for line, imported, late in _imports(file, package):
            reason = _refusal(importer, imported, late, source)
            if reason:
                found.append(f"{relative.as_posix()}:{line}: {'.'.join(imported)}: {reason}")
    return found


def _refusal(importer: str, imported: tuple[str, ...], late: bool, source: Path) -> str | None:
    if importer not in RANK:
        return f"{importer} has no place in the import order; give it one in tests/import_order.py"
    if imported[0] != "toreq":
        if importer != "data" or imported[0] in sys.stdlib_module_names:
            return None
        if imported[0] not in DATA_MAY_IMPORT:
            return "data imports the standard library, torch, numpy and pooch only"
        return "data imports Pillow and pooch late" if imported[0] in {"PIL", "pooch"} and not late else None
    if imported[1:] == ("__version__",):
        return None
    if len(imported) == 1 or imported[1] not in RANK:
        # `from toreq import systems` counts as toreq.systems; any other name is one of the package itself.
        return None if importer == "cli" else "the package itself imports every part: import the part"
    target = imported[1]
    if target == importer:
        return None
    if importer == "data":
        return None if target in {"errors", "io"} else "data imports no other part of toreq"
    if target == "data" and RANK[importer] < _FIRST_USER_OF_DATA:
        return "network code does not know about data sets"
    if RANK[importer] == 0 and target not in {"errors"}:
        return "errors and io are at the bottom"
    return f"{importer} comes before {target}" if RANK[target] > RANK[importer] else None


def _imports(file: Path, package: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...], bool]]:
    """Yield (line, dotted name in parts, whether inside a function) of every import in `file`."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split(".")), id(node) in late
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            if base == ("toreq",):
                for alias in node.names:
                    yield node.lineno, ("toreq", alias.name), id(node) in late
            else:
                yield node.lineno, base, id(node) in late
        elif isinstance(node, ast.Call) and (name := _imported_by_call(node)):
            yield node.lineno, tuple(name.split(".")), id(node) in late


def _imported_by_call(call: ast.Call) -> str | None:
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called not in {"import_module", "__import__"} or not call.args:
        return None
    argument = call.args[0]
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else None
