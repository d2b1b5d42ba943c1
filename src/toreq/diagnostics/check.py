"""`toreq check`: are a system's gradients right, does its memory stay flat, how strongly is it coupled."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from torch import Tensor, nn

from toreq import data as datasets
from toreq import systems
from toreq.diagnostics import gradients as grad
from toreq.diagnostics import memory as mem
from toreq.diagnostics.check_view import conclusion, view
from toreq.diagnostics.gradients import DifferenceRow, GradientRow
from toreq.diagnostics.memory import MemoryPoint
from toreq.diagnostics.relaxation import couplings_off, predictions, radius
from toreq.diagnostics.runs import label, load_data, load_run
from toreq.errors import ConfigError, nearest
from toreq.io import atomic_write_json
from toreq.layer import equilibria

BATCH, DIFFERENCE_BATCH, TEST = 16, 4, 2000
# Resident memory is confirmed at these two ends only: a process each.
RESIDENT_STEPS = (10, 1000)


@dataclass
class CheckResult:
    """What a check found; filled while it runs. ``accuracy`` and ``accuracy_off`` (couplings off) for runs only."""

    system: str
    gradients: list[GradientRow] = field(default_factory=list)
    differences: list[DifferenceRow] = field(default_factory=list)
    unsupported: list[tuple[str, str]] = field(default_factory=list)
    memory: list[MemoryPoint] = field(default_factory=list)
    memory_unrolled: list[MemoryPoint] = field(default_factory=list)
    resident: list[MemoryPoint] = field(default_factory=list)
    reference_residual: float = 0.0
    radius: float = math.nan
    accuracy: float | None = None
    accuracy_off: float | None = None
    parameters: int = 0

    @property
    def failures(self) -> list[str]:
        """Why the check fails, one sentence each; empty when it passes."""
        said = []
        if not self.reference_residual <= 1e-9:
            said.append(
                f"the reference did not settle in float64 (residual {self.reference_residual:.1e}): the relaxation "
                "does not contract, nothing below can be trusted; bound the couplings' norm or use the anderson solver"
            )
        for row in self.gradients:
            if row.passed:
                continue
            if row.negligible or row.cosine is None:
                said.append(
                    f"{row.estimator}, {row.parameter}: absolute error {row.absolute_error:.1e} of the largest "
                    f"gradient where the true gradient is negligible, above {grad.MAX_NEGLIGIBLE_ERROR:.0e}"
                )
            elif not row.cosine >= grad.MIN_COSINE:
                said.append(f"{row.estimator}, {row.parameter}: cosine {row.cosine:.6f} is below {grad.MIN_COSINE}")
            else:
                said.append(
                    f"{row.estimator}, {row.parameter}: right direction, wrong length: relative error "
                    f"{row.relative_error:.3f} is above {grad.MAX_RELATIVE_ERROR}"
                )
        for row in self.differences:
            if row.estimator == "implicit" and not row.relative_error <= grad.MAX_DIFFERENCE_ERROR:
                said.append(
                    f"implicit, {row.parameter}: differs from finite differences of the loss by "
                    f"{row.relative_error:.1e}, above {grad.MAX_DIFFERENCE_ERROR:.0e}"
                )
        return said

    @property
    def passed(self) -> bool:
        """Whether every supported estimator is right and the reference agrees with finite differences."""
        return bool(self.gradients) and not self.failures

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-able values."""
        return {
            "system": self.system,
            "gradients": [
                {
                    "estimator": row.estimator,
                    "parameter": row.parameter,
                    "cosine": row.cosine,
                    "relative_error": row.relative_error,
                }
                for row in self.gradients
                if not row.negligible
            ],
            "negligible": [
                {"estimator": row.estimator, "parameter": row.parameter, "absolute_error": row.absolute_error}
                for row in self.gradients
                if row.negligible
            ],
            "finite_differences": [asdict(row) for row in self.differences],
            "unsupported": [{"estimator": name, "reason": reason} for name, reason in self.unsupported],
            "memory": [_point(point) for point in self.memory],
            "memory_unrolled": [_point(point) for point in self.memory_unrolled],
            "memory_resident": [_point(point) for point in self.resident],
            "radius": self.radius,
            "accuracy": self.accuracy,
            "accuracy_couplings_off": self.accuracy_off,
            "parameters": self.parameters,
            "passed": self.passed,
            "failures": self.failures,
        }


def _point(point: MemoryPoint) -> dict[str, float]:
    return {"steps": point.steps, "peak_mb": point.peak_mb}


def _silent() -> None:
    return None


