"""One picture per bench, drawn from its result alone, so that it can be drawn again from the JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from toreq.diagnostics.plots import MARKERS, PALETTES, STYLES, look, png
from toreq.errors import ConfigError, nearest
from toreq.io import atomic_write_bytes

Row = Mapping[str, Any]
PALETTE = PALETTES["light"]
PANEL = (4.2, 3.3)
SETTINGS: Any = look(PALETTE, small=10, legend=8.5, line=1.7)


def write(result: Row, folder: Path) -> Path:
    """Draw one result into ``folder/NAME.png``; returns the path.

    Args:
        result: what a bench returned, or what its JSON holds.
        folder: made when missing.

    Raises:
        ConfigError: for a bench without a picture.
    """
    path = folder / f"{result['bench']}.png"
    atomic_write_bytes(path, png(draw(result)))
    return path


def draw(result: Row) -> Figure:
    """The picture of one result, light.

    Raises:
        ConfigError: for a bench without a picture.
    """
    name = result["bench"]
    if name not in DRAW:
        raise ConfigError(f"plots: expected a benchmark with a picture, got {name!r}; {nearest(name, DRAW)}")
    with matplotlib.rc_context(SETTINGS):
        return DRAW[name](result)


def _panels(titles: Sequence[str], width: float = PANEL[0], height: float = PANEL[1]) -> tuple[Figure, list[Axes]]:
    """Titled panels, two in a row, so that a page as wide as a column of text shows them legibly."""
    across = min(2, len(titles))
    down = -(-len(titles) // across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in axes[len(titles) :]:
        unused.set_axis_off()
    for panel, title in zip(axes, titles, strict=False):
        panel.set_title(title)
    return figure, axes[: len(titles)]


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend above all panels."""
    handles: dict[str, Any] = {}
    for panel in axes:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(4, len(handles)))


