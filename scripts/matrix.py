"""Write the tables of docs/estimators.md and docs/systems.md from the code itself.

    python scripts/matrix.py            rewrite the tables
    python scripts/matrix.py --check    exit 1 if a table is out of date

The estimator matrix asks `estimator.supports` of every shipped estimator about every kind of network; the options and
defaults are those of `toreq.systems.options`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from results import ROOT, rewrite, table
from torch import nn

import toreq
from toreq.core import (
    Bilinear,
    Dense,
    Drive,
    Dynamics,
    Energy,
    HardSigmoid,
    Identity,
    Node,
    Residual,
    Tanh,
    VectorField,
)
from toreq.estimators import REGISTRY, Estimator
from toreq.solvers import REGISTRY as SOLVERS


def networks() -> dict[str, Dynamics]:
    """The kinds of network that estimators tell apart, by a description."""
    found: dict[str, Dynamics] = {}
    for system in toreq.systems.names():
        for kind in toreq.systems.architectures(system):
            net = toreq.systems.create(system, input_shape=(1, 28, 28), num_classes=10, arch=kind)
            found[f"`{system}`, arch `{kind}`"] = net.equilibrium.dynamics

    def pair(kind: type[Tanh] | type[HardSigmoid]) -> Energy:
        nodes = [Node("a", 4, kind()), Node("b", 3, kind())]
        return Energy(nodes, [Drive("a", nn.Linear(5, 4)), Bilinear(Dense(4, 3), "a", "b")])

    found["an energy of tanh nodes"] = pair(Tanh)
    found["an energy with kinks (hard sigmoid, ReLU)"] = pair(HardSigmoid)
    node = Node("h", 4, Identity())
    block = nn.Bilinear(4, 5, 4)
    found["`wrap(block)`: a prediction-error energy"] = Energy([node], [Residual(block, "h", source="h")])
    found['`wrap(block, form="vector_field")`'] = VectorField(node, block)
    return found


def matrix() -> str:
    """Which estimator supports which network, and why the others do not."""
    rows, reasons = [], []
    for name, dynamics in networks().items():
        answers = [kind().supports(dynamics) for kind in REGISTRY.values()]
        rows.append([name, *("yes" if answer else "no" for answer in answers)])
        reasons += [answer.reason for answer in answers if not answer]
    grid = table(["network", *(f"`{name}`" for name in REGISTRY)], rows)
    lines = [f"* {reason}." for reason in dict.fromkeys(reasons)]
    return "\n\n".join([grid, "Where it says no:", "\n".join(lines)])


def fields(registry: dict[str, type]) -> str:
    """The fields and defaults of each entry of a registry."""
    rows = []
    for name, kind in registry.items():
        values = ", ".join(f"`{f.name}={f.default!r}`" for f in dataclasses.fields(kind))
        rows.append([f"`{name}`", f"[`{kind.__name__}`][{kind.__module__}.{kind.__qualname__}]", values])
    return table(["name", "class", "fields and defaults"], rows)


def options(system: str) -> str:
    """The options of each architecture of a system."""
    rows = []
    for kind in toreq.systems.architectures(system):
        known = toreq.systems.options(system, kind)
        del known["arch"]
        rows.append([f"`{kind}`", ", ".join(f"`{key}={value!r}`" for key, value in known.items())])
    return table(["arch", "options and defaults"], rows)


def bodies() -> dict[Path, dict[str, str]]:
    """What goes between the markers of each page."""
    docs = ROOT / "docs"
    estimators: dict[str, type[Estimator]] = REGISTRY
    return {
        docs / "estimators.md": {"matrix": matrix(), "fields": fields(dict(estimators))},
        docs / "choose.md": {"solvers": fields(dict(SOLVERS))},
        docs / "systems.md": {f"options {name}": options(name) for name in toreq.systems.names()},
    }


def main() -> int:
    """Rewrite or check the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is out of date")
    return rewrite(bodies(), parser.parse_args().check)


if __name__ == "__main__":
    sys.exit(main())
