"""How the levels of a pyramid settle: each level's distance from its equilibrium, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toreq.diagnostics.relaxation import drive_and_cotangent, way_to_equilibrium
from toreq.layer import equilibria


@dataclass(frozen=True)
class LevelSettling:
    """A free phase, level by level, the finest first.

    Attributes:
        distance: per level ``(T, B)``, the norm of :math:`h_t - h^*` over that of :math:`h^*`; the start is the first
            row.
        maps: per level ``(T, H, W)``, the first example's :math:`|h_t - h^*|` averaged over the channels of the level's
            last node; empty where that node is no image.
        tolerance: relative residual at which the solver stops.
    """

    distance: list[NDArray[np.floating]]
    maps: list[NDArray[np.floating]]
    tolerance: float


@torch.no_grad()
def level_settling(net: nn.Module, x: Tensor, y: Tensor) -> LevelSettling | None:
    """The free phase of the first equilibrium layer that has several levels; None for a network without one.

    Args:
        net: the network.
        x, y: a batch.
    """
    layer = next((found for found in equilibria(net) if len(found.dynamics.levels()) > 1), None)
    if layer is None:
        return None
    drive, _ = drive_and_cotangent(net, layer, x, y)
    states, end = way_to_equilibrium(layer, drive)
    bindings = layer.dynamics.bind(drive)
    shown = [layer.dynamics.activate(a, bindings) for a in states]
    order = layer.dynamics.names
    distance, maps = [], []
    for level in layer.dynamics.levels():
        nodes = [n for n in order if n in level]
        goal = torch.cat([end[n].flatten(1) for n in nodes], 1)
        state = [torch.cat([h[n].flatten(1) for n in nodes], 1) for h in shown]
        size = goal.norm(dim=1).clamp_min(torch.finfo(goal.dtype).tiny)
        distance.append(torch.stack([(s - goal).norm(dim=1) / size for s in state]).double().cpu().numpy())
        top = nodes[-1]
        if end[top].dim() == 4:
            moved = [(h[top][0] - end[top][0]).abs().mean(0) for h in shown]
            maps.append(torch.stack(moved).double().cpu().numpy())
    return LevelSettling(distance, maps, float(layer.solver.tolerance))
