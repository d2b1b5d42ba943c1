"""The protocol: a network under attack and under noise, measured and checked, as an `Outcome`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toreq.data import Dataset, corruptions
from toreq.diagnostics.gradients import criterion
from toreq.estimators import Estimator
from toreq.evidence import counting
from toreq.evidence.base import nets
from toreq.evidence.claim import Cost, Outcome, Points, Quantity, Trial
from toreq.evidence.protocols.robustness import attacks, masking, sides
from toreq.evidence.protocols.robustness.attacks import Attack, Norm
from toreq.evidence.protocols.robustness.corruptions import CLIPS, accuracy, corruption_curve, noise_curve
from toreq.evidence.protocols.robustness.fitting import Fitted
from toreq.evidence.protocols.robustness.masking import Check
from toreq.evidence.protocols.robustness.sides import Sizes
from toreq.io import atomic_write_json
from toreq.layer import equilibria

LINF = (0.05, 0.1, 0.2, 0.3, 0.5)
L2 = (0.75, 1.5, 3.0, 6.0)
NORMS: dict[Norm, tuple[float, ...]] = {"linf": LINF, "l2": L2}
PROBED: dict[Norm, float] = {"linf": 0.1, "l2": 1.5}
"""Where the number of steps is varied: neither all nor nothing survives there."""
NAMED: dict[str, tuple[float, ...]] = {"linf": (0.1, 0.2, 0.3), "l2": (1.5, 3.0)}
"""The sizes whose accuracies are metrics of their own."""

Survived = dict[str, tuple[tuple[float, ...], Tensor]]


def side(name: str, trial: Trial, *, attacked: bool = True) -> Outcome:
    """Train and measure a shared side (`sides.SIDES`) at the trial's budget and seed.

    Args:
        name: of the side.
        trial: budget, seed and device.
        attacked: whether attacks are run, on the sides that are attacked at all.
    """
    net, fitted = sides.trained(name, trial.budget, trial.seed, trial.device)
    return measure(net, trial, fitted, attacked=attacked and sides.find(name).attacked)


def own(make: Callable[[], nn.Module], trial: Trial, sigma: float = 0.0, estimator: Estimator | None = None) -> Outcome:
    """Train a network as the shared sides are trained, and measure it.

    Args:
        make: an untrained network from ``(B, 1, 28, 28)`` to 10 logits.
        trial: budget, seed and device.
        sigma: noise on its training images.
        estimator: of the attack's input gradient; `attackable`'s when None.
    """
    net, fitted = sides.prepared(make, trial.budget, trial.seed, trial.device, sigma)
    return measure(net, trial, fitted, estimator=estimator)


def measure(
    net: nn.Module,
    trial: Trial,
    fitted: Fitted | None = None,
    *,
    attacked: bool = True,
    estimator: Estimator | None = None,
) -> Outcome:
    """Clean accuracy, accuracy under attack and under corruption, and the signs of masked gradients.

    Parts that an interrupted run has finished are read from the trial's scratch folder.

    Args:
        net: a trained classifier from ``(B, 1, 28, 28)`` in [0, 1] to 10 logits.
        trial: budget, seed and device.
        fitted: how it was trained, for the record.
        attacked: whether attacks are run.
        estimator: of the attack's input gradient; `attackable`'s when None.
    """
    sizes = Sizes.of(trial.budget)
    data = nets.mnist(sizes.train, sizes.test)
    kept = _Kept(trial.scratch, net)
    metrics, curves, notes = _trained(net, fitted, data, trial), dict[str, Points](), list[str]()
    curves |= kept("corruptions", lambda: _corruptions(net, data, trial))
    for clip in CLIPS:
        metrics[f"accuracy, sigma 0.5 {clip}"] = _percent(dict(curves[f"noise {clip}"])[0.5])
    if attacked:
        found = kept("attacks", lambda: _attacks(net, data, trial, sizes, estimator))
        curves |= found["curves"]
        metrics |= {name: Quantity(value, unit) for name, (value, unit) in found["metrics"].items()}
        notes += found["notes"]
    parameters = counting.parameters(net)
    samples = None if fitted is None else fitted.samples
    flops = None if fitted is None else _step_flops(net, data, trial) * fitted.samples
    ordered: dict[str, Points] = {name: [(float(x), y) for x, y in points] for name, points in curves.items()}
    return Outcome(metrics, ordered, Cost(parameters, flops, samples), tuple(notes))


def _percent(value: float | None) -> Quantity:
    return Quantity(value, "%")


def _trained(net: nn.Module, fitted: Fitted | None, data: Dataset, trial: Trial) -> dict[str, Quantity]:
    x, y = data.inputs("test", slice(None)).to(trial.device), data.test_y.to(trial.device)
    metrics = {"clean accuracy": _percent(accuracy(net, x, y))}
    if fitted is not None:
        metrics["held-out accuracy"] = _percent(fitted.held_out)
        metrics["training steps"] = Quantity(float(fitted.steps), "")
        if fitted.matched is not None:
            metrics["clean accuracy matched"] = Quantity(float(fitted.matched), "")
    if equilibria(net):
        with torch.no_grad():
            net(x[:250])
        last = [layer.last.free for layer in equilibria(net)]
        shares = [float(phase.converged.double().mean()) for phase in last if phase is not None]
        metrics["relaxations settled"] = _percent(100 * min(shares))
    return metrics


def _corruptions(net: nn.Module, data: Dataset, trial: Trial) -> dict[str, Points]:
    x, y = data.inputs("test", slice(None)).to(trial.device), data.test_y.to(trial.device)
    found = {f"noise {clip}": noise_curve(net, x, y, clip, trial.seed) for clip in CLIPS}
    for name in corruptions():
        if name != "gaussian_noise":
            found[name.replace("_", " ")] = corruption_curve(net, x, y, name, trial.seed)
    return found


def _attacks(net: nn.Module, data: Dataset, trial: Trial, sizes: Sizes, estimator: Estimator | None) -> dict[str, Any]:
    target = attacks.attackable(net, estimator)
    x = data.inputs("test", slice(0, sizes.attacked)).to(trial.device)
    y = data.test_y[: sizes.attacked].to(trial.device)
    clean = attacks.survivors(target, Attack("fgsm", "linf", (1e-12,)), x, y)[0]
    survived: Survived = {}
    other = attacks.attackable(sides.surrogate(trial.budget, trial.seed, trial.device))
    for norm, eps in NORMS.items():
        survived[f"fgsm {norm}"] = eps, attacks.survivors(target, Attack("fgsm", norm, eps), x, y)
        climb = Attack("pgd", norm, eps, sizes.steps, sizes.restarts)
        left = attacks.survivors(target, climb, x, y, trial.seed)
        survived[f"pgd {norm}"] = eps, left
        margin = replace(climb, kind="margin", restarts=1)
        survived[f"white-box {norm}"] = eps, attacks.survivors(target, margin, x, y, trial.seed, among=left)
        survived[f"transfer {norm}"] = eps, attacks.transferred(target, other, climb, x, y, trial.seed)
        blind = Attack("hopskipjump", norm, eps, sizes.rounds, queries=sizes.queries)
        few = slice(0, sizes.queried)
        survived[f"hopskipjump {norm}"] = eps, attacks.survivors(target, blind, x[few], y[few], trial.seed)
    steps: dict[Norm, dict[int, Tensor]] = {
        norm: _by_steps(target, norm, sizes, x, y, survived, trial.seed) for norm in NORMS
    }
    checks = _checks(survived, clean, steps, attacks.vanishing(target, x, y))
    return _reported(survived, clean, checks, sizes)


def _by_steps(
    target: nn.Module, norm: Norm, sizes: Sizes, x: Tensor, y: Tensor, survived: Survived, seed: int
) -> dict[int, Tensor]:
    """Survivors of a few, the usual and many steps at one eps, by the number of steps; one start each."""
    few = slice(0, max(sizes.queried, sizes.attacked // 2))
    found = {}
    for steps in (max(1, sizes.steps // 4), sizes.steps, sizes.steps * 5 // 2):
        attack = Attack("pgd", norm, (PROBED[norm],), steps)
        found[steps] = attacks.survivors(target, attack, x[few], y[few], seed)
    return found


def _checks(survived: Survived, clean: Tensor, steps: dict[Norm, dict[int, Tensor]], vanishing: float) -> list[Check]:
    found = [masking.not_vanishing(vanishing)]
    for norm in NORMS:
        pgd = survived[f"pgd {norm}"][1]
        white = survived[f"white-box {norm}"][1]
        parts = [
            masking.falls(pgd, clean),
            masking.reaches_zero(pgd),
            masking.at_least_as_strong("PGD is at least as strong as FGSM", pgd, survived[f"fgsm {norm}"][1]),
            masking.at_least_as_strong("the margin loss finds little more", pgd, white, masking.LOSS_SLACK),
            masking.at_least_as_strong("white-box beats labels alone", pgd, survived[f"hopskipjump {norm}"][1]),
            masking.at_least_as_strong("white-box beats transfer", pgd, survived[f"transfer {norm}"][1]),
            masking.more_steps(steps[norm]),
        ]
        found += [Check(f"{check.name}, {norm}", check.value, check.limit) for check in parts]
    return found


def _reported(survived: Survived, clean: Tensor, checks: list[Check], sizes: Sizes) -> dict[str, Any]:
    metrics: dict[str, tuple[float, str]] = {}
    curves: dict[str, Points] = {}
    for name, (eps, alive) in survived.items():
        before = 100 * float(clean[: alive.shape[1]].double().mean())
        curves[name] = [(0.0, before), *zip(eps, masking.percent(alive), strict=True)]
        norm = name.split()[-1]
        metrics |= {f"accuracy, {name} {size:g}": (dict(curves[name])[size] or 0.0, "%") for size in NAMED[norm]}
    for check in checks:
        metrics[f"check: {check.name}"] = (float(check.passes), "")
    metrics["gradients not masked"] = (float(masking.all_pass(checks)), "")
    failed = [f"{c.name}: {c.value:.1f} above {c.limit:g}" for c in checks if not c.passes]
    note = (
        f"attacks: {sizes.attacked} test images, {sizes.restarts} starts of PGD-{sizes.steps}; HopSkipJump: "
        f"{sizes.queried} images, {sizes.rounds} rounds of {sizes.queries} queries and more"
    )
    return {"metrics": metrics, "curves": curves, "notes": [note, *failed]}


def _step_flops(net: nn.Module, data: Dataset, trial: Trial) -> float:
    """Operations per training sample of a step."""
    batch = 8
    x, y = data.inputs("train", slice(0, batch)).to(trial.device), data.train_y[:batch].to(trial.device)

    def step() -> None:
        with torch.enable_grad():
            criterion(net)(net(x), y).backward()

    found = counting.flops(step) / batch
    net.zero_grad()
    return found


class _Kept:
    """Parts of an outcome in the scratch folder, so that an interrupted run need not make them again.

    They belong to the weights they were measured on: with others they are made anew.
    """

    def __init__(self, scratch: Path, net: nn.Module) -> None:
        self.scratch = scratch
        total = [float(p.detach().double().abs().sum()) for p in net.parameters()]
        self.weights = [repr(value) for value in total]

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        file = self.scratch / f"{name}.json"
        if file.exists():
            held = json.loads(file.read_text(encoding="utf-8"))
            if held["weights"] == self.weights:
                return held["content"]
        started = time.perf_counter()
        content = compute()
        seconds = time.perf_counter() - started
        atomic_write_json(file, {"weights": self.weights, "seconds": seconds, "content": content})
        return content