def _logarithmic(axis: Axis) -> None:
    """Ticks at 1, 2 and 5, or at powers of ten where these would run into each other."""
    low, high = axis.get_view_interval()
    wide = low <= 0 or high / low > 300
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _values(rows: Iterable[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _look(index: int) -> dict[str, Any]:
    return {
        "color": PALETTE.series[index % len(PALETTE.series)],
        "linestyle": STYLES[index % len(STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def _sizes(axes: Axes, sizes: Sequence[float], label: str) -> None:
    """A logarithmic axis with the measured sizes as its ticks."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(label)


def _line(axes: Axes, points: Iterable[tuple[float, float | None]], index: int, label: str | None, **look: Any) -> None:
    # a side without a number leaves a gap
    x, y = zip(*sorted((a, float("nan") if b is None else b) for a, b in points), strict=True)
    axes.plot(x, y, label=label, **{**_look(index), **look})


def _bars(axes: Axes, rows: Sequence[Row], key: str, group: str, label: str, note: str | None = None) -> None:
    """Horizontal bars on a logarithmic axis, one group of them per side, with their values behind."""
    sides, groups = _values(rows, "side"), _values(rows, group)
    thick = 0.8 / len(groups)
    for j, one in enumerate(groups):
        for i, side in enumerate(sides):
            for row in _of(rows, side=side, **{group: one}):
                height = i + (j - (len(groups) - 1) / 2) * thick
                value = row[key]
                mark = " *" if note is not None and row.get(note) else ""
                text = row.get("verdict", "no number") if value is None else f"{value:.3g}{mark}"
                if value is not None:
                    axes.barh(height, value, thick * 0.92, color=PALETTE.series[j % len(PALETTE.series)])
                axes.annotate(
                    f" {text}", (value or 0, height), va="center", fontsize=8,
                    xycoords=("data" if value is not None else "axes fraction", "data"),
                )  # fmt: skip
    axes.set_xscale("log")
    _logarithmic(axes.xaxis)
    axes.set_yticks(range(len(sides)), sides)
    axes.set_ylim(len(sides) - 0.5, -0.5)
    axes.margins(x=0.4)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label)
    if len(groups) > 1:
        handles = [Line2D([], [], color=PALETTE.series[j], linewidth=6) for j in range(len(groups))]
        axes.legend(handles, [_group(group, one) for one in groups], loc="best")


def _group(key: str, value: Any) -> str:
    return f"{value} thread{'s' if value > 1 else ''}" if key == "threads" else f"{key.replace('_', ' ')} {value:g}"


def _epoch(result: Row) -> Figure:
    rows = [{"net": row.get("arch"), **row} for row in result["rows"]]
    nets = _values(rows, "net")
    figure, axes = _panels([f"MNIST epoch, {net}" for net in nets], 4.2, 3.8)
    for panel, net in zip(axes, nets, strict=True):
        _bars(panel, _of(rows, net=net), "seconds_per_epoch", "threads", "seconds (logarithmic)", "extrapolated")
    if any(row.get("extrapolated") for row in rows):
        figure.supxlabel("* extrapolated from some batches", fontsize=9)
    return figure


def _accuracy(result: Row) -> Figure:
    rows = result["rows"]
    nets = _values(rows, "net")
    figure, axes = _panels([f"time to accuracy, {net}" for net in nets], 4.2, 4.2)
    for panel, net in zip(axes, nets, strict=True):
        _bars(panel, [r for r in rows if r["net"] == net], "seconds", "target", "seconds (logarithmic)")
    return figure


def _overhead(result: Row) -> Figure:
    rows = result["rows"]
    nets = _values(rows, "net")
    figure, axes = _panels([f"{net}: engine / by hand" for net in nets])
    for panel, net in zip(axes, nets, strict=True):
        batches = _values(_of(rows, net=net), "batch")
        for i, threads in enumerate(_values(_of(rows, net=net), "threads")):
            points = []
            for batch in batches:
                times = {r["side"]: r["median_ms"] for r in _of(rows, net=net, threads=threads, batch=batch)}
                engine = times.pop("engine")
                points.append((batch, engine / min(times.values())))
            _line(panel, points, i, _group("threads", threads))
        _target(panel, next(r["target"] for r in result["ratios"]), "target, at most")
        panel.set_ylim(min(0.9, panel.get_ylim()[0]), max(1.25, panel.get_ylim()[1]))
        _sizes(panel, batches, "batch size (examples)")
        panel.set_ylabel("ratio of times")
    _legend(figure, axes)
    return figure


def _target(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color=PALETTE.ink, linewidth=1.0, linestyle=":", label=f"{label} {value:g}")


def _roofline(result: Row) -> Figure:
    rows = result["rows"]
    most = max(_values(rows, "threads"))
    nets = _values(rows, "net")
    figure, axes = _panels([f"{net}, {_group('threads', most)}" for net in nets])
    sides, precisions = _values(rows, "side"), _values(rows, "precision")
    for panel, net in zip(axes, nets, strict=True):
        chosen = _of(rows, net=net, threads=most)
        for i, side in enumerate(sides):
            for precision in precisions:
                found = _of(chosen, side=side, precision=precision)
                if found:
                    style = "-" if precision == precisions[0] else "--"
                    points = [(r["batch"], r["gflops"]) for r in found]
                    _line(panel, points, i, f"{side}, {precision}", linestyle=style)
        panel.set_yscale("log")
        _logarithmic(panel.yaxis)
        _sizes(panel, _values(chosen, "batch"), "batch size (examples)")
        panel.set_ylabel("GFLOP/s of the products (logarithmic)")
    _legend(figure, axes)
    return figure


def _memory(result: Row) -> Figure:
    rows = result["rows"]
    labels = {"steps": "relaxation steps", "depth": "hidden layers"}
    figure, axes = _panels([f"training memory against {labels[key]}" for key in _values(rows, "against")])
    for panel, against in zip(axes, _values(rows, "against"), strict=True):
        chosen = _of(rows, against=against)
        for i, side in enumerate(_values(chosen, "side")):
            _line(panel, [(r[against], r["peak_mib"]) for r in _of(chosen, side=side)], i, side)
        panel.set_yscale("log")
        _logarithmic(panel.yaxis)
        _sizes(panel, _values(chosen, against), f"{labels[against]} (logarithmic)")
        panel.set_ylabel("peak tensor memory (MiB, logarithmic)")
    _legend(figure, axes)
    return figure


def _settling(result: Row) -> Figure:
    rows = [{"problem": "lateral", **row} for row in result["rows"]]
    tolerances = _values(rows, "tolerance")
    tolerance = 1e-3 if 1e-3 in tolerances else tolerances[0]
    problems = _values(rows, "problem")
    figure, axes = _panels([f"{problem}: sweeps to {tolerance:g}" for problem in problems])
    sides = _values(rows, "side")
    for panel, problem in zip(axes, problems, strict=True):
        for i, side in enumerate(sides):
            found = _of(rows, problem=problem, side=side, tolerance=tolerance)
            if found:
                _line(panel, [(r["radius"], r["steps"]) for r in found], i, side)
        panel.set_yscale("log")
        _logarithmic(panel.yaxis)
        panel.set_xlabel("spectral radius of the coupling")
        panel.set_ylabel("sweeps (logarithmic)")
    _legend(figure, axes)
    return figure


def _systems(result: Row) -> Figure:
    rows = result["rows"]
    archs = _values(rows, "arch")
    figure, axes = _panels(archs)
    for panel, arch in zip(axes, archs, strict=True):
        chosen = _of(rows, arch=arch)
        for i, solver in enumerate(_values(chosen, "solver")):
            _line(panel, [(r["radius"], r["steps"]) for r in _of(chosen, solver=solver)], i, solver)
        panel.set_yscale("log")
        _logarithmic(panel.yaxis)
        panel.set_xlabel("relaxation radius at equilibrium")
        panel.set_ylabel("mean steps (logarithmic)")
    _legend(figure, axes)
    return figure


def _scaling(result: Row) -> Figure:
    rows, fits = result["rows"], result["fits"]
    labels = {"batch": "batch size (examples)", "width": "hidden units"}
    pairs = list(dict.fromkeys((row["net"], row["against"]) for row in rows))
    threads = min(_values(rows, "threads"))
    figure, axes = _panels([f"{net}, {_group('threads', threads)}" for net, _ in pairs])
    for panel, (net, against) in zip(axes, pairs, strict=True):
        chosen = _of(rows, net=net, against=against, threads=threads)
        for i, side in enumerate(_values(chosen, "side")):
            (fit,) = _of(fits, net=net, against=against, threads=threads, side=side)
            points = [(r[against], r["median_ms"]) for r in _of(chosen, side=side)]
            _line(panel, points, i, f"{side}: exponent {fit['exponent']:.2f}", linestyle="")
            first, last = (float(end) for end in fit["points"].split(" to "))
            line = [(n, 2.718281828459045 ** fit["log_offset"] * n ** fit["exponent"]) for n in (first, last)]
            _line(panel, line, i, None, marker="")
        panel.set_yscale("log")
        _logarithmic(panel.yaxis)
        _sizes(panel, _values(chosen, against), f"{labels[against]} (logarithmic)")
        panel.tick_params(axis="x", labelsize=8)
        panel.set_ylabel("training step (ms, logarithmic)")
        panel.margins(y=0.3)
        panel.legend(loc="upper left")
    return figure


def _compiled(result: Row) -> Figure:
    rows = [{**row, "net": f"{row['arch']}, {row['settings']}"} for row in result["rows"]]
    nets = _values(rows, "net")
    figure, axes = _panels([f"training step, {net}" for net in nets])
    for panel, net in zip(axes, nets, strict=True):
        chosen = _of(rows, net=net)
        _bars(panel, chosen, "step_median_ms", "threads", "milliseconds")
        # nearly equal times: their bars start at zero
        panel.set_xscale("linear")
        panel.set_xlim(0, 1.45 * max(_values(chosen, "step_median_ms")))
    return figure


def _gradients(result: Row) -> Figure:
    rows = [{**row, "side": row["settings"], "lost": max(1 - row["least"], 1e-8)} for row in result["rows"]]
    nets = _values(rows, "net")
    figure, axes = _panels([f"{net}: 1 - least cosine" for net in nets])
    for panel, net in zip(axes, nets, strict=True):
        _bars(panel, _of(rows, net=net), "lost", "trained_steps", "1 - cosine with the exact gradient (logarithmic)")
    return figure


def _profile(result: Row) -> Figure:
    rows = result["rows"]
    kinds = [key for key in rows[0] if key not in ("net", "side", "step_ms")]
    figure, (axes,) = _panels(["training step by kind of operation, 1 thread"], 9.0, 5.0)
    left = [0.0] * len(rows)
    for i, kind in enumerate(kinds):
        share = [100 * row[kind] / row["step_ms"] for row in rows]
        color = PALETTE.series[i % len(PALETTE.series)]
        alpha = 1.0 if i < len(PALETTE.series) else 0.45  # more kinds than colours
        axes.barh(range(len(rows)), share, 0.8, left=left, label=kind, color=color, alpha=alpha)
        left = [a + b for a, b in zip(left, share, strict=True)]
    axes.set_yticks(range(len(rows)), [f"{row['net']}, {row['side']} ({row['step_ms']:.3g} ms)" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("share of the step (%)")
    axes.grid(visible=False, axis="y")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


DRAW: dict[str, Callable[[Row], Figure]] = {
    "epoch": _epoch,
    "gradients": _gradients,
    "overhead": _overhead,
    "roofline": _roofline,
    "memory": _memory,
    "settling": _settling,
    "systems": _systems,
    "compiled": _compiled,
    "scaling": _scaling,
    "profile": _profile,
    "time-to-accuracy": _accuracy,
}
"""Bench -> its picture."""
