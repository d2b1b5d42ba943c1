"""What `toreq tune` shows: the search before it starts, its progress, a table and a picture of the trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from pathlib import Path

    from toreq.training import TrainConfig
    from toreq.tuning import Attempt, Space, Tuned

SHOWN = 10
PANEL = (3.4, 2.7)
"""Inches of one panel of the picture."""


def announce(console: Console, config: TrainConfig, space: Space, trials: int, folder: Path) -> None:
    """Say what is searched, and on what."""
    from rich.table import Table

    length = f"{_count(trials, 'trial')} of {_count(config.epochs, 'epoch')}"
    lines = (
        f"{config.system} {config.side} on {config.data}: {length} on",
        f"{config.limit_train:,} training examples, judged by {config.holdout:,} held-out ones; kept in {folder}",
    )
    console.print(*lines, soft_wrap=True)
    table = Table(title=f"search space: {space.size}")
    table.add_column("name")
    table.add_column("range")
    for name, span in space.describe().items():
        table.add_row(name, span)
    console.print(table)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def settings(params: dict[str, Any]) -> str:
    """Parameters in a line."""
    return ", ".join(f"{name} {short(value)}" for name, value in params.items())


def short(value: Any) -> str:
    """A value with four digits at most."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Live:
    """A bar over the trials with the time left, and one line for each that ends."""

    def __init__(self, console: Console, trials: int) -> None:
        self.finished = 0
        self._console, self._trials = console, trials
        self._best: float | None = None
        self._spent: list[float] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("tune", total=trials, left="")

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def done(self, attempt: Attempt) -> None:
        """Count a trial and print it."""
        self.finished += 1
        self._spent.append(attempt.seconds)
        left = self._left()
        self._progress.update(self._task, completed=self.finished, left=left)
        if attempt.value is None:
            how = f"failed: {attempt.reason}"
        else:
            self._best = attempt.value if self._best is None else max(self._best, attempt.value)
            how = f"{attempt.value:.2%}, best {self._best:.2%}"
        line = f"trial {self.finished} of {self._trials}  {settings(attempt.params)}: {how}"
        self._console.print(f"{line}  ({attempt.seconds:.1f} s{left})", soft_wrap=True, markup=False, highlight=False)

    def _left(self) -> str:
        ahead = self._trials - self.finished
        if ahead == 0:
            return ""
        seconds = ahead * sum(self._spent) / len(self._spent)
        return f", about {seconds:.0f} s left" if seconds < 120 else f", about {seconds / 60:.0f} min left"


def table(found: Tuned) -> Any:
    """The best trials, and how many failed."""
    from rich.table import Table

    failed = f", {found.failed} failed" if found.failed else ""
    shown = f", the best {SHOWN}" if len(found.trials) - found.failed > SHOWN else ""
    result = Table(title=f"{len(found.trials)} trials{failed}{shown}: accuracy on held-out training examples")
    result.add_column("trial", justify="right")
    result.add_column("accuracy", justify="right")
    for name in found.best:
        result.add_column(name, justify="right")
    result.add_column("seconds", justify="right")
    complete = sorted((a for a in found.trials if a.value is not None), key=lambda a: -float(a.value or 0.0))
    for place, attempt in enumerate(complete[:SHOWN]):
        cells = [str(attempt.number + 1), f"{attempt.value:.2%}", *(short(v) for v in attempt.params.values())]
        result.add_row(*cells, f"{attempt.seconds:.1f}", style="bold" if place == 0 else None)
    return result


def picture(found: Tuned, space: Space) -> bytes:
    """The value of each trial against each parameter, as PNG.

    Later trials are darker, the best one is ringed, and failed ones are crosses at the bottom.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from toreq.diagnostics.plots import PALETTES, png

    names = list(space.parameters)
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    palette = PALETTES["light"]
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for index, axes in enumerate(panels.flat):
        if index >= len(names):
            axes.set_visible(False)
            continue
        _panel(axes, found, space, names[index], palette)
        if index % columns == 0:
            axes.set_ylabel("held-out accuracy (%)")
    failed = ", crosses failed" if found.failed else ""
    figure.suptitle(f"{len(found.trials)} trials, later ones darker, the best ringed{failed}", fontsize=10.5)
    return png(figure)


def _panel(axes: Any, found: Tuned, space: Space, name: str, palette: Any) -> None:
    from toreq.tuning import Choice

    parameter = space.parameters[name]
    if isinstance(parameter, Choice):
        place = [next(i for i, v in enumerate(parameter.values) if v == a.params[name]) for a in found.trials]
        axes.set_xticks(range(len(parameter.values)), [str(v) for v in parameter.values])
        axes.set_xlim(-0.5, len(parameter.values) - 0.5)
    else:
        place = [float(a.params[name] or 0) for a in found.trials]
        _numbers(axes, parameter)
    values = [None if a.value is None else 100 * a.value for a in found.trials]
    good = [(x, y, number) for number, (x, y) in enumerate(zip(place, values, strict=True)) if y is not None]
    axes.scatter(
        [x for x, _, _ in good],
        [y for _, y, _ in good],
        c=[number for _, _, number in good],
        cmap=palette.ramp,
        # the lightest part of the ramp would not be seen on the ground
        vmin=-0.5 * len(values),
        vmax=len(values),
        edgecolors=palette.series[0],
        linewidths=0.6,
        s=30,
        zorder=3,
    )
    best = next(number for number, a in enumerate(found.trials) if a.params == found.best and a.value == found.value)
    ring = dict(s=130, facecolors="none", edgecolors=palette.series[1], linewidths=1.8, zorder=4)
    axes.scatter([place[best]], [values[best]], **ring)
    _crosses(axes, [x for x, y in zip(place, values, strict=True) if y is None], palette)
    axes.set_xlabel(name)
    axes.grid(color=palette.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)


def _numbers(axes: Any, parameter: Any) -> None:
    """An axis that shows the whole range, with few enough numbers to be read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    from toreq.tuning import Integer

    low, high = float(parameter.low), float(parameter.high)
    if parameter.log:
        margin = (high / low) ** 0.04
        axes.set_xscale("log")
        axes.set_xlim(low / margin, high * margin)
        tens = math.log10(high / low)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if tens < 1.2 else (1, 3) if tens < 2.2 else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        return
    margin = 0.04 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=isinstance(parameter, Integer)))


def _crosses(axes: Any, places: Sequence[float], palette: Any) -> None:
    if places:
        # at the bottom of the frame: they have no value
        axes.scatter(
            places,
            [0.03] * len(places),
            transform=axes.get_xaxis_transform(),
            marker="x",
            color=palette.ink,
            s=28,
            clip_on=False,
            zorder=4,
        )
