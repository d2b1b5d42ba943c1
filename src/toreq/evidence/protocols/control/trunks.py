"""Trunks: from observations to features, by settling or by one pass, of the same widths and parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from toreq import solvers, systems
from toreq.errors import ConfigError, nearest
from toreq.estimators import Statistics
from toreq.layer import Equilibrium
from toreq.solvers import Solver
from toreq.systems.base import System

Trunk = Callable[[int], nn.Module]
"""Makes, for a number of inputs, a module from ``(B, inputs)`` to features ``(B, F)``."""

TOLERANCE = 1e-3
"""Relative residual of the free phases: a thousandth of the features is far below the policy's own noise."""


class Settling(nn.Module):
    """An equilibrium layer as a trunk: its read-out nodes, flattened and side by side.

    It counts what settled over its whole life, in buffers, so that a checkpoint keeps the counts.

    Args:
        layer: an :class:`~toreq.Equilibrium` layer, or a system, whose head is then left out.
    """

    tally: Tensor

    def __init__(self, layer: Equilibrium | System) -> None:
        super().__init__()
        self.equilibrium = layer.equilibrium if isinstance(layer, System) else layer
        self.input_shape = layer.input_shape if isinstance(layer, System) else None
        self.equilibrium.warn = False  # counted instead
        self.counted: Statistics | None = None
        self.register_buffer("tally", torch.zeros(2, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(B, F)`` at the equilibrium.

        Args:
            x: ``(B, inputs)``.
        """
        self.flush()
        last = self.equilibrium.last
        found = self.equilibrium(x if self.input_shape is None else x.reshape(-1, *self.input_shape))
        if last.free is not None:
            self._count(0, last.free.converged, last.free.steps)
        nodes = found.values() if isinstance(found, Mapping) else [found]
        return torch.cat([node.flatten(1) for node in nodes], 1)

    def flush(self) -> None:
        """Count the nudged relaxations of the last backward pass, if they are not counted yet."""
        nudged = self.equilibrium.last.nudged
        if nudged is not None and nudged is not self.counted:
            self._count(1, nudged.converged, nudged.steps)
            self.counted = nudged

    @torch.no_grad()
    def radius(self, x: Tensor) -> float:
        """Spectral radius of the relaxation's Jacobian at the equilibria of ``x`` ``(B, inputs)``, averaged."""
        return self.equilibrium.radius(x if self.input_shape is None else x.reshape(-1, *self.input_shape))

    def _count(self, phase: int, converged: Tensor, steps: Tensor) -> None:
        more = [converged.shape[0], int(converged.sum()), int(steps.sum())]
        self.tally[phase] += torch.tensor(more, dtype=torch.float64, device=self.tally.device)


@dataclass(frozen=True)
class Settled:
    """Makes a trunk of a system.

    Args:
        system: a name of :func:`toreq.systems.names`.
        options: of :func:`toreq.systems.create`, ``arch`` among them.
        estimator: a name of :func:`toreq.estimators.names`; the system's own when None.
        solver: an object, or a name of :func:`toreq.solvers.names`; the system's own when None.
    """

    system: str = "toreqprop"
    options: Mapping[str, Any] = field(default_factory=dict)
    estimator: str | None = None
    solver: Solver | str | None = None

    def __call__(self, inputs: int) -> nn.Module:
        # two classes: the head, which they belong to, is left out
        made = systems.create(
            self.system, (inputs,), 2, solver=self.solver, estimator=self.estimator, **dict(self.options)
        )
        return Settling(made)


@dataclass(frozen=True)
class Forward:
    """Makes the feed-forward trunk of these widths: linear layers with tanh between and after them."""

    hidden: tuple[int, ...] = (64, 64)

    def __call__(self, inputs: int) -> nn.Module:
        sizes = [inputs, *self.hidden]
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers)


SIDES = {
    "eqprop": "equilibrium actor and critic, trained by the network's own estimator",
    "bp-ff": "feed-forward actor and critic of the same widths and number of parameters, trained by backprop",
    "bp-eq": "the same equilibrium actor and critic with the implicit gradient",
}


def trunk(side: str, hidden: Sequence[int]) -> Trunk:
    """The trunk of a side: a layered Hopfield network of these widths, or its feed-forward twin.

    Raises:
        ConfigError: for an unknown side, with the nearest.
    """
    if side not in SIDES:
        raise ConfigError(f"control: expected a side, got {side!r}; {nearest(side, SIDES)}")
    if side == "bp-ff":
        return Forward(tuple(hidden))
    # the smallest overhead on nets this small: half sweeps, two between checks, and no batch taken apart
    solver = solvers.FixedPoint(order="gauss_seidel", tolerance=TOLERANCE, check_every=2, compaction=0.0)
    # equal slopes: the tanh of the feed-forward twin
    options = {"arch": "hopfield", "hidden": tuple(hidden), "gain": 1.0}
    return Settled("toreqprop", options, "implicit" if side == "bp-eq" else None, solver)


def flush(module: nn.Module) -> None:
    """Bring the counts of all trunks up to date."""
    for part in module.modules():
        if isinstance(part, Settling):
            part.flush()


def settled(module: nn.Module) -> dict[str, float] | None:
    """Over all trunks: percent of the free and of the nudged relaxations that settled, and their mean steps; None
    without any."""
    flush(module)
    found = [m.tally for m in module.modules() if isinstance(m, Settling)]
    if not found:
        return None
    total = torch.stack(found).sum(0)
    result: dict[str, float] = {}
    for name, (runs, converged, steps) in zip(("free", "nudged"), total.tolist(), strict=True):
        if runs:
            result[f"{name} settled"], result[f"{name} steps"] = 100 * converged / runs, steps / runs
    return result
