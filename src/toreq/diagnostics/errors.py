"""How the errors of a predictive network spread: each level's error node, step by step of the nudged phase."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toreq.core import Energy
from toreq.core.residual import Linearised, Residual
from toreq.core.state import State, added, detached, difference, norm
from toreq.diagnostics.relaxation import drive_and_cotangent
from toreq.layer import Equilibrium, equilibria

SETTLED, MOST = 1e-6, 200
"""Relative change at which the errors of a ring or loop have settled, and most steps until then."""


@dataclass(frozen=True)
class LevelErrors:
    r"""A nudged phase, level by level.

    Attributes:
        sizes: ``(T, L, B)``, :math:`\|\epsilon_l\|/\|\beta v\|` after each step, the nudge itself in the first row.
        names: of the levels, in the order of the network.
    """

    sizes: NDArray[np.floating]
    names: tuple[str, ...]


@torch.no_grad()
def level_errors(net: nn.Module, x: Tensor, y: Tensor) -> LevelErrors | None:
    r"""The errors of the first predictive equilibrium layer, all levels updated together at the free states,

    .. math:: \epsilon_l \leftarrow J_{l+1}^\top\epsilon_{l+1} - \beta v_l, \qquad \beta \to 0,

    until they have settled: on a chain of L levels after L - 1 steps. None for a network without such a layer, or
    where no nudge reaches it.

    Args:
        net: the network.
        x, y: a batch.
    """
    layer = next((found for found in equilibria(net) if getattr(found.dynamics, "predictive", False)), None)
    if layer is None:
        return None
    drive, cotangent = drive_and_cotangent(net, layer, x, y)
    free = layer.solve(drive)
    nudge = {layer.readout[0]: cotangent} if isinstance(cotangent, Tensor) else dict(cotangent)
    total = norm(nudge)
    if not bool((total > 0).any()):
        return None
    nudge = {n: nudge.get(n, torch.zeros_like(t)) for n, t in free.h.items()}
    at, source = _linearised(layer, drive, free.h)
    eps = {n: -t for n, t in nudge.items()}
    steps = [eps]
    for _ in range(MOST):
        moved = _step(eps, nudge, at, source)
        change = norm(difference(moved, eps)) / norm(moved)
        if not bool((change > SETTLED).any()):
            break
        eps = moved
        steps.append(eps)
    kept = total > 0  # an example without a nudge has no errors to be measured by it
    sizes = [[eps[n].flatten(1).norm(dim=1)[kept] / total[kept] for n in layer.dynamics.names] for eps in steps]
    values = torch.stack([torch.stack(row) for row in sizes]).double().cpu().numpy()
    return LevelErrors(values, layer.dynamics.names)


def _linearised(layer: Equilibrium, drive: Tensor, h: State) -> tuple[dict[str, Linearised], dict[str, str | None]]:
    """Every level's prediction at the free states, and the level that it reads."""
    assert isinstance(layer.dynamics, Energy)
    bindings = detached(layer.dynamics.bind(drive))
    terms = {c.node: (name, c) for name, c in layer.dynamics.terms() if isinstance(c, Residual)}
    at = {n: c.linearised(h, bindings[name]) for n, (name, c) in terms.items()}
    return at, {n: c.source for n, (_, c) in terms.items()}


def _step(eps: State, nudge: State, at: dict[str, Linearised], source: dict[str, str | None]) -> State:
    out = {n: -t for n, t in nudge.items()}
    for n, term in at.items():
        below = source[n]
        if below is None:
            continue
        message, _ = term.back(eps[n], message=True, gradient=False)
        assert message is not None
        out = added(out, {below: message})
    return out
