"""The live line of a training run: batches, rate, time left, loss and settling steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    """Samples per second."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self._batch_size = batch_size

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed * self._batch_size:,.0f} samples/s", style="green")


class Live:
    """A progress bar over all steps of a run, which also prints one line per epoch."""

    def __init__(self, console: Console, *, label: str, total: int, done: int, batch_size: int, show: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _Rate(batch_size),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (show and console.is_terminal),
            refresh_per_second=5,
        )
        self._console = console
        self._show = show
        self._label = label
        self._task = self._progress.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """Count one step."""
        self._progress.advance(self._task)

    def note(self, means: Mapping[str, Any]) -> None:
        """Show the means over the last steps."""
        parts = [f"loss {means['loss']:.3f}"] if means["loss"] is not None else []
        if means["free_steps_mean"] is not None:
            parts.append(f"steps {means['free_steps_mean']:.1f}")
        if means["nudged_steps_mean"] is not None:
            parts[-1] += f"+{means['nudged_steps_mean']:.1f}"
        self._progress.update(self._task, note=" ".join(parts))

    def epoch(self, line: Mapping[str, Any], epochs: int) -> None:
        """Print the results of one epoch."""
        if not self._show:
            return
        text = (
            f"{self._label}  epoch {line['epoch']}/{epochs}  train loss {line['loss']:.4f}  "
            f"test {line['test_accuracy']:.2%}  {line['seconds']:.1f} s"
        )
        if line["free_steps_mean"] is not None:
            text += f"  free {line['free_steps_mean']:.1f}"
        if line["nudged_steps_mean"] is not None:
            text += f"  nudged {line['nudged_steps_mean']:.1f}"
        if line["converged_fraction"] is not None:
            text += f"  settled {line['converged_fraction']:.1%}"
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
