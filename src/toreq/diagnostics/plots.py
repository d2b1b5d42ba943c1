"""Figures of a run and of the demo: colour-blind safe (Okabe-Ito), legible when 390 pixels wide, light or dark."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

# on its first run on a machine matplotlib names every font that it does not find; the one it falls back to is meant
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

Theme = Literal["light", "dark"]
Array = NDArray[np.floating] | NDArray[np.integer]

# A phone shows a figure about 358 CSS pixels wide: 4.6 inches then gives 78 pixels an inch, 10 pt stay 11 pixels.
WIDTH, HEIGHT, DPI = 4.6, 3.1, 200


@dataclass(frozen=True)
class Palette:
    """Colours of one theme; ``series`` are distinct in hue and in lightness."""

    ground: str
    ink: str
    faint: str
    series: tuple[str, ...]
    ramp: str


PALETTES: Mapping[Theme, Palette] = {
    "light": Palette(
        "#ffffff", "#1c2024", "#d5d9de", ("#0072B2", "#D55E00", "#009E73", "#A6507F", "#5B5B5B", "#8F7A00"), "Blues"
    ),
    "dark": Palette(
        "#171a1e", "#e6e9ec", "#3a4048", ("#56B4E9", "#E69F00", "#2FC79A", "#E08FBF", "#B5B5B5", "#EFE36A"), "cividis"
    ),
}
STYLES = ("-", "--", "-.", ":", (0, (4, 1, 1, 1, 1, 1)), (0, (7, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Curve:
    """One line of a learning-curve figure: ``x`` and ``y`` of equal length."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def look(
    palette: Palette,
    *,
    see_through: bool = False,
    small: float = 9,
    legend: float = 9,
    line: float = 1.9,
    mark: float = 4.5,
) -> Any:
    """Matplotlib's settings of every figure of this project.

    Args:
        palette: its colours.
        see_through: no ground, for a page that has its own.
        small, legend: points of the axes' numbers and of the legend.
        line, mark: points of lines and markers.
    """
    ground = "none" if see_through else palette.ground
    return {
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.labelsize": 10,
        "legend.fontsize": legend,
        "xtick.labelsize": small,
        "ytick.labelsize": small,
        "text.color": palette.ink,
        "axes.labelcolor": palette.ink,
        "axes.edgecolor": palette.faint,
        "xtick.color": palette.ink,
        "ytick.color": palette.ink,
        "axes.facecolor": ground,
        "figure.facecolor": ground,
        "grid.color": palette.faint,
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "lines.linewidth": line,
        "lines.markersize": mark,
    }


@contextmanager
def axes_of(theme: Theme, height: float = HEIGHT, width: float = WIDTH) -> Iterator[tuple[Figure, Axes, Palette]]:
    """A figure of one theme, its axes and its colours, for as long as it is drawn."""
    palette = PALETTES[theme]
    with matplotlib.rc_context(look(palette)):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot(), palette


def curves(
    lines: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    theme: Theme = "light",
    log: bool = False,
    whole_steps: bool = True,
) -> Figure:
    """Several labelled curves in one frame."""
    with axes_of(theme) as (figure, axes, palette):
        for index, line in enumerate(lines):
            axes.plot(
                line.x,
                line.y,
                color=palette.series[index % len(palette.series)],
                linestyle=STYLES[index % len(STYLES)],
                marker=MARKERS[index % len(MARKERS)] if len(line.x) <= 30 else None,
                label=line.label,
            )
        if log:
            axes.set_yscale("log")
        if whole_steps:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            if max((len(line.x) for line in lines), default=0) == 1:
                axes.set_xticks([lines[0].x[0]])  # one point has no range from which to choose whole numbers
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        if len(lines) > 1:
            axes.legend()
        return figure


