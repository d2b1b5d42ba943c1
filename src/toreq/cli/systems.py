"""`toreq systems`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from toreq.errors import ConfigError, nearest


def known_system(name: str) -> str:
    """Return `name`; raises `ConfigError` with the nearest system when there is none of that name."""
    from toreq import systems

    if name not in systems.names():
        raise ConfigError(f"expected the name of a system, got {name!r}; {nearest(name, systems.names())}")
    return name


@dataclass(frozen=True)
class Systems:
    """List the systems, their options with defaults, and the estimators that support each."""

    def run(self, console: Console, command: str) -> int:
        """Print the table; returns the exit code."""
        from rich.table import Table

        from toreq import systems

        table = Table(title="toreq systems", show_lines=True)
        for column in ("system", "arch", "options (defaults)", "estimators"):
            table.add_column(column, overflow="fold")
        for name in systems.names():
            for arch in systems.architectures(name):
                options = systems.options(name, arch)
                del options["arch"]
                table.add_row(
                    name,
                    arch,
                    "\n".join(f"{key}={value!r}" for key, value in options.items()),
                    "\n".join(_estimators(name, arch)),
                )
        console.print(table)
        console.print(
            "Options are given as --set key=value; `solver`, `estimator` and `settings` (exact or fast) too, as in\n"
            "  toreq train toreqprop --set arch=conv estimator=centered",
            markup=False,
        )
        return 0


def _estimators(name: str, arch: str) -> list[str]:
    from toreq import estimators, systems
    from toreq.layer import equilibria

    net: Any = systems.create(name, input_shape=(1, 28, 28), num_classes=10, arch=arch)
    found: list[str] = []
    for layer in equilibria(net):
        for estimator, _ in estimators.all_for(layer.dynamics):
            if estimator not in found:
                found.append(estimator)
    return found