def check(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    system: str = "net",
    candidates: Sequence[tuple[str, Any]] | None = None,
    finite_differences: bool = True,
    steps: Sequence[int] = mem.DEFAULT_STEPS,
    result: CheckResult | None = None,
    update: Callable[[], None] = _silent,
) -> CheckResult:
    """Compare every supported estimator with the implicit gradient, and both with finite differences of the loss.

    Args:
        net: a module with at least one Equilibrium layer; left as it was.
        x, y: a batch (B, ...) and its labels; memory is measured at B, finite differences on the first 4 examples.
        system: the name that the result carries.
        candidates: (name, estimator) pairs instead of the shipped ones that the net supports.
        finite_differences: leave them out with False.
        steps: numbers of relaxation steps at which memory is measured; empty for none.
        result: filled in place, so that a display can follow it; ``update`` is called after each piece.

    Raises:
        ConfigError: ``net`` has no Equilibrium layer.
    """
    result = result or CheckResult(system)
    # in training mode norm control refines its estimate at every call: two evaluations would be of two functions
    net = copy.deepcopy(net).eval()
    result.parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
    chosen = grad.supported(net) if candidates is None else list(candidates)
    if candidates is None:
        result.unsupported = grad.unsupported(net)
    result.radius = radius(net, x)
    update()
    exact = grad.tight_copy(net)
    reference = grad.gradients(exact, grad.as_double(x), y)
    result.reference_residual = max(
        (float(layer.last.free.residual.max()) for layer in equilibria(exact) if layer.last.free is not None),
        default=math.nan,
    )
    for rows in grad.against_implicit(net, x, y, chosen, reference):
        result.gradients += rows
        update()
    if finite_differences:
        _differences(net, x[:DIFFERENCE_BATCH], y[:DIFFERENCE_BATCH], chosen, result, update)
    if steps:

        def keep(into: list[MemoryPoint]) -> Callable[[MemoryPoint], None]:
            def report(point: MemoryPoint) -> None:
                into.append(point)
                update()

            return report

        mem.memory_against_steps(net, x, y, steps, report=keep(result.memory))
        if "unrolled" in dict(chosen):
            mem.memory_against_steps(net, x, y, steps, "unrolled", report=keep(result.memory_unrolled))
    return result


def _differences(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    chosen: Sequence[tuple[str, Any]],
    result: CheckResult,
    update: Callable[[], None],
) -> None:
    found = {name: grad.gradients(grad.with_estimator(net, e), x, y) for name, e in chosen if name != "implicit"}
    found["implicit"] = grad.gradients(grad.tight_copy(net), grad.as_double(x), y)
    # Two more relaxations a direction: a net of many weights gets fewer.
    few = result.parameters > 2_000_000
    for rows in grad.against_differences(
        net, x, y, found, random_directions=1 if few else 2, coordinates=1 if few else 2
    ):
        result.differences += rows
        update()


def run_check(
    target: str | Path,
    *,
    json_path: str | Path | None = None,
    console: Console | None = None,
    options: Mapping[str, Any] | None = None,
    batch_size: int = BATCH,
    seed: int = 0,
    steps: Sequence[int] = mem.DEFAULT_STEPS,
    resident: bool = True,
) -> int:
    """Check a system by its name (a fresh net on bundled MNIST) or a run by its folder, shown live.

    Args:
        target: a name of ``toreq.systems.names()`` or a run folder.
        json_path: where to write the result as JSON.
        options: options of the system, for a name.
        batch_size: examples for the gradients and the memory, at least 1.
        seed: of the fresh net's weights.
        steps: numbers of relaxation steps at which memory is measured.
        resident: confirm the memory by the peak resident memory of fresh processes.

    Returns:
        0, or 1 when a supported estimator at its shipped beta has a cosine below 0.999 on any parameter, a wrong
        length, or when the reference itself disagrees with finite differences.

    Raises:
        ConfigError: an unknown name; CheckpointError: a folder that is not a run.
    """
    console = console or Console()
    if batch_size < 1:
        raise ConfigError(f"run_check: expected batch_size >= 1, got {batch_size}; give it some examples")
    if str(target) in systems.names():
        net, x, y = _fresh(str(target), dict(options or {}), batch_size, seed)
        result, held_out = CheckResult(str(target)), None
    elif Path(target).is_dir():
        if options:
            raise ConfigError(f"run_check: expected no options for the run {target}, got {dict(options)}; drop them")
        run = load_run(target)
        samples = load_data(run, train=batch_size, test=TEST)
        net, x, y = run.model, samples.train_x, samples.train_y
        result, held_out = CheckResult(label(run)), (samples.test_x, samples.test_y)
    else:
        raise ConfigError(
            f"check: expected a system or a run folder, got {str(target)!r}; {nearest(str(target), systems.names())}"
        )
    if not equilibria(net):
        raise ConfigError(
            f"check: expected a network that settles, got the feed-forward side of {result.system}; check a run "
            f"of another side"
        )
    with Live(view(result), console=console, refresh_per_second=8, transient=False) as live:

        def update() -> None:
            live.update(view(result))

        check(net, x, y, result=result, steps=steps, update=update)
        if held_out is not None:
            result.accuracy = _accuracy(net, *held_out)
            with couplings_off(net):
                result.accuracy_off = _accuracy(net, *held_out)
            update()
        if resident and steps and isinstance(config := getattr(net, "config", None), dict):
            for count in RESIDENT_STEPS:
                result.resident.append(mem.resident_peak_mb(config, count, len(x)))
                update()
    # said before the file is written: an unwritable path must not lose it
    for line in conclusion(result):
        console.print(line, highlight=False)
    if json_path is not None:
        atomic_write_json(json_path, result.to_json())
    return 0 if result.passed else 1


def _accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((predictions(net, x) == y).float().mean())


def _fresh(name: str, options: dict[str, Any], batch_size: int, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    mnist = datasets.load("mnist").limit(batch_size, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = systems.create(name, input_shape=mnist.input_shape, num_classes=mnist.num_classes, **options)
    return net, mnist.inputs("train", slice(None)), mnist.train_y
