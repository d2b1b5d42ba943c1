"""The demo's report: one HTML file that holds its tables, pictures and commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from toreq.diagnostics import html, plots
from toreq.diagnostics.plots import Curve, Theme
from toreq.diagnostics.relaxation import relaxation
from toreq.diagnostics.runs import Run, learning_curve, load_data, load_run
from toreq.diagnostics.show import CAPTIONS, RECORDED, draw_relaxation, format_value
from toreq.io import atomic_write_text

SIDES = {
    "eqprop": ("EqProp", "the weights learn from two nudged equilibria"),
    "bp-eq": (
        "backprop, same net",
        "the same settling net, its gradient by the implicit adjoint (as in DEQ)",
    ),
    "bp-ff": ("backprop, feed-forward", "an ordinary net of the same widths, run once, no settling"),
}

# Column key -> heading, what it means, whether more is better (None: neither).
COLUMNS: Mapping[str, tuple[str, str, bool | None]] = {
    "test_accuracy": ("accuracy", "Share of the test images classified correctly, in percent.", True),
    "parameters": ("parameters", "Trainable numbers in the net.", None),
    "seconds_per_epoch": (
        "s / epoch",
        "Wall-clock seconds for one pass over the training images used.",
        False,
    ),
    "samples_per_second": ("images / s", "Training images per second, both phases included.", True),
    "free_steps_mean": ("free steps", "Mean relaxation steps until the free state met its tolerance.", None),
    "nudged_steps_mean": ("nudged steps", "Mean relaxation steps of the two nudged phases.", None),
    "converged_fraction": (
        "settled",
        "Share of the examples whose relaxation met its tolerance; below 100% the gradient is in doubt.",
        True,
    ),
    "asym_mean": (
        "asymmetry",
        "How far the two nudged states are from mirror images about the free one; above 0.1 beta is too large.",
        None,
    ),
    "radius": (
        "radius",
        "Spectral radius of the plain relaxation's Jacobian: how strongly the settling net is coupled. Below 1 it "
        "settles undamped; near 0 the couplings would hardly matter. Springs between levels raise it, and are solved "
        "implicitly.",
        None,
    ),
    "peak_memory_mb": ("peak MB", "Peak resident memory of the training process, library included.", False),
}


def write_demo_report(results: Mapping[str, Any] | Sequence[Mapping[str, Any]], out_dir: str | Path) -> Path:
    """Write ``report.html`` to ``out_dir`` and return its path.

    ``results`` is the list of rows, or a mapping with ``rows`` and optionally ``title``, ``data``, ``commands`` (list
    of shell lines), ``machine`` and ``seconds``. A row is a run's ``summary.json`` with ``side`` and, for its
    pictures, ``run`` (the run's folder).
    """
    whole: Mapping[str, Any] = results if isinstance(results, Mapping) else {"rows": results}
    rows: Sequence[Mapping[str, Any]] = whole["rows"]
    runs = {index: load_run(row["run"]) for index, row in enumerate(rows) if row.get("run")}
    data = str(whole.get("data") or (rows[0].get("data") if rows else "") or "")
    title = str(whole.get("title") or f"toreq demo{f' on {data}' if data else ''}")
    body = [f"<h1>{escape(title)}</h1>", _lead(whole, rows)]
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    body += ["<h2>Results</h2>", _results(rows, columns), *_warnings(rows)]
    body += ["<h2>Learning</h2>", *_learning(rows, runs), "<h2>Settling</h2>", *_settling(rows, runs)]
    meanings = {COLUMNS[key][0]: COLUMNS[key][1] for key in columns}
    sides = {name: f"{text[0].upper()}{text[1:]}." for name, text in _sides(rows).values()}
    body += ["<h2>The rows</h2>", html.definitions(sides)]
    body += ["<h2>The columns</h2>", html.definitions(meanings)]
    if whole.get("commands"):
        body += ["<h2>Do it again</h2>", html.commands([str(line) for line in whole["commands"]])]
    path = Path(out_dir) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, html.page(title, body))
    return path


def _sides(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    present = dict.fromkeys(str(row.get("side", "eqprop")) for row in rows)
    return {side: SIDES.get(side, (side, "another way to make the gradient")) for side in present}


def _name(row: Mapping[str, Any]) -> str:
    """System and, where the row names one, its architecture."""
    label = row.get("label") or row.get("system", "")
    return str(label)


def _side(row: Mapping[str, Any]) -> str:
    side = str(row.get("side", "eqprop"))
    return SIDES.get(side, (side, ""))[0]


def percent(value: float) -> str:
    """A share in [0, 1] as percent with two decimals."""
    return f"{100 * value:.2f}%"


def _cell(key: str, value: Any) -> str:
    if isinstance(value, (int, float)) and key in ("test_accuracy", "converged_fraction"):
        return percent(float(value))
    if isinstance(value, float) and abs(value) >= 1000:
        return f"{value:,.0f}"
    return format_value(value)


def _lead(whole: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    text = (
        "Each EqProp row is a net that settles to an equilibrium and learns from two nudged equilibria; "
        "the rows beside it train the same net, or an ordinary one of the same widths, by backprop, "
        "on the same images, for as many epochs, from the same seed."
    )
    facts = [
        f"seed {rows[0]['seed']}" if rows and "seed" in rows[0] else "",
        str(whole.get("machine") or ""),
        f"{float(whole['seconds']):.0f} s in all" if whole.get("seconds") else "",
    ]
    said = ", ".join(fact for fact in facts if fact)
    return f'<p>{escape(text)}</p><p class="soft">{escape(said)}</p>'


def _results(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    names = [_name(row) for row in rows]
    starts = [i for i in range(1, len(rows)) if names[i] != names[i - 1]]
    headings = ["system", "trained by", *(COLUMNS[key][0] for key in columns)]
    cells = [[names[i], _side(row), *(_cell(key, row.get(key)) for key in columns)] for i, row in enumerate(rows)]
    return html.table(headings, cells, text=(0, 1), groups=starts)


def _warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before trusting a row, said beside the table."""
    said = []
    for row in rows:
        settled = row.get("converged_fraction")
        if isinstance(settled, (int, float)) and settled < 0.99:
            said.append(f"{_name(row)}, {_side(row)}: {percent(1 - settled)} of the relaxations did not settle.")
        asym = row.get("asym_mean")
        if isinstance(asym, (int, float)) and asym > 0.1:
            said.append(f"{_name(row)}, {_side(row)}: asymmetry {asym:.2g}, above 0.1; its gradient is in doubt.")
    return [f'<p class="warn">{escape(line)}</p>' for line in said]


def _pictures(draw: Any, alt: str, caption: str) -> str:
    images: dict[Theme, bytes] = {"light": plots.png(draw("light")), "dark": plots.png(draw("dark"))}
    return html.picture(images, alt, caption)


def _learning(rows: Sequence[Mapping[str, Any]], runs: Mapping[int, Run]) -> list[str]:
    """One figure per system with a line per side, and the accuracies of all rows as bars."""
    parts = ['<div class="grid">']
    for name in dict.fromkeys(_name(row) for row in rows):
        lines = []
        for index, run in runs.items():
            epochs, _, accuracy = learning_curve(run)
            if _name(rows[index]) == name and epochs:
                lines.append(Curve(_side(rows[index]), epochs, accuracy))
        if lines:
            parts.append(
                _pictures(
                    lambda theme, lines=lines, name=name: plots.curves(
                        lines, title=name, x_label="epoch", y_label="test accuracy (%)", theme=theme
                    ),
                    f"Test accuracy of {name} against epoch for each side",
                    f"{name}: test accuracy after each epoch, EqProp beside backprop.",
                )
            )
    rated = [row for row in rows if isinstance(row.get("test_accuracy"), (int, float))]
    errors = [100 * (1 - row["test_accuracy"]) for row in rated]
    labels = [f"{_name(row)}: {_side(row)}" if len(parts) > 2 else _side(row) for row in rated]
    if rated:
        parts.append(
            _pictures(
                lambda theme: plots.bars(
                    labels, errors, [_side(row) for row in rated], title="Test error", x_label="wrong (%)", theme=theme
                ),
                "Test error of every row",
                "Share of the test images classified wrongly: shorter is better.",
            )
        )
    return [*parts, "</div>"]


def _settling(rows: Sequence[Mapping[str, Any]], runs: Mapping[int, Run]) -> list[str]:
    """Residual, energy and steps of each EqProp row's trained net on one test batch."""
    parts = ['<div class="grid">']
    for index, run in runs.items():
        if str(rows[index].get("side", "eqprop")) != "eqprop":
            continue
        data = load_data(run, train=1, test=RECORDED)
        recorded = relaxation(run.model, data.test_x, data.test_y)
        if recorded is None:
            continue
        for name, draw in draw_relaxation(recorded).items():
            caption = f"{_name(rows[index])}, trained. {CAPTIONS[name]}"
            parts.append(_pictures(draw, caption, caption))
    if len(parts) == 1:
        return ['<p class="soft">No run folder was given, so no relaxation is drawn.</p>']
    return [*parts, "</div>"]
