"""What the docs show of the results: a table for each task, and the curves in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from toreq.diagnostics.plots import MARKERS, PALETTES, STYLES, Palette, Theme, look, png
from toreq.errors import DataError
from toreq.evidence.claim import Outcome
from toreq.evidence.protocols.sequences import models, plans
from toreq.evidence.protocols.sequences.running import Results
from toreq.evidence.statistics import interval, mean_curve
from toreq.io import atomic_write_bytes, atomic_write_text

PAGE = Path("docs/protocols/sequences.md")
BEGIN, END = "<!-- generated: sequences -->", "<!-- end of generated -->"
PICTURES: dict[str, Theme] = {"sequences-light.png": "light", "sequences-dark.png": "dark"}
PANEL = (4.2, 3.2)


def write(results: Results, page: Path) -> None:
    """Put the tables between the page's marks, and the pictures beside it.

    Raises:
        DataError: the page has no marks, or there are no runs.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(
            f"sequences.report: expected the marks {BEGIN} and {END} once in {page}, got others; put them in"
        )
    if not results.runs:
        raise DataError("sequences.report: expected runs, got none; measure first")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    atomic_write_text(page, f"{before}{BEGIN}\n{tables(results)}\n{after}")
    for name, theme in PICTURES.items():
        atomic_write_bytes(page.parent / name, png(picture(results, theme)))


def tables(results: Results) -> str:
    """The tables in Markdown, one for each task, and what was run."""
    out = []
    for task in _tasks(results):
        sides = _sides(results, task)
        first = results.outcomes(task, sides[0])[0]
        metric = next(iter(first.metrics))
        unit, threshold = first.metrics[metric].unit, first.metrics["threshold"].value
        recipe = results.plans[task]["recipe"]
        longer = [name for name in first.metrics if name.startswith(f"{metric}, ")]
        heads = [
            "side",
            f"{metric} ({unit})",
            f"samples to {threshold:g} {unit}",
            *(name.removeprefix(f"{metric}, ") for name in longer),
            "parameters",
            "operations (10^9)",
            "processor seconds",
            "rate",
            "seeds",
        ]
        out += [
            f"### {task}",
            "",
            f"`{first.notes[0]}`; {recipe['steps']} steps of {recipe['batch']} sequences.",
            "",
            _row(heads),
            _row(["---", *["---:"] * (len(heads) - 1)]),
            *(_row(_cells(side, metric, longer, results.outcomes(task, side))) for side in sides),
            "",
        ]
    commands = sorted({run["command"] for run in results.runs.values()})
    out += ["Measured by", "", *(f"    {command}" for command in commands), ""]
    return "\n".join(out)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(side: str, metric: str, longer: list[str], outcomes: list[Outcome]) -> list[str]:
    cost = outcomes[0].cost
    reached = [o.metrics["samples to threshold"].value for o in outcomes]
    found = [value for value in reached if value is not None]
    samples = _spread(found, "{:,.0f}") if found else "not reached"
    if found and len(found) < len(reached):
        samples += f" ({len(found)} of {len(reached)})"
    rates = {o.metrics["rate"].value for o in outcomes}
    return [
        side,
        _spread([o.metrics[metric].value for o in outcomes], "{:.2f}"),
        samples,
        *(_spread([o.metrics[name].value for o in outcomes], "{:.1f}") for name in longer),
        "-" if cost.parameters is None else f"{cost.parameters:,}",
        "-" if cost.flops is None else f"{cost.flops / 1e9:,.0f}",
        _spread([o.metrics["processor time"].value for o in outcomes], "{:.0f}", width=False),
        ", ".join(f"{rate:.2g}" for rate in sorted(rate for rate in rates if rate is not None)),
        str(len(outcomes)),
    ]


def _spread(values: Sequence[float | None], form: str, width: bool = True) -> str:
    """Mean over the seeds, and half the width of its interval."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    found = interval(known)
    mean = form.format(found.mean)
    return mean if found.high is None or not width else f"{mean} ± {form.format(found.high - found.mean)}"


def picture(results: Results, theme: Theme) -> Figure:
    """The metric against the samples seen: a panel for each task, a line for each side, its range over the seeds."""
    tasks, palette = _tasks(results), PALETTES[theme]
    across = min(2, len(tasks))
    down = math.ceil((len(tasks) + 1) / across)
    with matplotlib.rc_context(look(palette, small=10, legend=10, line=1.7, mark=4)):
        figure = Figure(figsize=(PANEL[0] * across, PANEL[1] * down), layout="constrained")
        FigureCanvasAgg(figure)
        panels = [figure.add_subplot(down, across, n + 1) for n in range(len(tasks) + 1)]
        for axes, task in zip(panels, tasks, strict=False):
            _panel(axes, results, task, palette)
        shown = [side for side in models.SIDES if any(key[1] == side for key in results.runs)]
        panels[-1].axis("off")
        lines = [Line2D([], [], label=side, **_style(side, palette)) for side in shown]
        lines.append(Line2D([], [], label="threshold", color=palette.ink, linewidth=0.8, linestyle=(0, (1, 2))))
        panels[-1].legend(handles=lines, loc="center left", fontsize=10)
    return figure


def _panel(axes: Axes, results: Results, task: str, palette: Palette) -> None:
    for number, side in enumerate(_sides(results, task)):
        outcomes = results.outcomes(task, side)
        label = next(iter(outcomes[0].metrics))
        unit, threshold = outcomes[0].metrics[label].unit, outcomes[0].metrics["threshold"].value
        points = mean_curve([o.curves[label] for o in outcomes])
        x, style = [p[0] for p in points], _style(side, palette)
        # few markers, each side's at other places: twenty on a line hide it
        axes.plot(x, [p[1] for p in points], **style, markevery=(number, 5))
        ranges = [[y for o in outcomes for at, y in o.curves[label] if at == here and y is not None] for here in x]
        axes.fill_between(x, [min(r) for r in ranges], [max(r) for r in ranges], color=style["color"], alpha=0.15, lw=0)
        if number == 0 and threshold is not None:
            axes.axhline(threshold, color=palette.ink, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.set_ylabel(f"{label} ({unit})")
    axes.set_title(task, loc="left")
    axes.set_xlabel("sequences seen")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value else "0"))


def _style(side: str, palette: Palette) -> dict[str, Any]:
    number = list(models.SIDES).index(side)
    return {
        # one side more than the palette has colours
        "color": palette.series[number] if number < len(palette.series) else palette.ink,
        "linestyle": STYLES[number % len(STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _tasks(results: Results) -> list[str]:
    return [task for task in plans.tasks() if any(key[0] == task for key in results.runs)]


def _sides(results: Results, task: str) -> list[str]:
    return [side for side in models.SIDES if results.outcomes(task, side)]
