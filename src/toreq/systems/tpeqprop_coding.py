"""Standard predictive coding, the baseline of TPEqProp: T gradient steps on the states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from toreq.core.energy import Dynamics, Energy
from toreq.core.residual import Residual
from toreq.core.state import State, added, difference, norm, scaled
from toreq.errors import DivergenceError
from toreq.estimators.base import Estimate, Estimator, FreePhase, LinearNudge, Nudge, Statistics, Support
from toreq.estimators.predictive import Predictive
from toreq.solvers.base import require
from toreq.solvers.problem import relative
from toreq.solvers.solution import Solution


@dataclass(frozen=True, kw_only=True)
class PredictiveCoding(Estimator):
    r"""Predictive coding as usually run (Whittington and Bogacz 2017): T gradient steps on the states, then one update.

    .. math:: h \leftarrow h - \eta\,[h - f(h) - J^\top(h - f(h)) + \beta v], \qquad
              \partial_\theta C \approx -\tfrac1\beta\,(h - f(h))^\top\partial_\theta f

    from the forward pass, T times. The errors are recomputed from the states; v is the cost's cotangent at the forward
    pass, or with ``nudge="cost"`` and :meth:`toreq.Equilibrium.loss` at the moving state, as in the papers. As
    :math:`\beta\to0` and :math:`T\to\infty` it is the true gradient; what is usually run, :math:`\beta = 1` and few
    steps, is not: a level's error first moves when those above it have, and errors decay on the way. Small beta costs
    float32 digits here, since h - f(h) cancels; a step is stable for :math:`\eta < 2/\|I - J\|^2`.

    Args:
        steps: T, at least 1.
        rate: :math:`\eta` in (0, 2).
        beta: strength of the cost beside the prediction errors, above 0. A cotangent is taken to be that of a mean
            over the batch, so that at 1 the cost counts fully for each example.
        nudge: ``"linear"`` or ``"cost"``.
    """

    name: ClassVar[str] = "predictive_coding"
    steps: int = 20
    rate: float = 0.1
    guard: bool = True
    beta: float = 1.0
    nudge: Literal["linear", "cost"] = "linear"
    tolerance: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        require("PredictiveCoding", "steps", self.steps, self.steps >= 1, "an integer >= 1", "try 20")
        require("PredictiveCoding", "rate", self.rate, 0 < self.rate < 2, "in (0, 2)", "try 0.1")
        modes = ("linear", "cost")
        require("PredictiveCoding", "nudge", self.nudge, self.nudge in modes, f"one of {modes}", "choose one")
        require("PredictiveCoding", "beta", self.beta, self.beta > 0, "> 0", "1 is the usual energy")

    def supports(self, dynamics: Dynamics) -> Support:
        return Predictive().supports(dynamics)

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        energy = free.dynamics
        assert isinstance(energy, Energy)
        size = next(iter(free.h.values())).shape[0]
        # a linear cost carries the mean over the batch; a cost per example does not
        per = self.beta * (size if isinstance(nudge, LinearNudge) else 1)
        beta = torch.full_like(next(iter(free.h.values())).flatten(1)[:, 0], per)
        terms = {c.node: (name, c) for name, c in energy.terms() if isinstance(c, Residual)}
        h, force = free.h, {}
        rate, last = torch.full_like(beta, self.rate), torch.full_like(beta, torch.inf)
        for _ in range(self.steps):
            force = self._force(terms, free, h, nudge, beta)
            if self.guard:
                now = norm(force)
                rate, last = torch.where(now > last, rate / 2, rate), now
            h = added(h, scaled(force, rate))
        grads: dict[str, dict[str, Tensor]] = {}
        eps: State = {}
        for n, (name, c) in terms.items():
            at = c.linearised(h, free.bindings[name])
            eps[n] = h[n] - at.out
            cotangent = scaled({n: eps[n]}, -1 / beta)[n]
            grads[name] = at.back(cotangent, message=False, gradient=True)[1]
        residual = relative(force, h)
        if not bool(torch.isfinite(residual).all()):
            raise DivergenceError(
                f"PredictiveCoding: expected finite states, got an overflow after {self.steps} steps of "
                f"{self.rate}; lower the rate"
            )
        flat = [
            grads.get(name, {}).get(k)
            for name, b in free.bindings.items()
            for group in (b.shared, b.batched)
            for k in group
        ]
        joint = {f"eps_{n}": t for n, t in eps.items()} | {f"h_{n}": t for n, t in h.items()}
        steps = torch.full((size,), self.steps, dtype=torch.int64, device=residual.device)
        done = torch.ones_like(steps, dtype=torch.bool)
        return Estimate(
            flat, Statistics(steps, residual, done, beta=beta), Solution(joint, joint, steps, residual, done)
        )

    @staticmethod
    def _force(terms: dict[str, tuple[str, Residual]], free: FreePhase, h: State, nudge: Nudge, beta: Tensor) -> State:
        """Minus the gradient of the energy and the cost in the states."""
        at = {n: c.linearised(h, free.bindings[name]) for n, (name, c) in terms.items()}
        eps = difference(h, {n: term.out for n, term in at.items()})
        force = added({n: -e for n, e in eps.items()}, scaled(nudge.cotangent(h), -beta))
        for n, (_, c) in terms.items():
            message, _ = at[n].back(eps[n], message=True, gradient=False)
            if message is not None:
                assert c.source is not None
                force = added(force, {c.source: message})
        return force
