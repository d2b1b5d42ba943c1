"""What the torus of contexts holds and opens, and the spikes of one input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toreq.solvers import Spiking, Step
from toreq.systems.htsep import HTSEP

SPIKE_STEPS = 60


@dataclass(frozen=True)
class TorusView:
    """A torus of contexts, and the bump of one input.

    Attributes:
        occupancy: examples seen at each slot, ``(n_1, n_2)``; a ring is one column, further axes and sheets are summed.
        curvature: the scalar curvature of the geometry in which busy slots lie further apart, likewise.
        places: units of the first layer ``(U, 2)``.
        opening: the probability with which the first input's context opens each, ``(U,)``.
        slot: coordinates of that context ``(2,)``.
    """

    occupancy: NDArray[np.floating]
    curvature: NDArray[np.floating]
    places: NDArray[np.floating]
    opening: NDArray[np.floating]
    slot: NDArray[np.floating]


@dataclass(frozen=True)
class Raster:
    """Spikes of the first layer for one input, ``(steps, units)``, units in the order of their places' first axis."""

    spikes: NDArray[np.floating]
    opened: NDArray[np.bool_]


@torch.no_grad()
def torus_view(net: nn.Module, x: Tensor) -> TorusView | None:
    """The torus of an HTSEP network and the bump of the first input; None for any other network, or without gates.

    Args:
        net: the network.
        x: a batch.
    """
    if not isinstance(net, HTSEP) or net.context.mode == "off" or net.context.source != "statistics":
        return None
    torus = net.context
    seen = torus.count.reshape(-1, *torus.shape).double().sum(0)
    curvature = torus.geometry().ricci_scalar()
    slot = int(torus.address(x[:1])[0])
    return TorusView(
        _plane(seen),
        _plane(curvature),
        _flat(torus.places("h1")),
        torus.bump("h1")[slot].double().cpu().numpy(),
        _flat(torus.slots[slot : slot + 1])[0],
    )


@torch.no_grad()
def spike_raster(net: nn.Module, x: Tensor, steps: int = SPIKE_STEPS) -> Raster | None:
    """Sigma-delta spikes of the first input; None for a network that is not HTSEP.

    Args:
        net: the network.
        x: a batch.
        steps: of the run.
    """
    if not isinstance(net, HTSEP):
        return None
    layer, one = net.equilibrium, x[:1]
    totals: list[Tensor] = []

    def keep(step: Step) -> None:
        # the rate is the mean over the run so far
        totals.append((step.h["h1"] * step.index).round())

    shipped, warned = layer.solver, layer.warn
    layer.warn = False
    try:
        layer.solver = Spiking(max_steps=steps, tolerance=0.0)
        layer.solve(one, callback=keep)
    finally:
        layer.solver, layer.warn = shipped, warned
    spikes = torch.stack(totals).flatten(1).diff(dim=0, prepend=torch.zeros_like(totals[0]).flatten(1))
    gates = net.context.gates(one, "h1")[0]
    per = spikes.shape[1] // len(gates)  # positions of a channel
    order = net.context.places("h1")[:, 0].argsort()
    units = (order[:, None] * per + torch.arange(per)).flatten()
    return Raster(spikes[:, units].double().cpu().numpy(), (gates > 0)[order].repeat_interleave(per).cpu().numpy())


def _plane(values: Tensor) -> NDArray[np.floating]:
    while values.dim() > 2:
        values = values.sum(-1)
    return (values[:, None] if values.dim() == 1 else values).cpu().numpy()


def _flat(places: Tensor) -> NDArray[np.floating]:
    at = places[:, :2].double()
    at = torch.cat([at, torch.zeros_like(at)], 1)[:, :2] if at.shape[1] < 2 else at
    return at.cpu().numpy()
