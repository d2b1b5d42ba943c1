"""What settling costs, counted alike for every solver: floating-point operations in units of one finest-level sweep."""

from __future__ import annotations

from collections.abc import Callable

import torch

from toreq.core import Dynamics
from toreq.core.couplings import Only
from toreq.core.state import Bindings, State
from toreq.evidence.counting import flops
from toreq.solvers import Solution


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
    """Operations of one field evaluation on every node of the finest level: the unit of work, for the whole batch."""
    return field_flops(dynamics, bindings, dynamics.levels()[0])


def fine_sweeps(dynamics: Dynamics, bindings: Bindings, relax: Callable[[], Solution]) -> tuple[float, Solution]:
    """The operations that ``relax()`` really ran, in units of :func:`fine_sweep`, and what it returned.

    Every field evaluation counts, whatever solver asked for it and on whatever nodes, as does the start if ``relax``
    makes it; examples that leave the batch count no more.

    Args:
        dynamics, bindings: what is relaxed.
        relax: relaxes it, e.g. ``lambda: solver.solve(Relaxation(dynamics, bindings), start)``.
    """
    found: list[Solution] = []
    work = flops(lambda: found.append(relax()))
    return work / fine_sweep(dynamics, bindings), found[0]
