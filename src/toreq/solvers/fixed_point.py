"""Damped fixed-point iteration, with a torus of past iterates to stabilise or speed it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from toreq.core.state import State
from toreq.memory.ring import Ring
from toreq.solvers.base import Solver, require
from toreq.solvers.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Fading:
    r"""A fading torus of the last R iterates, :math:`-\tfrac12\sum_r\alpha\rho^{\,r-1}\|a - m_r\|^2` beside the energy.

    It acts on the pre-activations, so that the slopes of the nodes do not scale it. At equilibrium all slots equal a
    and the term vanishes: neither equilibrium nor gradient moves. With ``alpha > 0`` it is damping, treated
    implicitly, :math:`f \leftarrow (f + \sum_r\alpha\rho^{\,r-1} m_r)/(1 + \sum_r\alpha\rho^{\,r-1})` with the
    present state in the first slot (explicitly, its delay would make it unstable). With ``alpha < 0`` on one slot it
    is momentum (heavy ball with momentum :math:`-\gamma\alpha`; Polyak 1964). ``mode="recurrent"`` adds
    :math:`\alpha\sum_r\rho^{\,r-1} h(t - r)` to the field instead, which at equilibrium is a self-coupling;
    :class:`toreq.Equilibrium` then adds that self-coupling to the energy, so that gradients stay exact.

    Args:
        alpha: weight of the newest slot; any sign, not 0.
        decay: :math:`\rho` in (0, 1).
        length: R, at least 1.
        mode: ``"memory"`` or ``"recurrent"``.
    """

    alpha: float = 0.3
    decay: float = 0.5
    length: int = 4
    mode: Literal["memory", "recurrent"] = "memory"

    def __post_init__(self) -> None:
        require(
            "Fading",
            "alpha",
            self.alpha,
            self.alpha != 0 and abs(self.alpha) < 10,
            "nonzero, |alpha| < 10",
            "try 0.3",
        )
        require("Fading", "decay", self.decay, 0 < self.decay < 1, "in (0, 1)", "try 0.5")
        require("Fading", "length", self.length, self.length >= 1, "an integer >= 1", "try 4")
        require(
            "Fading",
            "mode",
            self.mode,
            self.mode in ("memory", "recurrent"),
            "'memory' or 'recurrent'",
            "choose one",
        )

    @property
    def total(self) -> float:
        r""":math:`\sum_r\alpha\rho^{\,r-1}`."""
        return self.alpha * (1 - self.decay**self.length) / (1 - self.decay)


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Solver):
    r"""Damped iteration :math:`a \leftarrow (1-\gamma)\,a + \gamma\,\mathrm{field}(\sigma(a))`.

    Args:
        damping: :math:`\gamma` in (0, 1]; 1 is the undamped iteration.
        order: ``"jacobi"`` updates all nodes at once; ``"gauss_seidel"`` one colour of the node graph after the other,
            which on layered networks needs about half the sweeps.
        torus: a :class:`Fading` memory of this phase's past iterates.
    """

    damping: float = 1.0
    order: Literal["jacobi", "gauss_seidel"] = "jacobi"
    torus: Fading | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            "FixedPoint",
            "damping",
            self.damping,
            0 < self.damping <= 1,
            "in (0, 1]",
            "1 is undamped, try 0.5",
        )
        orders = ("jacobi", "gauss_seidel")
        require("FixedPoint", "order", self.order, self.order in orders, f"one of {orders}", "choose one")

    def self_coupling(self) -> float:
        return self.torus.total if self.torus is not None and self.torus.mode == "recurrent" else 0.0

    def extrapolates(self) -> bool:
        return self.torus is not None

    def begin(self, problem: Problem, a: State, h: State) -> dict[str, Ring] | None:
        if self.torus is None:
            return None
        kept = h if self.torus.mode == "recurrent" else a
        return {n: Ring(t, self.torus.length, self.torus.decay) for n, t in kept.items()}

    def select(self, carry: dict[str, Ring] | None, index: torch.Tensor) -> dict[str, Ring] | None:
        return None if carry is None else {n: ring.selected(index) for n, ring in carry.items()}

    def step(self, problem: Problem, a: State, h: State, carry: dict[str, Ring] | None) -> tuple[State, State, State]:
        if self.order == "jacobi":
            field = problem.field(h)
            residual = {n: f - a[n] for n, f in field.items()}
            a = {n: self._update(a[n], h[n], f, n, carry) for n, f in field.items()}
            return a, problem.activate(a), residual
        a, h, residual = dict(a), dict(h), {}
        for colour in problem.colours():
            for n, f in problem.field(h, colour).items():
                residual[n] = f - a[n]
                a[n] = self._update(a[n], h[n], f, n, carry)
            h.update(problem.activate({n: a[n] for n in colour}))
        return a, h, residual

    def _update(
        self, a: torch.Tensor, h: torch.Tensor, f: torch.Tensor, n: str, carry: dict[str, Ring] | None
    ) -> torch.Tensor:
        if carry is not None and self.torus is not None:
            ring, torus = carry[n], self.torus
            if torus.mode == "recurrent":
                f = f + (torus.alpha * ring.fading_sum - torus.total * h)
                ring.push(h)
            elif torus.alpha > 0:
                ring.push(a)
                f = (f + torus.alpha * ring.fading_sum) / (1 + torus.total)
            else:
                f = f + (torus.alpha * ring.fading_sum - torus.total * a)
                ring.push(a)
        return f if self.damping == 1 else torch.lerp(a, f, self.damping)
