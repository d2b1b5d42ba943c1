"""What settling costs, counted alike for every solver: floating-point operations in units of one finest-level sweep."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from toreq.core import Dynamics, Operator
from toreq.core.couplings import Only
from toreq.core.state import Bindings, State
from toreq.evidence.counting import flops
from toreq.solvers import Problem, Relaxation


def field_flops(dynamics: Dynamics, bindings: Bindings, only: Only = None) -> float:
    """Operations of one evaluation of the field on the nodes ``only`` (all when None), for the whole batch.

    Matrix products, convolutions and attention count, a multiplication and an addition as two; elementwise work
    (activations, springs, sums) does not.

    Args:
        dynamics: the network.
        bindings: of B examples.
        only: names of the nodes wanted.
    """
    with torch.no_grad():
        h: State = dynamics.activate(dynamics.initial(bindings), bindings)
        static = dynamics.static(bindings)
        return flops(lambda: dynamics.field(h, bindings, static, only))


def fine_sweep(dynamics: Dynamics, bindings: Bindings) -> float:
    """Operations of one field evaluation on every node of the finest level, per example: the unit of work."""
    return field_flops(dynamics, bindings, dynamics.levels()[0]) / dynamics.batch(bindings)[0]


@dataclass
class Meter:
    """Operations summed over all examples, and what an evaluation on a set of nodes costs one example."""

    total: float = 0.0
    costs: dict[tuple[frozenset[str], Only], float] = field(default_factory=dict)


class Metered:
    """A relaxation that counts the operations of every field evaluation a solver really asks for.

    Examples that leave the batch count no more, nor does a field at the origin of a linear one, which is known.

    Args:
        problem: the relaxation.
        meter: where to count; a new one when None.
    """

    def __init__(self, problem: Relaxation, meter: Meter | None = None) -> None:
        self.problem, self.meter = problem, Meter() if meter is None else meter

    def field(self, h: State, only: Only = None) -> State:
        origin = self.problem.origin
        if self.problem.linear and origin is not None and all(t is origin[1][n] for n, t in h.items()):
            return self.problem.field(h, only)
        key = (frozenset(h), only)
        size = next(iter(h.values())).shape[0]
        if key in self.meter.costs:
            out = self.problem.field(h, only)
        else:
            found: list[State] = []
            self.meter.costs[key] = flops(lambda: found.append(self.problem.field(h, only))) / size
            out = found[0]
        self.meter.total += self.meter.costs[key] * size
        return out

    def activate(self, a: State, only: Only = None) -> State:
        return self.problem.activate(a, only)

    def colours(self) -> list[frozenset[str]]:
        return self.problem.colours()

    def eliminable(self) -> frozenset[str]:
        return self.problem.eliminable()

    def energy(self, a: State, h: State) -> Tensor | None:
        return self.problem.energy(a, h)

    def levels(self) -> list[frozenset[str]]:
        return self.problem.levels()

    def stiffness(self) -> State:
        return self.problem.stiffness()

    def resolved(self, z: State, stiffness: State) -> State:
        return self.problem.resolved(z, stiffness)

    def joints(self) -> list[tuple[str, str, Operator, Tensor]]:
        return self.problem.joints()

    def slopes(self, a: State, h: State) -> State:
        return self.problem.slopes(a, h)

    def restricted(self, names: frozenset[str]) -> Problem | None:
        part = self.problem.restricted(names)
        return None if part is None else Metered(part, self.meter)

    def selected(self, index: Tensor) -> Problem | None:
        part = self.problem.selected(index)
        return None if part is None else Metered(part, self.meter)
