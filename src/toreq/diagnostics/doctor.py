"""`toreq doctor RUN`: what keeps a run from settling or learning, each finding with its number and a remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from toreq.diagnostics.measure import LayerState, Measurements, measure
from toreq.diagnostics.runs import load_data, load_run, losses

Severity = Literal["problem", "hint"]

# Limits, each with its reason. A share is in [0, 1].
UNSETTLED = 0.01  # share of examples above tolerance that is still noise in the mean gradient
ASYM = 0.1  # measured on random nets: <= 0.06 gave cosines >= 0.9999, >= 0.19 gave <= 0.991
RADIUS = 1.0
STUCK_UNITS = 0.2  # share of a node's units without slope, or constant, over a whole batch
VANISHING = 1e-6  # of the largest parameter gradient (per weight, root mean square)
EXPLODING = 1e3  # norm of the whole gradient of a mean loss
FALLEN = 0.98  # last loss over first
IDLE = 0.002  # accuracy that the couplings add
DIGITS = 2.0  # decimal digits of the nudged contrast that float32 keeps
STOPPING = 0.2  # residual of the nudged phase over its response
COSINE = 0.99


@dataclass(frozen=True)
class Finding:
    """One thing that holds a run back: a stable ``code``, the measured ``number``, what it means, and what to do."""

    code: str
    severity: Severity
    number: float
    what: str
    remedy: str


def run_doctor(run_dir: str | Path, console: Console | None = None) -> int:
    """Print what keeps the run in ``run_dir`` from settling or learning; returns 0.

    Raises CheckpointError for a folder that is not a run.
    """
    console = console or Console()
    run = load_run(run_dir)
    data = load_data(run, train=256, test=2000)
    measured = measure(run.model, data.train_x, data.train_y, data.test_x, data.test_y, losses(run))
    findings = diagnose(measured)
    console.print(f"[bold]{run.path}[/bold]: {_facts(measured)}", highlight=False)
    if not findings:
        console.print("nothing found: it settles, its gradient is sound and its loss falls")
        return 0
    for finding in findings:
        colour = "red" if finding.severity == "problem" else "yellow"
        console.print(f"[{colour}]{finding.severity} {finding.code}[/{colour}]: {finding.what}", highlight=False)
        console.print(f"    remedy: {finding.remedy}", highlight=False, markup=False)
    return 0


def examine(net: nn.Module, x: Tensor, y: Tensor, loss_history: Sequence[float] = ()) -> list[Finding]:
    """Measure ``net`` on one batch, x (B, ...) and labels y (B,), and say what is wrong with it."""
    return diagnose(measure(net, x, y, x, y, loss_history))


def diagnose(measured: Measurements) -> list[Finding]:
    """The findings that the measurements support, problems first."""
    found = [
        *(finding for layer in measured.layers for finding in _settling(layer)),
        *(finding for layer in measured.layers for finding in _nudging(layer)),
        *(finding for layer in measured.layers for finding in _units(layer)),
        *_gradients(measured),
        *_learning(measured),
        *_couplings(measured),
    ]
    return sorted(found, key=lambda finding: finding.severity != "problem")


def _settling(layer: LayerState) -> Iterator[Finding]:
    for phase, share, steps in (
        ("free", layer.free_unsettled, layer.free_steps),
        ("nudged", layer.nudged_unsettled, layer.nudged_steps),
    ):
        if share > UNSETTLED:
            free = phase == "free"
            worst = layer.free_residual if free else layer.nudged_residual
            tolerance = layer.tolerance if free else layer.nudged_tolerance
            yield Finding(
                f"unsettled-{phase}",
                "problem",
                share,
                f"{100 * share:.1f}% of the examples do not settle in the {phase} phase of {layer.name} "
                f"(worst residual {worst:.1e}, tolerance {tolerance:.1e}, {steps:.0f} steps on average)",
                "raise solver.max_steps; if the residual stays, lower solver.damping or use the anderson solver; "
                "if it grows, the couplings are too strong: bound their norm or lower the learning rate",
            )
    if not layer.radius < RADIUS:
        yield Finding(
            "radius",
            "problem",
            layer.radius,
            f"the relaxation's Jacobian in {layer.name} has spectral radius {layer.radius:.2f}, above 1: plain "
            "relaxation does not contract",
            "bound the couplings' norm (the systems' norm option), damp (solver.damping 0.5 settles a radius down to "
            "-3 on the negative side) or use the anderson solver; lower the learning rate if it grew in training",
        )


def _nudging(layer: LayerState) -> Iterator[Finding]:
    if layer.asym_share > UNSETTLED:
        yield Finding(
            "asym",
            "problem",
            layer.asym,
            f"the nudged states of {layer.name} are not mirror images: asymmetry {layer.asym:.2g} at the median, above "
            f"{ASYM} for {100 * layer.asym_share:.1f}% of the examples, so beta (median {layer.beta:.2g}) is too large",
            "lower estimator.beta (half of it halves the asymmetry of a smooth net) or use the relative nudge; if it "
            "stays, a phase does not settle: see its finding",
        )
    if layer.digits < DIGITS:
        yield Finding(
            "beta-digits",
            "problem",
            layer.digits,
            f"the nudge moves the state of {layer.name} by {layer.response:.1e} of its size, which leaves "
            f"{max(layer.digits, 0):.1f} decimal digits of the contrast in {layer.dtype}",
            "raise estimator.beta (a response near 1% keeps five digits), or train in float64",
        )
    if layer.stopping > STOPPING:
        yield Finding(
            "nudged-stop",
            "hint",
            layer.stopping,
            f"the nudged phase of {layer.name} stops at a residual that is {layer.stopping:.2g} of the response: the "
            "contrast is partly stopping error",
            "lower estimator.tolerance by ten, or raise estimator.beta",
        )


def _units(layer: LayerState) -> Iterator[Finding]:
    for node in layer.nodes:
        if node.saturated > STUCK_UNITS:
            yield Finding(
                "saturated",
                "problem",
                node.saturated,
                f"{100 * node.saturated:.0f}% of the units of node {node.name!r} in {layer.name} have no slope on any "
                "example of the batch (dead or saturated): nothing flows back through them",
                "lower the initial scale or the learning rate, normalise the inputs to [0, 1], or use a tanh node",
            )
        elif node.constant > STUCK_UNITS:
            yield Finding(
                "constant",
                "hint",
                node.constant,
                f"{100 * node.constant:.0f}% of the units of node {node.name!r} in {layer.name} are the same for every "
                "example of the batch",
                "check that the input reaches this node (its drive, its couplings), or use fewer units",
            )


def _gradients(measured: Measurements) -> Iterator[Finding]:
    broken = [name for name, size in measured.gradients.items() if not math.isfinite(size)]
    if broken:
        yield Finding(
            "non-finite",
            "problem",
            float(len(broken)),
            f"the gradient of {_names(broken)} is not finite",
            "look at the radius and at unsettled phases first; then lower the learning rate and clip the gradient",
        )
        return
    largest = max(measured.gradients.values(), default=0.0)
    faint = [name for name, size in measured.gradients.items() if size <= VANISHING * largest]
    if faint:
        smallest = min(measured.gradients[name] for name in faint)
        yield Finding(
            "vanishing",
            "problem",
            smallest,
            f"the gradient of {_names(faint)} is below {VANISHING:.0e} of the largest (down to {smallest:.1e} against "
            f"{largest:.1e} a weight)",
            "if its units are dead see that finding; else strengthen the couplings towards the read-out, or shorten "
            "the chain of nodes between them",
        )
    if measured.gradient_norm > EXPLODING:
        yield Finding(
            "exploding",
            "problem",
            measured.gradient_norm,
            f"the whole gradient has norm {measured.gradient_norm:.1e}",
            "clip it (--gradient-clip 1), lower the learning rate, and look at the radius: near 1 gradients blow up",
        )
    if measured.cosine is not None and not measured.cosine >= COSINE:
        yield Finding(
            "gradient-off",
            "problem",
            measured.cosine,
            f"the estimator's gradient has cosine {measured.cosine:.4f} with the implicit gradient of the same batch",
            "run `toreq check` on this run to see which parameter; then lower estimator.beta and solver.tolerance",
        )


def _learning(measured: Measurements) -> Iterator[Finding]:
    history = measured.losses
    if any(not math.isfinite(value) for value in history):
        yield Finding(
            "loss-non-finite",
            "problem",
            float("nan"),
            "the training loss became infinite or NaN",
            "resume from the last checkpoint with a lower learning rate, and clip the gradient",
        )
    elif len(history) >= 2:
        share = max(1, len(history) // 10)
        first, last = _mean(history[:share]), _mean(history[-share:])
        if last > FALLEN * first:
            yield Finding(
                "loss",
                "problem",
                last / first,
                f"the training loss does not fall: {first:.3g} at first, {last:.3g} at last",
                "try the learning rate at a third and at three times; train side bp-eq to see whether the gradient "
                "or the net is the cause",
            )
    if measured.accuracy < 1.5 / measured.classes:
        yield Finding(
            "chance",
            "problem",
            measured.accuracy,
            f"test accuracy {100 * measured.accuracy:.1f}% is what guessing among {measured.classes} classes gives",
            "check the labels and the learning rate; train side bp-ff to see whether the data can be learned",
        )


def _couplings(measured: Measurements) -> Iterator[Finding]:
    if measured.accuracy_off is None:
        return
    gain = measured.accuracy - measured.accuracy_off
    if gain < IDLE:
        yield Finding(
            "idle-couplings",
            "hint",
            gain,
            f"accuracy with the couplings off is {100 * measured.accuracy_off:.1f}%, with them "
            f"{100 * measured.accuracy:.1f}%: settling contributes nothing",
            "train longer, allow stronger couplings (the systems' norm option), or raise their learning rate; until "
            "then gradient checks on this net say little",
        )


def _facts(measured: Measurements) -> str:
    layers = [
        f"{layer.name} radius {layer.radius:.2f}, {layer.free_steps:.0f} free and {layer.nudged_steps:.0f} nudged "
        f"steps, asymmetry {layer.asym:.2g}"
        for layer in measured.layers
    ]
    cosine = [] if measured.cosine is None else [f"cosine with implicit {measured.cosine:.5f}"]
    return "; ".join([*layers, *cosine, f"accuracy {100 * measured.accuracy:.1f}%"])


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _mean(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).mean())
