"""The tables and the picture of the docs' page, from the file that the runner wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toreq.diagnostics.plots import MARKERS, PALETTES, STYLES, Palette, Theme, look
from toreq.errors import DataError
from toreq.evidence.claim import Outcome
from toreq.evidence.pictures import svg
from toreq.evidence.protocols.continual import running, sides
from toreq.evidence.protocols.continual.running import Results
from toreq.evidence.statistics import interval, mean_curve
from toreq.io import atomic_write_text

PAGE = Path("docs/protocols/continual.md")
REFERENCE = {"fine-tuning": 19.5, "class means": 82.0, "ridge, 1k": 94.8, "ridge, 4k": 96.9}
"""Points of split-MNIST, one seed each, that were measured before this protocol, with other random features."""
METRICS = {
    "final accuracy, %": "final accuracy",
    "forgetting": "forgetting",
    "backward transfer": "backward transfer",
    "prequential, %": "prequential accuracy",
}
WIDTH, HEIGHT = 4.8, 3.0
THEMES: tuple[Theme, ...] = ("light", "dark")


def write(file: Path, page: Path = PAGE) -> None:
    """Put the tables between their markers on the page, and the pictures beside it."""
    results = running.load(file)
    text = replaced(page.read_text(encoding="utf-8"), file.stem, body(results))
    for theme in THEMES:
        name = f"{file.stem}-{theme}"
        atomic_write_text(page.parent / f"{name}.svg", svg(picture(results, theme), name))
    atomic_write_text(page, text)


def replaced(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers of ``name``; raises `DataError` where these are missing."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise DataError(f"report: expected the markers {begin} and {end} once and in this order; put them in")
    return f"{text.split(begin)[0]}{begin}\n\n{content.strip()}\n\n{end}{text.split(end)[1]}"


def body(results: Results) -> str:
    """All tables, and the command that makes the numbers."""
    parts = [_stream(results, stream) for stream in sides.STREAMS if stream in results.streams]
    found = results.environment
    made = (
        f"Measured on {found['processor']}, {found['threads']} thread(s), torch {found['versions']['torch']}, at "
        f"commit {results.commit}, by\n\n    {results.command}"
    )
    return "\n\n".join([*parts, made])


def _stream(results: Results, stream: str) -> str:
    about = results.streams[stream]
    present = [s for s in sides.SIDES if any(key[:2] == (stream, s) for key in results.runs)]
    reference = REFERENCE if stream == "split" and results.budget != "smoke" else {}
    head = ["learner", *METRICS, *(["reference, %"] if reference else [])]
    head += ["parameters", "memory", "GFLOP", "seeds", "tuned"]
    rows = [_row(results, stream, side, reference) for side in present]
    text = (
        f"### {sides.STREAMS[stream]}\n\n{about['samples']:,} images of {about['data']} in {about['phases']} phases, "
        f"batches of {about['batch_size']}, {about['tests']} test sets."
    )
    absent = [s for s in sides.SIDES if not sides.fits(s, stream)]
    if absent:
        text += f" Not run, since there are no tasks of whose end it could be told: {', '.join(absent)}."
    dear = [s for s in sides.SIDES if sides.too_dear(s, stream, results.budget)]
    if dear:
        text += f" Not run at this budget: {'; '.join(dear)}."
    missing = [s for s in sides.SIDES if s not in (*present, *absent, *dear)]
    if missing:
        text += f" Still to be measured: {'; '.join(missing)}."
    return f"{text}\n\n{_table(head, rows)}"


def _row(results: Results, stream: str, side: str, reference: Mapping[str, float]) -> list[str]:
    runs = [run for key, run in sorted(results.runs.items()) if key[:2] == (stream, side)]
    outcomes = [run["outcome"] for run in runs]
    cells = [side, *(_cell(outcomes, metric) for metric in METRICS.values())]
    if reference:
        cells.append(f"{reference[side]:.1f}" if side in reference else "-")
    flops = [o.cost.flops / 1e9 for o in outcomes if o.cost.flops is not None]
    cells += [
        f"{outcomes[0].cost.parameters:,}",
        f"{outcomes[0].metrics['memory'].value:,.0f}",
        f"{interval(flops).mean:,.1f}" if flops else "-",
        str(len(outcomes)),
        ", ".join(f"{name.replace('_', ' ')} {value:.2g}" for name, value in runs[0]["tuned"].items()) or "-",
    ]
    return cells


def _cell(outcomes: Sequence[Outcome], metric: str) -> str:
    values = [v for o in outcomes if (v := o.metrics[metric].value) is not None]
    if not values:
        return "-"
    at = interval(values)
    return f"{at.mean:.1f}" if at.high is None else f"{at.mean:.1f} ± {at.high - at.mean:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("--:" for _ in head[1:-1]), "---"]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def picture(results: Results, theme: Theme) -> Figure:
    """A panel for each stream: mean accuracy on the test sets met so far, one line for each learner."""
    palette = PALETTES[theme]
    streams = [stream for stream in sides.STREAMS if stream in results.streams]
    with matplotlib.rc_context(look(palette, see_through=True, line=1.6, mark=4)):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(streams) + 1.1), layout="constrained")
        panels = figure.subplots(len(streams), 1, squeeze=False)[:, 0]
        handles: dict[str, Any] = {}
        for stream, axes in zip(streams, panels, strict=True):
            handles |= _panel(axes, results, stream, palette)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
        return figure


def _panel(axes: Axes, results: Results, stream: str, palette: Palette) -> dict[str, Any]:
    handles: dict[str, Any] = {}
    for number, side in enumerate(sides.SIDES):
        found = [o for key, o in sorted(results.outcomes.items()) if key[:2] == (stream, side)]
        if not found:
            continue
        color = palette.series[number % len(palette.series)]
        style = STYLES[(number + number // len(palette.series)) % len(STYLES)]
        if sides.find(side).mixed:
            values = [v for o in found if (v := o.metrics["final accuracy"].value) is not None]
            handles[side] = axes.axhline(interval(values).mean, color=palette.ink, linewidth=1.1, linestyle=":")
            continue
        points = mean_curve([o.curves["accuracy on the past"] for o in found])
        x, y = [p[0] for p in points], [p[1] for p in points]
        marker = MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]
        (handles[side],) = axes.plot(x, y, color=color, linestyle=style, marker=marker)
        if all(p[2] is not None for p in points):
            axes.fill_between(x, [p[2] or 0 for p in points], [p[3] or 0 for p in points], color=color, alpha=0.15)
    phase = "tasks learned" if results.streams[stream]["boundaries"] else "phases of the stream met"
    axes.set(title=sides.STREAMS[stream], xlabel=phase, ylabel="accuracy on these, %", ylim=(0, 102))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return handles
