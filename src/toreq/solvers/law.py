"""What a chain asks of an energy whose law it samples: whether it can, and what Metropolis and Hastings' rule needs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from toreq.core.energy import Dynamics, Energy
from toreq.core.state import State
from toreq.solvers.problem import Relaxation


@dataclass
class Judged:
    """What Metropolis and Hastings' rule asks of a state."""

    field: State
    energy: Tensor
    slope: Tensor  # log det sigma'


def judged(problem: Relaxation, a: State, h: State) -> Judged:
    """A state's field, energy and log determinant."""
    energy = problem.energy(a, h)
    assert energy is not None
    slopes = [problem.dynamics.activation(n).log_slope(t, h[n]) for n, t in a.items()]
    return Judged(problem.field(h), energy, torch.stack(slopes).sum(0))


def unsampled(dynamics: Dynamics, nodes: Collection[str] | None = None) -> str:
    """Why a network cannot be sampled; empty where it can.

    Args:
        dynamics: the network.
        nodes: those that have a law, where the others settle; all of them when None.
    """
    if not isinstance(dynamics, Energy):
        return f"{type(dynamics).__name__} has no energy, and so no law to sample; use FixedPoint or Anderson"
    missing = sorted(set(nodes or ()) - set(dynamics.names))
    if missing:
        return f"it has no nodes {missing}; choose noisy from {list(dynamics.names)}"
    for n in dynamics.names if nodes is None else nodes:
        sigma = dynamics.activation(n)
        if not sigma.samples:
            kind = type(sigma).__name__
            return f"Langevin samples tanh and identity nodes, and {n!r} has {kind}: {sigma.unsampled}; use Tanh"
    return ""


def summed(halves: tuple[State, State], which: int, h: State) -> tuple[State, State]:
    """The sums with ``h`` added to one of them."""
    part = halves[which]
    if part:
        for n, t in h.items():
            part[n] += t
        return halves
    fresh = {n: t.clone() for n, t in h.items()}
    return (fresh, halves[1]) if which == 0 else (halves[0], fresh)
