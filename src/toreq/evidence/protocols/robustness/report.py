"""The tables and pictures of the robustness page, from the files that the runner wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toreq.diagnostics.plots import MARKERS, PALETTES, STYLES, Palette, Theme, look
from toreq.errors import DataError
from toreq.evidence.claim import Outcome
from toreq.evidence.pictures import svg
from toreq.evidence.protocols.robustness import running, sides
from toreq.evidence.statistics import interval, mean_curve
from toreq.io import atomic_write_bytes

PAGE = Path("docs/protocols/robustness.md")
REFERENCE: dict[str, tuple[float, float | None, float | None]] = {
    "bp mlp": (98.3, 78.9, 43.6),
    "bp cnn": (99.1, 82.7, 70.8),
    "bp mlp, noise-trained": (97.6, 94.8, 75.8),
}
"""One-seed reference points that were measured before this protocol: clean, sigma 0.5 unclipped, clipped."""
DENOISED: dict[str, float] = {"wiener + bp mlp": 93.0, "gaussians": 94.4}
"""The same at sigma 0.5 unclipped alone."""
ATTACKS = {
    "FGSM 0.1": "accuracy, fgsm linf 0.1",
    "PGD 0.1": "accuracy, pgd linf 0.1",
    "+ margin 0.1": "accuracy, white-box linf 0.1",
    "labels only 0.1": "accuracy, hopskipjump linf 0.1",
    "transfer 0.1": "accuracy, transfer linf 0.1",
    "PGD 0.2": "accuracy, pgd linf 0.2",
    "PGD 0.3": "accuracy, pgd linf 0.3",
    "PGD L2 1.5": "accuracy, pgd l2 1.5",
}
NOISE = {
    "clean": "clean accuracy",
    "sigma 0.5, unclipped": "accuracy, sigma 0.5 unclipped",
    "sigma 0.5, clipped": "accuracy, sigma 0.5 clipped",
}
Runs = Mapping[tuple[str, int], Outcome]


def write(files: Sequence[Path], page: Path = PAGE) -> None:
    """Put the tables of ``files`` between their markers on the page, and the pictures beside it."""
    text = page.read_text(encoding="utf-8")
    for file in files:
        found = running.load(file)
        text = replaced(text, file.stem, body(found))
        for theme in ("light", "dark"):
            figure = picture(running.outcomes(found), theme)
            content = svg(figure, f"{file.stem}-{theme}").encode("utf-8")
            atomic_write_bytes(page.parent / f"{file.stem}-{theme}.svg", content)
    atomic_write_bytes(page, text.encode("utf-8"))


def replaced(text: str, name: str, content: str) -> str:
    """The text with ``content`` between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; DataError without these."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise DataError(f"robustness: expected {begin} and {end} once on the page, got neither or several; put them in")
    head, rest = text.split(begin)
    inner = content.strip("\n")  # not spaces: a command at the top is indented
    return f"{head}{begin}\n\n{inner}\n\n{end}{rest.split(end)[1]}"


def body(found: Mapping[str, Any]) -> str:
    """The tables of one file, with the command that made it."""
    runs = running.outcomes(found)
    parts = [f"    {found['command']}"]
    if found["attacked"]:
        parts += [_trainings(runs), attack_table(runs), signs(runs)]
    parts.append(noise_table(runs, reference=not found["attacked"]))
    return "\n\n".join(part for part in parts if part)


def _names(runs: Runs) -> list[str]:
    present = {name for name, _ in runs}
    return [name for name in sides.SIDES if name in present]


def _values(runs: Runs, name: str, metric: str) -> list[float]:
    found = [outcome.metrics.get(metric) for (side, _), outcome in sorted(runs.items()) if side == name]
    return [q.value for q in found if q is not None and q.value is not None]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    at = interval(values)
    return f"{at.mean:.1f}" if at.low is None else f"{at.mean:.1f} ± {at.mean - at.low:.1f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _trainings(runs: Runs) -> str:
    """How the sides were trained: the clean accuracy they stopped at, and how long that took."""
    rows = []
    for name in _names(runs):
        matched = _values(runs, name, "clean accuracy matched")
        settled = _values(runs, name, "relaxations settled")
        steps = _values(runs, name, "training steps")
        rows.append(
            [
                name,
                _cell(_values(runs, name, "held-out accuracy")),
                f"{sum(matched):.0f} of {len(matched)}" if matched else "-",
                f"{sum(steps) / len(steps):.0f}" if steps else "-",
                _cell(settled),
            ]
        )
    return _table(["side", "held-out accuracy (%)", "matched", "steps", "relaxations settled (%)"], rows)


