"""What `toreq show` says of state-space maps: where their decays are, and how the tokens that they join settle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor, nn

from toreq.core import SSM
from toreq.diagnostics.plots import MARKERS, Array, Theme, axes_of
from toreq.diagnostics.relaxation import drive_and_cotangent, way_to_equilibrium
from toreq.layer import Equilibrium, equilibria


@dataclass(frozen=True)
class Scans:
    r"""The state-space maps of a network, and one free phase.

    Attributes:
        eigenvalues: of each map from the tokens upwards the decays at :math:`\Delta = 1`, complex, flat.
        distance: ``(T, N)``, of each token :math:`\|h_t - h^*\|/\|h^*\|`, the mean over examples; the start is the
            first row.
    """

    eigenvalues: list[NDArray[np.complexfloating]]
    distance: NDArray[np.floating]


def state_space_layer(net: nn.Module) -> Equilibrium | None:
    """The first equilibrium layer that has state-space maps; None for a network without one."""
    return next((found for found in equilibria(net) if any(isinstance(m, SSM) for m in found.modules())), None)


@torch.no_grad()
def scans(net: nn.Module, x: Tensor, y: Tensor) -> Scans | None:
    """The maps' eigenvalues and the tokens' way to equilibrium; None for a network without state-space maps.

    Args:
        net: the network.
        x, y: a batch.
    """
    layer = state_space_layer(net)
    if layer is None:
        return None
    values = [m.eigenvalues().flatten().cpu().numpy() for m in layer.modules() if isinstance(m, SSM)]
    drive, _ = drive_and_cotangent(net, layer, x, y)
    states, end = way_to_equilibrium(layer, drive)
    bindings, name = layer.dynamics.bind(drive), layer.dynamics.names[0]
    goal = end[name]
    size = goal.norm(dim=-1).clamp_min(torch.finfo(goal.dtype).tiny)
    shown = [layer.dynamics.activate(a, bindings)[name] for a in states]
    distance = torch.stack([((h - goal).norm(dim=-1) / size).mean(0) for h in shown])
    return Scans(values, distance.double().cpu().numpy())


def draw_eigenvalues(values: list[NDArray[np.complexfloating]], theme: Theme = "light") -> Figure:
    """The decays of each map in the complex plane, in the unit disk (upper half: conjugates decay alike)."""
    with axes_of(theme) as (figure, axes, palette):
        angle = np.linspace(0, np.pi, 181)
        axes.plot(np.cos(angle), np.sin(angle), color=palette.ink, linewidth=1.0)
        for index, one in enumerate(values):
            look = index % len(palette.series)
            name = f"map {index + 1}" + (" (of the tokens)" if index == 0 else "")
            axes.plot(
                one.real, np.abs(one.imag), linestyle="none", marker=MARKERS[look], color=palette.series[look],
                alpha=0.7, label=name,
            )  # fmt: skip
        axes.set_aspect("equal")
        axes.set(title="Decays in the unit disk", xlabel="real part", ylabel="imaginary part")
        axes.set_ylim(-0.05, 1.1)
        if len(values) > 1:
            axes.legend(loc="upper left")
        return figure


def draw_tokens(distance: Array, theme: Theme = "light") -> Figure:
    """Each token's distance from its equilibrium (rows) after each step (columns), in powers of ten, from the largest
    down to a millionth of it; (T, N), the start in the first row."""
    values = np.asarray(distance, dtype=np.float64).T
    top = max(float(values.max()), np.finfo(np.float64).tiny)
    with axes_of(theme) as (figure, axes, palette):
        axes.grid(visible=False)
        shown = np.log10(np.maximum(values, 1e-6 * top))
        image = axes.imshow(shown, cmap=palette.ramp, origin="lower", aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes, label="distance, power of ten")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.set(title="The tokens settle", xlabel="step", ylabel="token")
        return figure
