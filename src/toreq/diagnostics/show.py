"""`toreq show RUN`: pictures of a run, as PNG files and one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from toreq.diagnostics import context_plots, html, plots
from toreq.diagnostics.contexts import spike_raster, torus_view
from toreq.diagnostics.errors import level_errors
from toreq.diagnostics.levels import LevelSettling, level_settling
from toreq.diagnostics.plots import Theme
from toreq.diagnostics.relaxation import Relaxation, predictions, relaxation
from toreq.diagnostics.runs import Run, label, learning_curve, load_data, load_run
from toreq.diagnostics.scans import Scans, draw_eigenvalues, draw_tokens, scans
from toreq.io import atomic_write_bytes, atomic_write_text

# Examples whose relaxation is recorded, and test examples that are classified.
RECORDED, CLASSIFIED = 64, 10_000

Drawing = Callable[[Theme], Figure]

CAPTIONS = {
    "learning_curve": "Training loss (left) and test accuracy (right) after each epoch.",
    "residual": "How far the state is from its fixed point, step by step: median and the middle 80% of the examples.",
    "energy": "The energy that the free phase descends, above its value at the end.",
    "steps": "Relaxation steps that the examples took until they met the tolerance.",
    "levels": "How far each level of the pyramid is from where it settles: median and the middle 80% of the examples.",
    "level_maps": "Where on one image each level (rows, the finest first) has still to settle, by powers of ten.",
    "errors": "Size of each level's error after each step of the nudged phase beside the nudge: median over examples.",
    "eigenvalues": "The decays of the state-space maps at a step size of 1: all inside the unit disk.",
    "tokens": "How far each token is from where it settles, step by step: mean over examples.",
    "torus": "The torus of contexts: what its slots have seen, its curvature, and the units that one digit opens (+).",
    "raster": "Spikes of the first layer while one digit settles; units of closed gates are silent.",
    "confusion": "Which digits the trained net takes for which, on the test set.",
    "misclassified": "Test images that the trained net gets wrong.",
}


def run_show(run_dir: str | Path, out: str | Path | None = None, console: Console | None = None) -> int:
    """Write the run's pictures (PNG) and ``index.html`` to ``out``, by default ``RUN/plots``; returns 0.

    Raises CheckpointError for a folder that is not a run.
    """
    console = console or Console()
    run = load_run(run_dir)
    folder = Path(out) if out is not None else run.path / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    drawings, missing = draw_run(run)
    parts = []
    for name, draw in drawings.items():
        images: dict[Theme, bytes] = {"light": plots.png(draw("light")), "dark": plots.png(draw("dark"))}
        atomic_write_bytes(folder / f"{name}.png", images["light"])
        parts.append(html.picture(images, alt=CAPTIONS[name], caption=CAPTIONS[name]))
        console.print(f"wrote {folder / f'{name}.png'}")
    title = f"{label(run)} on {run.config.data}"
    body = [
        f"<h1>{escape(title)}</h1>",
        _summary_table(run.folder.summary() or {}),
        '<h2>Pictures</h2><div class="grid">',
    ]
    body += [*parts, "</div>"]
    body += [f'<p class="soft">Not drawn: {escape(reason)}</p>' for reason in missing]
    atomic_write_text(folder / "index.html", html.page(title, body))
    for reason in missing:
        console.print(f"not drawn: {reason}")
    console.print(f"wrote {folder / 'index.html'}")
    return 0


def draw_run(run: Run) -> tuple[dict[str, Drawing], list[str]]:
    """Everything that can be drawn of a run, by file name, and the reasons why something cannot."""
    drawings: dict[str, Drawing] = {}
    missing: list[str] = []
    epochs, loss, accuracy = learning_curve(run)
    if epochs:
        drawings["learning_curve"] = lambda theme: plots.learning(epochs, loss, {"test accuracy": accuracy}, theme)
    else:
        missing.append("the learning curve (no epoch is finished)")
    data = load_data(run, train=1, test=CLASSIFIED)
    x, y = data.test_x, data.test_y
    recorded = relaxation(run.model, x[:RECORDED], y[:RECORDED])
    if recorded is None:
        missing.append("residual, energy and steps (a feed-forward net does not settle)")
    else:
        drawings |= draw_relaxation(recorded)
        if recorded.free.energy is None:
            missing.append("the energy (this field is not the gradient of one)")
        drawings |= _draw_levels(level_settling(run.model, x[:RECORDED], y[:RECORDED]))
        drawings |= _draw_contexts(run.model, x)
        errors = level_errors(run.model, x[:RECORDED], y[:RECORDED])
        if errors is not None:
            drawings["errors"] = lambda theme: plots.level_errors(errors.sizes, theme)
        drawings |= _draw_scans(scans(run.model, x[:RECORDED], y[:RECORDED]))
    predicted = predictions(run.model, x)
    if predicted.ndim == 1 and y.ndim == 1:
        drawings |= _draw_classes(x, y, predicted, data.num_classes)
    else:
        missing.append("the confusion matrix (the net does not give one class per example)")
    return drawings, missing


def draw_relaxation(recorded: Relaxation) -> dict[str, Drawing]:
    """Residual, energy (when there is one) and steps of a recorded batch."""
    free, nudged = recorded.free, recorded.nudged
    drawings: dict[str, Drawing] = {
        "residual": lambda theme: plots.residuals(
            {"free phase": free.residual, "nudged phase": nudged.residual}, recorded.tolerance, theme
        ),
        "steps": lambda theme: plots.steps_histogram({"free": free.steps, "nudged": nudged.steps}, theme),
    }
    trace = free.energy
    if trace is not None:
        drawings["energy"] = lambda theme: plots.energy(trace, theme)
    return drawings


def _draw_contexts(model: nn.Module, x: Tensor) -> dict[str, Drawing]:
    drawings: dict[str, Drawing] = {}
    view, spikes = torus_view(model, x), spike_raster(model, x)
    if view is not None:
        drawings["torus"] = lambda theme: context_plots.torus(view, theme)
    if spikes is not None:
        drawings["raster"] = lambda theme: context_plots.raster(spikes, theme)
    return drawings


def _draw_levels(settling: LevelSettling | None) -> dict[str, Drawing]:
    if settling is None:
        return {}
    drawings: dict[str, Drawing] = {"levels": lambda theme: plots.levels(settling.distance, theme)}
    if settling.maps:
        drawings["level_maps"] = lambda theme: plots.level_maps(settling.maps, theme)
    return drawings


def _draw_scans(found: Scans | None) -> dict[str, Drawing]:
    if found is None:
        return {}
    return {
        "eigenvalues": lambda theme: draw_eigenvalues(found.eigenvalues, theme),
        "tokens": lambda theme: draw_tokens(found.distance, theme),
    }


def _draw_classes(x: Tensor, y: Tensor, predicted: Tensor, classes: int) -> dict[str, Drawing]:
    counts = confusion_counts(y, predicted, classes)
    drawings: dict[str, Drawing] = {"confusion": lambda theme: plots.confusion(counts, theme)}
    wrong = (predicted != y).nonzero().flatten()[:25]
    pictures = as_pictures(x[wrong])
    if pictures is not None:
        truth, guess = y[wrong].numpy(), predicted[wrong].numpy()
        drawings["misclassified"] = lambda theme: plots.misclassified(pictures, truth, guess, theme)
    return drawings


def confusion_counts(truth: Tensor, predicted: Tensor, classes: int) -> NDArray[np.integer]:
    """Counts (classes, classes), rows the true class."""
    flat = torch.bincount(truth * classes + predicted, minlength=classes * classes)
    return flat.view(classes, classes).cpu().numpy()


def as_pictures(x: Tensor) -> NDArray[np.floating] | None:
    """(K, 1, H, W) or (K, 3, H, W) as images for matplotlib, clipped to [0, 1]; None for other inputs."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        return None
    scaled = x.detach().cpu().float().clamp(0.0, 1.0)
    return (scaled[:, 0] if x.shape[1] == 1 else scaled.permute(0, 2, 3, 1)).numpy()


def _summary_table(summary: Mapping[str, Any]) -> str:
    rows = [[key, format_value(value)] for key, value in summary.items() if not isinstance(value, (dict, list))]
    return html.table(["", "value"], rows)


def format_value(value: Any) -> str:
    """A figure as text: four significant digits, thousands separated, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"
