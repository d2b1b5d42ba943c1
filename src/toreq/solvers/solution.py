"""What a relaxation returns and reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toreq.core.state import State


@dataclass(frozen=True)
class Trace:
    """A recorded relaxation: ``residual`` ``(T, B)``; ``energy`` ``(T, B)`` or None when there is none;
    ``states`` if asked."""

    residual: Tensor
    energy: Tensor | None
    states: list[State] | None = None


@dataclass(frozen=True)
class Solution:
    """The result of a relaxation.

    Args:
        state: pre-activations per node.
        h: activations per node.
        steps: field evaluations each example took, ``(B,)`` int64.
        residual: relative residual of the last iterate checked, ``(B,)``. A settled example's state is that iterate
            where the solver extrapolates, and one plain update further (a smaller residual) where it does not.
        converged: ``(B,)`` bool.
        trace: the recorded relaxation, if asked for.
    """

    state: State
    h: State
    steps: Tensor
    residual: Tensor
    converged: Tensor
    trace: Trace | None = None


@dataclass(frozen=True)
class Step:
    """What a callback sees after each step; ``residual`` is None at steps where it was not measured."""

    index: int
    state: State
    h: State
    residual: Tensor | None
