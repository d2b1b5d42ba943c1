"""What spikes cost: synaptic events against dense multiply-adds, and the energy of both by published figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from toreq.core.convolution import Conv
from toreq.core.couplings import Bilinear, Coupling, Drive, Lateral
from toreq.core.energy import Energy
from toreq.core.gating import GatedBilinear
from toreq.core.operators import Dense, IdentityOperator, Operator
from toreq.core.quadratic import SelfCoupling
from toreq.core.state import Bindings, Bound, State, added
from toreq.errors import ConfigError
from toreq.solvers.spiking import Spiking, SpikingSolution

ADD = 0.9
"""Picojoules of a 32-bit floating-point addition at 45 nm (Horowitz 2014)."""
MULTIPLY_ADD = 4.6
"""Picojoules of a 32-bit floating-point multiplication, 3.7, and an addition (Horowitz 2014)."""
SRAM = 5.0
"""Picojoules of a 32-bit word from on-chip memory at 45 nm (Han et al. 2016, from Horowitz 2014)."""
DRAM = 640.0
"""Picojoules of a 32-bit word from memory off the chip (the same)."""


@dataclass(frozen=True)
class Work:
    """Operations of one inference, per example ``(B,)``.

    Args:
        adds: additions, and comparisons with a threshold.
        multiply_adds: multiplications with the addition that follows.
        words: 32-bit words read from or written to memory.
    """

    adds: Tensor
    multiply_adds: Tensor
    words: Tensor

    def __add__(self, other: Work) -> Work:
        return Work(self.adds + other.adds, self.multiply_adds + other.multiply_adds, self.words + other.words)

    def picojoules(self, word: float = 0.0) -> Tensor:
        """Modelled energy, ``(B,)``: 0.9 pJ an addition, 4.6 pJ a multiply-add, and ``word`` pJ a word (0 leaves out
        the memory; :data:`SRAM` or :data:`DRAM`)."""
        return ADD * self.adds + MULTIPLY_ADD * self.multiply_adds + word * self.words


def fan_out(energy: Energy, bindings: Bindings) -> State:
    """Synapses by which each unit reaches others (or itself), per node ``(B, *shape)``, float64.

    Weights that are zero, and units whose gate is zero, have none. A convolution under average pooling has a synapse to
    every position that is pooled.

    Raises:
        ConfigError: for a coupling or operator whose synapses it cannot count.
    """
    out: State = {
        n: torch.zeros(t.shape, dtype=torch.float64, device=t.device) for n, t in energy.initial(bindings).items()
    }
    for name, c in energy.terms():
        out = added(out, _reached(c, bindings[name], out))
    return out


def _reached(c: Coupling, bound: Bound, like: State) -> State:
    ones = {n: torch.ones_like(like[n]) for n in c.nodes}
    if isinstance(c, Drive):
        return {}
    if isinstance(c, SelfCoupling):
        return ones
    if isinstance(c, Bilinear):
        mask = _synapses(c.op, bound)
        # a spike of `pre` goes down its column of the matrix, one of `post` back along its row
        return {
            c.pre: _paths(c.op, c.op.adjoint(ones[c.post], mask)),
            c.post: _paths(c.op, c.op.forward(ones[c.pre], mask)),
        }
    if isinstance(c, GatedBilinear):
        mask = _synapses(c.op, bound)
        below, above = (
            (bound[k] != 0).to(torch.float64).expand_as(ones[n])
            for k, n in (("gate_pre", c.pre), ("gate_post", c.post))
        )
        return {
            c.pre: below * _paths(c.op, c.op.adjoint(above.contiguous(), mask)),
            c.post: above * _paths(c.op, c.op.forward(below.contiguous(), mask)),
        }
    if isinstance(c, Lateral):
        open_ = ones[c.node]
        if c.gate is not None:
            open_ = (bound["gate"] != 0).to(torch.float64).expand_as(open_).contiguous()
        return {c.node: open_ * _paths(c.op, c.op.adjoint(open_, _synapses(c.op, bound)))}
    raise ConfigError(
        f"fan_out: expected Bilinear, GatedBilinear, Lateral, SelfCoupling and Drive, got {type(c).__name__}; count "
        "its synapses yourself and pass them on"
    )


def _synapses(op: Operator, bound: Bound) -> dict[str, Tensor]:
    if isinstance(op, IdentityOperator):
        return {}
    if isinstance(op, Dense | Conv):
        return {"weight": (bound["weight"] != 0).to(torch.float64)}
    raise ConfigError(
        f"fan_out: expected Dense, Conv or IdentityOperator, got {type(op).__name__}; count its synapses yourself and "
        "pass them on"
    )


def _paths(op: Operator, t: Tensor) -> Tensor:
    # pooling averages, and so has counted every position by 1 / pool^2
    return (t * op.pool**2).round() if isinstance(op, Conv) else t


def events(spikes: State, synapses: Mapping[str, Tensor]) -> Tensor:
    """Synaptic events, ``(B,)``: every spike times the fan-out of its unit."""
    parts = [(t.to(torch.float64) * synapses[n]).flatten(1).sum(1) for n, t in spikes.items()]
    return torch.stack(parts).sum(0)


def spiking_work(
    solver: Spiking, solution: SpikingSolution, synapses: Mapping[str, Tensor], steps: Tensor | None = None
) -> Work:
    r"""What a run of spikes costs, example by example, on hardware that does nothing for a unit that is silent.

    An event is an addition, and three words: its weight, and the target's accumulator read and written. A unit costs
    two additions a step (its drive, its threshold), two words (its state read and written), and one addition a spike
    (the reset); the stochastic schemes a multiply-add a step for the running field in place of the reset. The drawing
    of random numbers is not counted, nor is the drive, which both sides compute once.

    Args:
        solver: which scheme.
        solution: of B examples, what the solver returned.
        synapses: from :func:`fan_out`.
        steps: ``(B,)`` steps taken when not those of the solution.
    """
    steps = (solution.steps if steps is None else steps).to(torch.float64)
    happened = events(solution.spikes, synapses)
    fired = torch.stack([t.to(torch.float64).flatten(1).sum(1) for t in solution.spikes.values()]).sum(0)
    updates = _units(solution.spikes) * steps
    resets, running = (fired, 0 * updates) if solver.scheme == "sigma_delta" else (0 * fired, updates)
    return Work(happened + resets + 2 * updates, running, 3 * happened + 2 * updates)


def dense_work(synapses: Mapping[str, Tensor], steps: Tensor) -> Work:
    """What a relaxation costs that multiplies by every weight at every step.

    A synapse is a multiply-add and one word, its weight (activations and sums stay in registers); a unit costs two
    additions a step (its drive, its activation) and two words (its state).

    Args:
        synapses: from :func:`fan_out`.
        steps: field evaluations, ``(B,)``.
    """
    steps = steps.to(torch.float64)
    products = torch.stack([t.flatten(1).sum(1) for t in synapses.values()]).sum(0) * steps
    updates = _units(synapses) * steps
    return Work(2 * updates, products, products + 2 * updates)


def _units(state: Mapping[str, Tensor]) -> int:
    return sum(t[0].numel() for t in state.values())