def learning(
    epochs: Sequence[float],
    loss: Sequence[float],
    accuracy: Mapping[str, Sequence[float]],
    theme: Theme = "light",
) -> Figure:
    """Loss (left axis) and accuracies in percent (right axis) against epochs."""
    with axes_of(theme) as (figure, axes, palette):
        marker = MARKERS[0] if len(epochs) <= 30 else None
        (drawn,) = axes.plot(epochs, loss, color=palette.series[0], marker=marker, label="training loss")
        handles = [drawn]
        axes.set(title="Learning curve", xlabel="epoch", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if accuracy:
            right = axes.twinx()
            right.grid(visible=False)
            right.spines["right"].set_visible(True)
            for index, (label, values) in enumerate(accuracy.items(), start=1):
                handles += right.plot(
                    epochs,
                    values,
                    color=palette.series[index],
                    linestyle=STYLES[index],
                    marker=MARKERS[index] if len(epochs) <= 30 else None,
                    label=label,
                )
            right.set_ylabel("accuracy (%)")
        axes.legend(handles=handles, loc="center right")
        return figure


def residuals(phases: Mapping[str, Array], tolerance: float | None, theme: Theme = "light") -> Figure:
    """Residual against step, logarithmic: per phase the median over examples and the band that holds 80% of them.

    ``phases`` maps a label to a (T, B) array of relative residuals.
    """
    with axes_of(theme) as (figure, axes, palette):
        for index, (label, values) in enumerate(phases.items()):
            if len(values) == 0:
                continue
            shown = np.where(np.asarray(values) > 0, values, np.nan)
            steps = np.arange(1, len(shown) + 1)
            low, middle, high = (_quantile(shown, q) for q in (0.1, 0.5, 0.9))
            color = palette.series[index % len(palette.series)]
            axes.fill_between(steps, low, high, color=color, alpha=0.22, linewidth=0)
            axes.plot(
                steps,
                middle,
                color=color,
                linestyle=STYLES[index],
                marker=MARKERS[index] if len(steps) <= 30 else None,
                label=label,
            )
        axes.set_yscale("log")
        if tolerance:
            axes.axhline(tolerance, color=palette.ink, linewidth=1.0, linestyle=":", label="tolerance")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set(title="Residual of the relaxation", xlabel="step", ylabel="relative residual")
        axes.legend()
        return figure


def levels(distance: Sequence[Array], theme: Theme = "light") -> Figure:
    """Each level's distance from its equilibrium against step, the finest first: median over examples and the middle
    80%; per level (T, B), the start in the first row."""
    with axes_of(theme) as (figure, axes, palette):
        for index, values in enumerate(distance):
            shown = np.where(np.asarray(values) > 0, values, np.nan)
            low, middle, high = (_quantile(shown, q) for q in (0.1, 0.5, 0.9))
            look = index % len(palette.series)
            axes.fill_between(range(len(shown)), low, high, color=palette.series[look], alpha=0.2, linewidth=0)
            name = f"level {index + 1}" + (" (finest)" if index == 0 else "")
            axes.plot(middle, color=palette.series[look], linestyle=STYLES[look], marker=MARKERS[look], label=name)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set(title="The levels settle", xlabel="step", ylabel="distance from equilibrium")
        axes.legend()
        return figure


def level_maps(maps: Sequence[Array], theme: Theme = "light") -> Figure:
    """Where each level (rows, the finest first) is still away from its equilibrium, at up to six steps (columns): the
    distance in powers of ten, from a level's largest down to a thousandth of it; per level (T, H, W)."""
    last = len(maps[0]) - 1
    steps = sorted({round(last * i / 5) for i in range(6)})
    with axes_of(theme, height=0.75 + 0.78 * len(maps)) as (figure, axes, palette):
        axes.remove()
        figure.suptitle("Distance from equilibrium, one image", fontsize=10.5)
        for row, values in enumerate(maps):
            top = max(float(np.max(values)), np.finfo(np.float64).tiny)
            for column, step in enumerate(steps):
                cell = figure.add_subplot(len(maps), len(steps), row * len(steps) + column + 1)
                shown = np.log10(np.maximum(np.asarray(values[step]) / top, 1e-3))
                cell.imshow(shown, cmap=palette.ramp, vmin=-3.0, vmax=0.0, interpolation="nearest")
                cell.set_xticks([])
                cell.set_yticks([])
                cell.grid(visible=False)
                if row == 0:
                    cell.set_title(f"step {step}" if column == 0 else str(step), fontsize=9, pad=2)
                if column == 0:
                    cell.set_ylabel(f"level {row + 1}", fontsize=9)
        return figure


def level_errors(sizes: Array, theme: Theme = "light") -> Figure:
    """Size of each level's error (rows, the last level on top) after each step (columns) in powers of ten, the median
    over examples, from the largest down to a millionth of it; (T, L, B)."""
    middle = np.median(np.asarray(sizes, dtype=np.float64), axis=2).T
    top = max(float(np.nanmax(middle)), np.finfo(np.float64).tiny)
    # a level that no error has reached yet stays empty
    shown = np.log10(np.where(middle > 0, np.maximum(middle, 1e-6 * top), np.nan))
    steps, count = middle.shape[1], len(middle)
    with axes_of(theme) as (figure, axes, palette):
        axes.grid(visible=False)
        extent = (-0.5, steps - 0.5, 0.5, count + 0.5)
        image = axes.imshow(
            shown, cmap=palette.ramp, origin="lower", aspect="auto", interpolation="nearest", extent=extent
        )
        figure.colorbar(image, ax=axes, label="size of the error, power of ten")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.set(title="Errors on their way down", xlabel="step of the nudged phase", ylabel="level")
        return figure


def _quantile(values: Array, q: float) -> Array:
    """Quantile over examples of each step; a step where every example is exactly settled stays empty."""
    rows = [row[np.isfinite(row)] for row in values]
    return np.array([np.quantile(row, q) if len(row) else np.nan for row in rows])


def energy(trace: Array, theme: Theme = "light") -> Figure:
    """Energy above its last value against step: median over examples and the band that holds 80% of them; (T, B)."""
    above = np.asarray(trace, dtype=np.float64) - np.asarray(trace, dtype=np.float64)[-1]
    with axes_of(theme) as (figure, axes, palette):
        steps = np.arange(1, len(above) + 1)
        low, middle, high = (np.quantile(above, q, axis=1) for q in (0.1, 0.5, 0.9))
        axes.fill_between(steps, low, high, color=palette.series[2], alpha=0.25, linewidth=0)
        axes.plot(steps, middle, color=palette.series[2], marker=MARKERS[2] if len(steps) <= 30 else None)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set(title="Energy in the free phase", xlabel="step", ylabel="energy above the equilibrium's")
        return figure


def steps_histogram(phases: Mapping[str, Array], theme: Theme = "light") -> Figure:
    """How many relaxation steps each example took, per phase, as shares of the examples."""
    with axes_of(theme) as (figure, axes, palette):
        present = {label: np.asarray(values) for label, values in phases.items() if len(values)}
        last = max((int(values.max()) for values in present.values()), default=1)
        width = max(1, -(-last // 40))
        edges = np.arange(0.5, last + width + 0.5, width)
        for index, (label, values) in enumerate(present.items()):
            axes.hist(
                values,
                bins=edges.tolist(),
                weights=np.full(len(values), 100.0 / len(values)),
                color=palette.series[index],
                edgecolor=palette.ground,
                linewidth=0.5,
                alpha=0.75,
                hatch=None if index == 0 else "///",
                label=f"{label} (mean {values.mean():.1f})",
            )
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set(title="Steps to settle", xlabel="steps", ylabel="examples (%)")
        axes.legend()
        return figure


def confusion(counts: Array, theme: Theme = "light") -> Figure:
    """Confusion matrix, rows the true class; colour is the share of the row, figures are counts; (C, C)."""
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    share = counts / total
    with axes_of(theme, height=WIDTH) as (figure, axes, palette):
        axes.grid(visible=False)
        # A square root keeps the few errors visible beside a full diagonal.
        image = axes.imshow(np.sqrt(share), cmap=palette.ramp, vmin=0.0, vmax=1.0)
        classes = len(counts)
        if classes <= 12:
            for row in range(classes):
                for column in range(classes):
                    if counts[row, column]:
                        red, green, blue, _ = image.cmap(float(np.sqrt(share[row, column])))
                        bright = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
                        axes.text(
                            column,
                            row,
                            str(int(counts[row, column])),
                            ha="center",
                            va="center",
                            fontsize=8,
                            color="#101214" if bright else "#ffffff",
                        )
            axes.set_xticks(range(classes))
            axes.set_yticks(range(classes))
        axes.set(title="Confusion matrix (examples)", xlabel="predicted", ylabel="true")
        return figure


def misclassified(images: Array, truth: Array, predicted: Array, theme: Theme = "light") -> Figure:
    """Up to 25 wrongly classified images (K, H, W) or (K, H, W, 3), each titled 'true > predicted'."""
    shown = min(len(images), 25)
    columns = 5
    rows = max(1, -(-shown // columns))
    with axes_of(theme, height=0.55 + 1.0 * rows) as (figure, axes, _):
        axes.remove()
        figure.suptitle(
            "Misclassified: true \N{RIGHTWARDS ARROW} predicted" if shown else "Misclassified: none",
            fontsize=10.5,
        )
        for index in range(shown):
            cell = figure.add_subplot(rows, columns, index + 1)
            cell.imshow(images[index], cmap="gray", interpolation="nearest")
            cell.set_title(f"{int(truth[index])} \N{RIGHTWARDS ARROW} {int(predicted[index])}", fontsize=9, pad=2)
            cell.set_axis_off()
        return figure


def bars(
    labels: Sequence[str],
    values: Sequence[float],
    groups: Sequence[str],
    *,
    title: str,
    x_label: str,
    theme: Theme = "light",
) -> Figure:
    """Horizontal bars of one colour per group, each with its value written beside it."""
    kinds = list(dict.fromkeys(groups))
    with axes_of(theme, height=0.95 + 0.36 * max(len(labels), 1)) as (figure, axes, palette):
        places = np.arange(len(labels))[::-1]
        colors = [palette.series[kinds.index(g) % len(palette.series)] for g in groups]
        drawn = axes.barh(places, values, color=colors, height=0.65)
        axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=9)
        axes.set_yticks(places, labels)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.16)
        axes.set(title=title, xlabel=x_label)
        return figure
