"""The documentation's table and pictures, from the results alone.

python -m toreq.evidence.protocols.control.page [--results DIR] [--page FILE] [--pictures DIR]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toreq.diagnostics.plots import MARKERS, PALETTES, STYLES, look, png
from toreq.errors import DataError, ToreqError
from toreq.evidence.protocols.control.results import Results
from toreq.evidence.protocols.control.tasks import TASKS
from toreq.evidence.protocols.control.trunks import SIDES
from toreq.evidence.statistics import interval, mean_curve, paired
from toreq.io import atomic_write_bytes, atomic_write_text

BEGIN, END = "<!-- begin control -->", "<!-- end control -->"
EMPTY = "No results are committed yet."
COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("steps to threshold", "steps to threshold", 0),
    ("return over training", "return over training", 1),
    ("return", "return", 1),
    ("return, pushed", "return, pushed", 1),
    ("return, couplings off", "couplings off", 1),
    ("radius, actor", "radius", 2),
    ("relaxations, free settled", "free settled, %", 2),
    ("relaxations, nudged settled", "nudged settled, %", 2),
    ("relaxations, free steps", "free sweeps", 1),
    ("relaxations, nudged steps", "nudged sweeps", 1),
    ("CPU seconds per 1000 steps", "CPU s / 1000 steps", 2),
)
"""Metric, heading, digits."""


def load(folder: Path) -> list[Results]:
    """The results ``control-*.json`` of a folder, in the order of the tasks."""
    found = [Results.load(path) for path in sorted(folder.glob("control-*.json"))]
    order = list(TASKS)
    return sorted(found, key=lambda r: (order.index(r.task) if r.task in order else len(order), r.budget))


def body(found: Sequence[Results]) -> str:
    """For each result what was run, its picture, and a table with one row for each side."""
    if not found:
        return EMPTY
    return "\n\n".join(part for results in found for part in _section(results))


def _section(results: Results) -> list[str]:
    task, sizes = TASKS[results.task], results.settings["sizes"]
    versions = results.environment["versions"]
    head = [
        f"### {results.task}, {results.budget} budget",
        f"{task.sentence[0].upper()}{task.sentence[1:]} (`{task.env}`). {sizes['steps']:,} steps of the environment, "
        f"threshold {task.threshold:g}; evaluated every {sizes['every']:,} steps on {sizes['episodes']} episodes, "
        f"after training on {sizes['final']}. Trunks of {' and '.join(map(str, sizes['hidden']))} units.",
        f"![Return against steps on {results.task}](../assets/protocols/{_picture(results)})",
        _table(results),
        _compared(results),
        f"```sh\n{results.command}\n```",
        f"On {results.environment['processor']}, {results.environment['threads']} thread, torch {versions['torch']}, "
        f"Stable-Baselines3 {versions['stable-baselines3']}, Gymnasium {versions['gymnasium']}, MuJoCo "
        f"{versions['mujoco']}; commit {results.commit}.",
    ]
    return [part for part in head if part]


def _table(results: Results) -> str:
    sides = [side for side in SIDES if side in results.sides()]
    sides += [side for side in results.sides() if side not in SIDES]
    shown = [c for c in COLUMNS if any(v is not None for side in sides for v in results.numbers(side, c[0]))]
    rows = [["side", "seeds", "Adam's rate", *(heading for _, heading, _ in shown), "parameters", "MFLOP / step"]]
    rows.append(["---", *["--:"] * (len(rows[0]) - 1)])
    for side in sides:
        cost = results.runs[side, results.seeds(side)[0]].cost
        assert cost.flops is not None
        assert cost.samples is not None
        rates = [v for v in results.numbers(side, "learning rate") if v is not None]
        tuned = f" (best of {len(results.tuned[side].trials)})" if side in results.tuned else ""
        cells = [_cell(results.numbers(side, metric), digits, len(rates)) for metric, _, digits in shown]
        work = f"{cost.flops / cost.samples / 1e6:.2f}"
        rows.append([side, str(len(rates)), f"{rates[0]:.2g}{tuned}", *cells, f"{cost.parameters:,}", work])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(values: Sequence[float | None], digits: int, seeds: int) -> str:
    """Mean and half the interval; how many of the seeds have a number, where some have none."""
    known = [v for v in values if v is not None]
    if not known:  # measured without a value: the threshold was not reached
        return "never" if values else "-"
    at = interval(known)
    text = f"{at.mean:,.{digits}f}"
    if at.high is not None and at.high > at.mean:
        text += f" ± {at.high - at.mean:,.{digits}f}"
    return text if len(known) == seeds else f"{text} ({len(known)} of {seeds})"


def _compared(results: Results, own: str = "eqprop", other: str = "bp-ff") -> str:
    """Differences of two sides, paired by seed; empty with fewer than two pairs."""
    parts = []
    for metric in ("steps to threshold, or all", "return over training", "return, pushed"):
        mine, theirs = (results.by_seed(side, metric) for side in (own, other))
        differences = list(paired(mine, theirs).values())
        if len(differences) < 2:
            continue
        at = interval(differences)
        half = 0.0 if at.high is None else at.high - at.mean
        parts.append(f"{metric} {at.mean:+,.1f} ± {half:,.1f}")
    return f"`{own}` minus `{other}`, paired by seed: {'; '.join(parts)}." if parts else ""


def _picture(results: Results) -> str:
    return f"control-{results.task}-{results.budget}.png"


def draw(results: Results) -> Figure:
    """Return against steps: a thick line for the mean over a side's seeds, thin ones for each of them."""
    palette = PALETTES["light"]
    task = TASKS[results.task]
    with matplotlib.rc_context(look(palette, small=10)):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for index, side in enumerate(SIDES):  # a side looks the same in every picture
            if side not in results.sides():
                continue
            curves = [results.runs[side, seed].curves["return"] for seed in results.seeds(side)]
            color = palette.series[index]
            for curve in curves if len(curves) > 1 else []:
                axes.plot(*_columns(curve), color=color, linewidth=0.8, alpha=0.35)
            mean = [(x, y) for x, y, _, _ in mean_curve(curves)]
            axes.plot(
                *_columns(mean),
                color=color,
                linewidth=2.0,
                linestyle=STYLES[index],
                marker=MARKERS[index],
                markersize=4,
                markevery=max(1, len(mean) // 10),
                label=f"{side} ({len(curves)} seed{'s' if len(curves) > 1 else ''})",
            )
        axes.axhline(task.threshold, color=palette.ink, linewidth=1.0, linestyle=":", label="threshold")
        pushed = ", pushed" if task.pushed else ""
        axes.set(title=f"{task.env}{pushed}: evaluation episodes", xlabel="steps of the environment", ylabel="return")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        figure.legend(loc="outside lower center", ncols=2)
        return figure


def _columns(curve: Sequence[tuple[float, float | None]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(curve, dtype=np.float64)
    return table[:, 0], table[:, 1]


def replaced(text: str, new: str) -> str:
    """The page's text with ``new`` between its markers.

    Raises:
        DataError: for a page without the markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"control: expected the markers {BEGIN} and {END} once each in the page; put them in")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the page and draw the pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the table and the pictures of the control protocol.")
    parser.add_argument("--results", type=Path, default=Path("evidence/results/protocols"))
    parser.add_argument("--page", type=Path, default=Path("docs/protocols/control.md"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/assets/protocols"))
    chosen = parser.parse_args(arguments)
    try:
        found = load(chosen.results)
        atomic_write_text(chosen.page, replaced(chosen.page.read_text(encoding="utf-8"), body(found)))
        for results in found:
            atomic_write_bytes(chosen.pictures / _picture(results), png(draw(results)))
    except (ToreqError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