def attack_table(runs: Runs) -> str:
    """Accuracy in percent under each attack, mean over seeds with its 95% interval."""
    rows = []
    for name in _names(runs):
        if not _values(runs, name, "gradients not masked"):
            continue
        curves = [outcome.curves["pgd linf"] for (side, _), outcome in sorted(runs.items()) if side == name]
        before = [curve[0][1] for curve in curves]
        clean = _cell([value for value in before if value is not None])
        rows.append([name, clean, *(_cell(_values(runs, name, metric)) for metric in ATTACKS.values())])
    return _table(["side", "no attack", *ATTACKS], rows)


def signs(runs: Runs) -> str:
    """The signs of masked gradients: runs that pass each of them."""
    names = [name for name in _names(runs) if _values(runs, name, "gradients not masked")]
    checks = sorted({m for outcome in runs.values() for m in outcome.metrics if m.startswith("check: ")})
    rows = []
    for metric in (*checks, "gradients not masked"):
        passes = [_values(runs, name, metric) for name in names]
        rows.append([metric.removeprefix("check: "), *(f"{sum(p):.0f} of {len(p)}" for p in passes)])
    return _table(["runs that pass", *names], rows)


def noise_table(runs: Runs, reference: bool = False) -> str:
    """Accuracy in percent under Gaussian noise; with the reference points beside it where all data were trained on."""
    rows = []
    for name in _names(runs):
        row = [name, *(_cell(_values(runs, name, metric)) for metric in NOISE.values())]
        if reference:
            known = REFERENCE.get(name) or (None, DENOISED.get(name), None)
            row.append(" / ".join("-" if value is None else f"{value:g}" for value in known))
        rows.append(row)
    return _table(["side", *NOISE, *(["reference: clean / unclipped / clipped"] if reference else [])], rows)


def picture(runs: Runs, theme: Theme) -> Figure:
    """Accuracy against eps, where there were attacks, and against sigma: mean over seeds with its interval."""
    panels = [
        ("white-box linf", "PGD, L-infinity, both losses", "eps"),
        ("white-box l2", "PGD, L2, both losses", "eps"),
        ("noise unclipped", "Gaussian noise", "sigma"),
        ("noise clipped", "Gaussian noise, clipped", "sigma"),
    ]
    panels = [panel for panel in panels if any(panel[0] in outcome.curves for outcome in runs.values())]
    palette = PALETTES[theme]
    with matplotlib.rc_context(look(palette, see_through=True, small=10, line=1.7, mark=4)):
        figure = Figure(figsize=(8.4, 0.8 + 2.7 * ((len(panels) + 1) // 2)), layout="constrained")
        grid = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False)
        for axes, (curve, title, label) in zip(grid.flat, panels, strict=True):
            _panel(axes, runs, curve, palette)
            axes.set(title=title, xlabel=label, ylabel="accuracy (%)", ylim=(-3, 103))
        # the last panels hold every side
        figure.legend(*grid.flat[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure


def _panel(axes: Axes, runs: Runs, curve: str, palette: Palette) -> None:
    for index, name in enumerate(_names(runs)):
        drawn = [o.curves[curve] for (side, _), o in sorted(runs.items()) if side == name and curve in o.curves]
        points = mean_curve(drawn) if drawn else []
        if not points:
            continue
        color = palette.series[index % len(palette.series)]
        # a colour that comes again gets another line and marker
        style = STYLES[(index + index // len(STYLES)) % len(STYLES)]
        marker = MARKERS[(index + index // len(MARKERS)) % len(MARKERS)]
        x = [p[0] for p in points]
        axes.plot(x, [p[1] for p in points], color=color, linestyle=style, marker=marker, label=name)
        if points[0][2] is not None:
            low, high = [float(p[2] or 0) for p in points], [float(p[3] or 0) for p in points]
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
