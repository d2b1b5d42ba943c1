"""One picture for each claim: what was measured on every side, the seed's number and the aim in it."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from toreq.diagnostics.plots import MARKERS, PALETTES, STYLES, Palette, Theme, look
from toreq.evidence.claim import Claim, Criterion
from toreq.evidence.statistics import interval, mean_curve
from toreq.evidence.verdicts import Outcomes, numbers

WIDTH, ROW, MARGIN = 4.8, 0.34, 1.5
LINE, MARKED = 50, 24
"""Letters in a line of a title, and most points of a curve that get a marker (about)."""
FLOOR = 1e-9
"""What is drawn for 0 on a logarithmic axis."""


def picture(claim: Claim, outcomes: Outcomes, theme: Theme) -> Figure | None:
    """The claim's picture; None where no run has a number to draw."""
    drawn = _curves if claim.picture.curves else _points
    return drawn(claim, outcomes, theme)


def svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element whose identifiers start with ``name``, so that pages may hold several."""
    buffer = io.StringIO()
    # text stays text: it can be read aloud and searched, and the page's own font is used
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        # no date: the same numbers give the same file
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor="none")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\b(id|href|xlink:href)="(#?)', rf'\1="\2{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"([^>]*?) (?:width|height)="[^"]*"', r"\1\2", text, count=1)


@contextmanager
def _axes(theme: Theme, height: float) -> Iterator[tuple[Figure, Axes, Palette]]:
    palette = PALETTES[theme]
    with matplotlib.rc_context(look(palette, see_through=True)):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot(), palette


def _curves(claim: Claim, outcomes: Outcomes, theme: Theme) -> Figure | None:
    """Every side's curve, mean over seeds with its interval."""
    spec = claim.picture
    lines: list[tuple[str, list[tuple[float, float, float | None, float | None]]]] = []
    for side in claim.sides:
        drawn = []
        for name in spec.curves:
            found = [o.curves[name] for (s, _), o in sorted(outcomes.items()) if s == side and name in o.curves]
            points = mean_curve(found) if found else []
            if points:
                drawn.append((name, points))
        lines += [(side if len(drawn) == 1 else f"{side}, {name}", points) for name, points in drawn]
    if not lines:
        return None
    with _axes(theme, 3.0 + 0.12 * len(lines)) as (figure, axes, palette):
        for index, (label, points) in enumerate(lines):
            color = palette.series[index % len(palette.series)]
            style = STYLES[index % len(STYLES)]
            x, y = [p[0] for p in points], [p[1] for p in points]
            axes.plot(
                x, y, color=color, linestyle=style, marker=_marker(index), label=label, markevery=1 + len(x) // MARKED
            )
            if all(p[2] is not None for p in points):
                low, high = [float(p[2] or 0) for p in points], [float(p[3] or 0) for p in points]
                axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        if spec.log_x:
            axes.set_xscale("log")
        if spec.log_y:
            axes.set_yscale("log")
        if claim.criteria[0].direction == "between" and isinstance(claim.criteria[0].target, tuple):
            # the seed's number is a place on the x axis
            axes.axvspan(*claim.criteria[0].target, color=palette.faint, alpha=0.6, linewidth=0, zorder=0)
        axes.set(title=textwrap.fill(spec.title, LINE), xlabel=spec.x_label, ylabel=spec.y_label)
        _legend(figure, axes.get_legend_handles_labels()[0])
        return figure


def _points(claim: Claim, outcomes: Outcomes, theme: Theme) -> Figure | None:
    """A metric, or several, of every side, with intervals; the seed's number and the aim as lines."""
    spec = claim.picture
    kept = [m for m in spec.metrics if any(numbers(outcomes, side, m) for side in claim.sides)]
    if not kept:
        return None
    sides = [side for side in claim.sides if any(numbers(outcomes, side, m) for m in kept)]
    with _axes(theme, MARGIN + 0.3 + ROW * len(sides) + 0.1 * len(kept)) as (figure, axes, palette):
        handles: list[Line2D] = []
        for number, metric in enumerate(kept):
            color, marker = palette.series[number % len(palette.series)], _marker(number)
            offset = 0.0 if len(kept) == 1 else 0.24 * (2 * number / (len(kept) - 1) - 1)
            for place, side in enumerate(sides):
                values = list(numbers(outcomes, side, metric).values())
                if not values:
                    continue
                at = interval([_shown(v, spec.complement, spec.log_x) for v in values])
                low, high = at.mean if at.low is None else at.low, at.mean if at.high is None else at.high
                low = max(low, min(values) / 10 if min(values) > 0 else FLOOR, FLOOR) if spec.log_x else low
                low = min(low, at.mean)
                axes.errorbar(
                    at.mean,
                    place + offset,
                    xerr=[[at.mean - low], [high - at.mean]],
                    color=color,
                    marker=marker,
                    linestyle="none",
                    elinewidth=1.2,
                    capsize=2,
                )
            label = _common(metric, kept)
            handles.append(Line2D([], [], color=color, marker=marker, linestyle="none", label=label))
        if spec.log_x:
            axes.set_xscale("log")
        for text, value, style in _bounds(claim, spec.metrics):
            line = axes.axvline(
                _shown(value, spec.complement, spec.log_x), color=palette.ink, linewidth=1.1, linestyle=style
            )
            handles.append(Line2D([], [], color=line.get_color(), linestyle=style, linewidth=1.1, label=text))
        axes.set_yticks(range(len(sides)), sides)
        axes.set_ylim(len(sides) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set(title=textwrap.fill(spec.title, 3 * LINE // 4), xlabel=spec.x_label)  # the sides' names stand beside
        _legend(figure, handles)
        return figure


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Below the axes, in two columns where the words leave room for them."""
    columns = 2 if max((len(h.get_label()) for h in handles), default=0) <= LINE // 2 + 2 else 1
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def _marker(number: int) -> str:
    # a colour that comes again gets another marker
    return MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]


def _shown(value: float, complement: bool, log: bool) -> float:
    value = 1 - value if complement else value
    return max(value, FLOOR) if log else value


def _common(metric: str, kept: Sequence[str]) -> str:
    """A metric's name without the words that all of them share at their ends."""
    if len(kept) < 2:
        return metric
    parts = [name.split(", ") for name in kept]
    own = metric.split(", ")
    shared = [p for p in own if all(p in other for other in parts)]
    rest = [p for p in own if p not in shared]
    return ", ".join(rest) if rest else metric


def _bounds(claim: Claim, metrics: Sequence[str]) -> list[tuple[str, float, Any]]:
    """The numbers of criteria on what is drawn, that are one and the same for all of them."""
    found: list[tuple[str, float, Any]] = []
    stems = {metric.split(",")[0] for metric in metrics}
    judged: list[Criterion] = [
        c for c in claim.criteria if c.metric.split(",")[0] in stems and not c.versus and not c.condition
    ]
    for text, name, style in (("the seed's number", "target", ":"), ("aim", "aim", "--")):
        values = {getattr(c, name) for c in judged} - {None}
        for value in sorted(v for v in values if isinstance(v, (int, float)) and math.isfinite(v)):
            found.append((f"{text}: {value:g}" if len(values) < 4 else text, float(value), style))
    return found
