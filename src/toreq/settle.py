"""The autograd node behind the equilibrium layer: free phase forward, estimator backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from toreq.core.energy import Dynamics
from toreq.core.state import Bindings, State, laid_out, leaves, with_leaves
from toreq.errors import ConfigError, DivergenceError
from toreq.estimators.base import Cost, CostNudge, Estimator, FreePhase, LinearNudge, Nudge, Statistics
from toreq.solvers import Solution, Solver


@dataclass
class Last:
    """Statistics of the latest free and nudged phase; None before the first."""

    free: Statistics | None = None
    nudged: Statistics | None = None


@runtime_checkable
class Host(Protocol):
    """What :class:`Settle` needs of the layer it works for."""

    readout: tuple[str, ...]
    last: Last
    dynamics: Dynamics

    @property
    def solver(self) -> Solver: ...

    @property
    def estimator(self) -> Estimator: ...

    def free_phase(self, bindings: Bindings) -> Solution: ...

    def warn_unsettled(self, statistics: Statistics, phase: str, expected: bool) -> None: ...


def cost_per_example(out: State, cost: Cost) -> Tensor:
    """The cost of the read-out, ``(B,)``.

    Raises:
        ConfigError: when the cost has been reduced over the batch.
    """
    value = cost(out)
    size = next(iter(out.values())).shape[0]
    if value.shape != (size,):
        raise ConfigError(
            f"Equilibrium.loss: expected one cost per example, shape {(size,)}, got {tuple(value.shape)}; "
            "do not reduce over the batch"
        )
    return value


def full_precision(bindings: Bindings) -> torch.autocast:
    """A context without autocast: a contrast of equilibria needs the digits."""
    kind = next(iter(leaves(bindings))).device.type
    return torch.autocast(kind, enabled=False)


class Settle(torch.autograd.Function):
    """Free phase forward, estimator backward; everything bound before the loop is an ordinary autograd input."""

    @staticmethod
    def forward(ctx: Any, layer: Host, bindings: Bindings, cost: Cost | None, *flat: Tensor) -> Any:
        bound = with_leaves(bindings, [t.detach() for t in flat])
        solution = layer.free_phase(bound)
        ctx.layer, ctx.structure, ctx.cost = layer, bound, cost
        ctx.estimator, ctx.solver = layer.estimator, layer.solver.nudged()
        ctx.save_for_backward(*flat)
        ctx.a, ctx.h = solution.state, {n: t.detach() for n, t in solution.h.items()}
        ctx.set_materialize_grads(False)
        # clones: outputs must not share storage with the state kept for backward, which a user could overwrite in place
        out = {n: solution.h[n].clone() for n in layer.readout}
        if cost is None:
            return tuple(out.values())
        ctx.mark_non_differentiable(*out.values())
        return cost_per_example(out, cost).mean(), *out.values()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Equilibrium.backward: expected a single backward, got create_graph=True; an equilibrium "
                "contrast is not differentiable again: use estimator=Unrolled() for double backward"
            )
        layer: Host = ctx.layer
        none = (None, None, None)
        if all(c is None for c in cotangents):
            return (*none, *[None] * len(ctx.saved_tensors))
        for name, c in zip(layer.readout, cotangents, strict=False):
            if c is not None and not bool(torch.isfinite(c).all()):
                raise DivergenceError(
                    f"Equilibrium.backward: expected a finite cotangent, got nan or inf on the read-out "
                    f"{name!r}; the loss or "
                    "what lies between it and this layer has overflowed: check it before backward"
                )
        bound = with_leaves(ctx.structure, [t.detach() for t in ctx.saved_tensors])
        free = FreePhase(layer.dynamics, bound, ctx.solver, ctx.a, ctx.h)
        nudge, factor = _nudge(ctx, layer, cotangents)
        with torch.no_grad(), full_precision(bound):
            estimate = ctx.estimator.estimate(free, nudge)
        layer.last.nudged = estimate.statistics
        if not bool(torch.isfinite(estimate.statistics.residual).all()):
            raise DivergenceError(
                "Equilibrium.backward: expected a finite nudged phase, got an overflow; lower beta or the damping, or "
                "control the couplings' norm"
            )
        tolerance = getattr(ctx.estimator, "tolerance", 0.0)
        layer.warn_unsettled(estimate.statistics, "nudged", tolerance > 0)
        needs = ctx.needs_input_grad[3:]
        grads = [
            None if g is None or not need else (g if factor is None else g * factor)
            for g, need in zip(estimate.gradients, needs, strict=True)
        ]
        return (*none, *grads)


def _nudge(ctx: Any, layer: Host, cotangents: Sequence[Tensor | None]) -> tuple[Nudge, Tensor | None]:
    if ctx.cost is None:
        v = {
            n: laid_out(c.to(ctx.h[n].dtype), ctx.h[n])
            for n, c in zip(layer.readout, cotangents, strict=True)
            if c is not None
        }
        return LinearNudge(v), None
    cost = CostNudge(ctx.cost, layer.readout)
    size = next(iter(ctx.h.values())).shape[0]
    factor = cotangents[0] / size if cotangents[0] is not None else None
    if getattr(ctx.estimator, "nudge", None) == "cost":
        return cost, factor
    return LinearNudge(cost.cotangent(ctx.h)), factor
