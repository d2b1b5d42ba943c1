"""Langevin noise in nudged phases, the same in both, that ends before they settle."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from toreq.core.state import repeated, stacked
from toreq.estimators import Centered
from toreq.estimators.base import FreePhase, Nudge
from toreq.estimators.pairs import twice
from toreq.solvers.base import require
from toreq.solvers.noise import Noise
from toreq.solvers.problem import Relaxation, pair_difference
from toreq.solvers.solution import Solution


@dataclass(frozen=True, kw_only=True)
class ExploredCentered(Centered):
    r"""Centered Equilibrium Propagation whose nudged phases explore before they settle.

    For ``kicks`` steps both phases take

    .. math:: a \leftarrow a + \eta\,[f(\sigma(a)) \mp \beta v - a] + \sqrt{2\eta\tau_k}\,\xi_k,

    with one draw of :math:`\xi_k` for both and a temperature :math:`\tau_k` that falls linearly to 0; then they settle
    without noise. In a contraction there is one equilibrium, and the contrast is that of ``Centered`` to the tolerance:
    noise then only costs steps. Where there are several, both phases are driven to the same neighbouring one, so that
    their contrast stays one of a single basin; the free phase's gradient is then that of another equilibrium of the
    same energy.

    Args:
        temperature: :math:`\tau` at the first kick, at least 0.
        kicks: steps under noise, at least 1.
        step: :math:`\eta` in (0, 1].
        seed: of the noise.
        noise: the stream; copies by ``dataclasses.replace`` share it.
    """

    name: ClassVar[str] = "explored"
    temperature: float = 0.01
    kicks: int = 5
    step: float = 0.5
    seed: int = 0
    noise: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.noise, Noise) or self.noise.seed != self.seed:
            object.__setattr__(self, "noise", Noise.of(self.seed))
        where = type(self).__name__
        hot = 0 <= self.temperature < math.inf
        require(where, "temperature", self.temperature, hot, ">= 0", "0 is Centered")
        require(where, "kicks", self.kicks, self.kicks >= 1, ">= 1", "try 5")
        require(where, "step", self.step, 0 < self.step <= 1, "in (0, 1]", "try 0.5")

    def pair(self, free: FreePhase, nudge: Nudge, beta: Tensor, active: Tensor, record: bool) -> Solution:
        both = stacked(free.a, free.a), stacked(free.h, free.h)
        force, extra = self.force(twice(nudge), both[1], torch.cat([beta, -beta]))
        problem = Relaxation(free.dynamics, repeated(free.bindings, 2), force, extra, origin=both)
        a = self._explored(problem, dict(both[0]))
        start = a, problem.activate(a)
        found = self.relax(problem, start, free, pair_difference, active, record)
        return replace(found, steps=found.steps + self.kicks)

    def _explored(self, problem: Relaxation, a: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = self.noise.chain(next(iter(a.values())).device)
        for k in range(self.kicks):
            size = math.sqrt(2 * self.step * self.temperature * (1 - k / self.kicks))
            f = problem.field(problem.activate(a))
            for n, t in f.items():
                shape = (t.shape[0] // 2, *t.shape[1:])
                xi = torch.randn(shape, generator=generator, dtype=t.dtype, device=t.device)
                a[n] = torch.lerp(a[n], t, self.step).add_(torch.cat([xi, xi]), alpha=size)
        return a
