"""Figures of the torus of contexts and of spikes."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from toreq.diagnostics.contexts import Raster, TorusView
from toreq.diagnostics.plots import Array, Palette, Theme, axes_of


def torus(view: TorusView, theme: Theme = "light") -> Figure:
    """Occupancy and curvature of the slots, and the units that one input's context opens, side by side."""
    with axes_of(theme, height=2.4) as (figure, only, palette):
        only.remove()
        shape = view.occupancy.shape
        _map(figure, 1, view.occupancy, "examples seen", palette)
        _map(figure, 2, view.curvature, "curvature", palette)
        cell = figure.add_subplot(1, 3, 3)
        cell.grid(visible=False)
        at = view.places
        shut = view.opening < 0.5
        # a closed unit keeps a mark, so that the torus is seen whole
        cell.scatter(at[shut, 1], at[shut, 0], s=4, color=palette.faint, label="closed")
        cell.scatter(at[~shut, 1], at[~shut, 0], s=5, color=palette.series[1], label="open")
        cell.plot(view.slot[1], view.slot[0], marker="+", markersize=9, color=palette.ink, clip_on=False)
        cell.set_xlim(0, max(shape[1], 1))
        cell.set_ylim(shape[0], 0)
        cell.set_aspect("equal" if shape[1] > 1 else "auto")
        cell.set_xticks([])
        cell.set_yticks([])
        cell.set_title("units opened", fontsize=9.5)
        cell.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.05), fontsize=8, handletextpad=0.1, columnspacing=0.8, ncol=2
        )
        return figure


def _map(figure: Figure, place: int, values: Array, title: str, palette: Palette) -> None:
    cell = figure.add_subplot(1, 3, place)
    cell.grid(visible=False)
    image = cell.imshow(values, cmap=palette.ramp, interpolation="nearest")
    cell.set_xticks(range(values.shape[1]))
    cell.set_yticks(range(values.shape[0]))
    cell.tick_params(labelsize=8)
    cell.set_title(title, fontsize=9.5)
    low, high = float(np.min(values)), float(np.max(values))
    bar = figure.colorbar(image, ax=cell, orientation="horizontal", ticks=[low, high] if high > low else [low])
    bar.ax.set_xticklabels([f"{v:.3g}" for v in ((low, high) if high > low else (low,))], fontsize=8)


def raster(found: Raster, theme: Theme = "light") -> Figure:
    """Every spike of the first layer for one input: steps across, units up, those of open gates alone fire."""
    with axes_of(theme) as (figure, only, palette):
        step, unit = np.nonzero(found.spikes)
        only.scatter(step + 1, unit, s=2, marker="|", linewidths=0.7, color=palette.series[0])
        edges = np.flatnonzero(np.diff(np.concatenate([[0], found.opened.astype(int), [0]])))
        for low, high in zip(edges[::2], edges[1::2], strict=True):
            only.axhspan(low, high, color=palette.series[1], alpha=0.12, linewidth=0)
        only.set(
            title="Spikes of the first layer, one input",
            xlabel="step",
            ylabel="unit, by place (shaded: open)",
            xlim=(0, len(found.spikes) + 1),
            ylim=(0, found.spikes.shape[1]),
        )
        return figure
