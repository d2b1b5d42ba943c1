"""How a check looks on a terminal, while it runs and at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from toreq.diagnostics.gradients import MAX_DIFFERENCE_ERROR, MIN_COSINE, DifferenceRow, GradientRow
from toreq.diagnostics.memory import MemoryPoint, growth


class Shown(Protocol):
    """What of a check's result is drawn."""

    system: str
    gradients: list[GradientRow]
    differences: list[DifferenceRow]
    unsupported: list[tuple[str, str]]
    memory: list[MemoryPoint]
    memory_unrolled: list[MemoryPoint]
    resident: list[MemoryPoint]
    radius: float
    accuracy: float | None
    accuracy_off: float | None
    parameters: int

    @property
    def failures(self) -> list[str]: ...

    @property
    def passed(self) -> bool: ...


def view(result: Shown) -> RenderableType:
    """The tables as far as they are filled."""
    parts: list[RenderableType] = [_gradient_table(result)]
    if result.memory:
        parts.append(_memory_table(result))
    return Group(*parts)


def _gradient_table(result: Shown) -> Table:
    size = f", {result.parameters:,} parameters" if result.parameters else ""
    table = Table(title=f"{escape(result.system)}: gradients{size}", title_justify="left")
    table.add_column("estimator")
    table.add_column("parameter", overflow="fold")
    for name in ("cosine", "relative error", "against differences"):
        table.add_column(name, justify="right")
    differences = {(row.estimator, row.parameter): row.relative_error for row in result.differences}
    previous = None
    for row in result.gradients:
        if previous not in (None, row.estimator):
            table.add_section()
        colour = "green" if row.passed else "bold red"
        if row.cosine is None or row.relative_error is None:
            cosine, error = "negligible", f"{row.absolute_error:.1e} abs"
        else:
            cosine, error = f"{row.cosine:.6f}", f"{row.relative_error:.1e}"
        difference = differences.get((row.estimator, row.parameter))
        table.add_row(
            row.estimator if previous != row.estimator else "",
            escape(row.parameter),
            f"[{colour}]{cosine}[/]",
            error,
            "" if difference is None else f"{difference:.1e}",
        )
        previous = row.estimator
    return table


def _memory_table(result: Shown) -> Table:
    table = Table(title="peak memory of one training step (MiB)", title_justify="left")
    unrolled, resident = _by_steps(result.memory_unrolled), _by_steps(result.resident)
    table.add_column("steps", justify="right")
    table.add_column("tensors", justify="right")
    if unrolled:
        table.add_column("tensors, unrolled", justify="right")
    if resident:
        table.add_column("whole process", justify="right")
    for point in result.memory:
        cells = [f"{point.steps}" if point.ran == point.steps else f"{point.steps} (ran {point.ran})"]
        cells.append(f"{point.peak_mb:.2f}")
        for others in (unrolled, resident):
            if others:
                cells.append(f"{others[point.steps]:.2f}" if point.steps in others else "")
        table.add_row(*cells)
    return table


def _by_steps(points: Sequence[MemoryPoint]) -> dict[int, float]:
    return {point.steps: point.peak_mb for point in points}


def conclusion(result: Shown) -> list[str]:
    """What the tables come to, in sentences with rich markup."""
    lines = [f"[dim]not supported: {escape(name)}: {escape(reason)}[/dim]" for name, reason in result.unsupported]
    lines += _memory_lines(result)
    lines.append(_coupling_line(result))
    if result.accuracy is not None and result.accuracy_off is not None:
        lines.append(f"accuracy {100 * result.accuracy:.2f}%, with the couplings off {100 * result.accuracy_off:.2f}%")
    if result.passed:
        names = list(dict.fromkeys(row.estimator for row in result.gradients))
        lowest = min((row.cosine for row in result.gradients if row.cosine is not None), default=math.nan)
        lines.append(
            f"[bold green]passed[/bold green]: {len(names)} estimators, lowest cosine {lowest:.6f} (asked: "
            f"{MIN_COSINE}); "
            f"the reference agrees with finite differences to {MAX_DIFFERENCE_ERROR:.0e}"
            if result.differences
            else f"[bold green]passed[/bold green]: {len(names)} estimators, lowest cosine {lowest:.6f}"
        )
    else:
        lines += [f"[bold red]failed[/bold red]: {escape(reason)}" for reason in result.failures]
    return lines


def _memory_lines(result: Shown) -> list[str]:
    lines = []
    for name, points in (("tensor memory", result.memory), ("process memory", result.resident)):
        if len(points) >= 2:
            grown = 100 * growth(points)
            verdict = "flat" if abs(grown) <= 2 else "[yellow]not flat[/yellow]"
            lines.append(f"{name} from {points[0].steps} to {points[-1].steps} steps: {grown:+.1f}%, {verdict}")
    if len(result.memory_unrolled) >= 2:
        last = result.memory_unrolled[-1]
        beside = _by_steps(result.memory).get(last.steps, math.nan)
        lines.append(f"unrolled backprop at {last.steps} steps: {last.peak_mb / beside:.1f} times as much")
    return lines


def _coupling_line(result: Shown) -> str:
    if not result.radius >= 0.3:
        return (
            f"radius {result.radius:.2f}: [yellow]weakly coupled[/yellow], which makes every gradient check easy; "
            "check a trained run too"
        )
    if result.radius >= 1:
        return f"radius {result.radius:.2f}: [yellow]1 or more[/yellow], plain relaxation does not contract here"
    return f"radius {result.radius:.2f}"
