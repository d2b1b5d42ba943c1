"""The protocol: train a policy on a task, and measure what it learned, how fast, and what pushes do to it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from toreq.evidence import counting
from toreq.evidence.claim import Cost, Outcome, Quantity, Trial
from toreq.evidence.protocols.control.extra import require
from toreq.evidence.protocols.control.tasks import Sizes, Task, find
from toreq.evidence.protocols.control.trunks import Settling, Trunk, settled, trunk
from toreq.layer import equilibria
from toreq.tuning import Real, Space

if TYPE_CHECKING:
    from toreq.evidence.protocols.control.training import Trained

SPENT, REACHED = "log of steps to threshold, or all", "threshold reached"
SPACE = Space({"learning_rate": Real(5e-4, 1e-2, log=True)})
"""What is tuned on every side: Adam's rate."""


def side(name: str, trial: Trial, task: str | Task) -> Outcome:
    """Train and measure a named side, see `trunks.SIDES`.

    Args:
        name: the side.
        trial: budget, seed, device and scratch folder; ``trial.tuned`` may hold a ``learning_rate``.
        task: a task or its name.

    Raises:
        ConfigError: for an unknown side or task, or without the extra ``rl``.
    """
    chosen = find(task) if isinstance(task, str) else task
    return run(trunk(name, chosen.size(trial.budget).hidden), trial, chosen)


def run(made: Trunk, trial: Trial, task: str | Task, sizes: Sizes | None = None) -> Outcome:
    """Train and measure a policy with trunks of any kind.

    Args:
        made: makes the actor's and the critic's trunk.
        trial: budget, seed, device and scratch folder; ``trial.tuned`` may hold a ``learning_rate``.
        task: a task or its name.
        sizes: of the run; those of the budget when None.
    """
    require()
    from toreq.evidence.protocols.control.training import train

    chosen = find(task) if isinstance(task, str) else task
    sizes = sized(chosen.size(trial.budget) if sizes is None else sizes, trial.tuned)
    found = train(chosen, made, sizes, trial.seed, trial.scratch, trial.device)
    metrics = {**learned(found.curve, chosen.threshold), **_tested(found, chosen, sizes, trial.seed)}
    metrics |= _settling(found)
    metrics["learning rate"] = Quantity(sizes.rate, "")
    # processor time: a machine that does other things beside would make seconds of the clock longer
    metrics["CPU seconds per 1000 steps"] = Quantity(1000 * found.seconds / sizes.steps, "s")
    notes = ("continued from a checkpoint",) if found.resumed else ()
    policy: Any = found.model.policy
    cost = Cost(counting.parameters(policy), _flops(found, sizes) * sizes.steps, sizes.steps)
    return Outcome(metrics, {"return": list(found.curve)}, cost, notes)


def objective(made: Trunk, trial: Trial, task: str | Task, params: Mapping[str, Any]) -> float:
    """What tuning maximises: the mean return over a training of a quarter of the steps.

    Args:
        made: makes the trunks.
        trial: of a seed apart from those that are evaluated.
        task: a task or its name.
        params: a point of `SPACE`.
    """
    require()
    from toreq.evidence.protocols.control.training import train

    chosen = find(task) if isinstance(task, str) else task
    sizes = sized(chosen.size(trial.budget), params)
    quarter = max(1, sizes.steps // sizes.every // 4) * sizes.every
    found = train(chosen, made, replace(sizes, steps=quarter), trial.seed, trial.scratch, trial.device)
    return mean_return(found.curve)


def sized(sizes: Sizes, params: Mapping[str, Any]) -> Sizes:
    """The sizes with tuned parameters in place of their own."""
    return replace(sizes, rate=float(params["learning_rate"])) if "learning_rate" in params else sizes


def learned(curve: Sequence[tuple[float, float]], threshold: float) -> dict[str, Quantity]:
    r"""How fast a curve rises.

    The steps to the threshold :math:`\vartheta` are the first evaluated :math:`x` with return
    :math:`y(x) \ge \vartheta`, None where there is none; ``or all`` counts the whole training there, a lower bound of
    the true number. The return over training is :math:`\frac1{x_n - x_0}\int y`, by trapezoids.

    Args:
        curve: (steps, return), in order, at least one point.
        threshold: return from which it counts as learned.
    """
    reached = next((x for x, y in curve if y >= threshold), None)
    return {
        "steps to threshold": Quantity(reached, "steps"),
        "steps to threshold, or all": Quantity(curve[-1][0] if reached is None else reached, "steps"),
        "return over training": Quantity(mean_return(curve), "return"),
    }


def mean_return(curve: Sequence[tuple[float, float]]) -> float:
    """The mean of a curve over its steps, by trapezoids; its only value for a single point."""
    x, y = (np.array(values, dtype=np.float64) for values in zip(*curve, strict=True))
    return float(y[0]) if len(x) == 1 else float(np.trapezoid(y, x) / (x[-1] - x[0]))


def _tested(found: Trained, task: Task, sizes: Sizes, seed: int) -> dict[str, Quantity]:
    """Returns after training: without pushes, with them, and with every coupling at zero."""
    from toreq.evidence.protocols.control.training import evaluate

    def returns(pushed: bool) -> Quantity:
        return Quantity(float(np.mean(evaluate(found.model, task, seed, sizes.final, pushed))), "return")

    metrics = {"return": returns(False)}
    if task.push is not None:
        metrics["return, pushed"] = returns(True)
    policy: Any = found.model.policy
    layers = equilibria(policy)
    if layers:
        with contextlib.ExitStack() as stack:
            for layer in layers:
                stack.enter_context(layer.couplings_off())
            metrics["return, couplings off"] = returns(False)
    return metrics


def _settling(found: Trained) -> dict[str, Quantity]:
    policy: Any = found.model.policy
    counts = settled(policy)
    if counts is None:
        return {}
    units = {"settled": "%", "steps": "sweeps"}
    metrics = {f"relaxations, {name}": Quantity(value, units[name.split()[1]]) for name, value in counts.items()}
    observations = _observations(found, 256)
    policy.set_training_mode(False)
    for name in ("actor", "critic"):
        part = getattr(policy.mlp_extractor, name)
        if isinstance(part, Settling):
            metrics[f"radius, {name}"] = Quantity(part.radius(observations), "")
    return metrics


def _observations(found: Trained, most: int) -> Tensor:
    """Observations of the last rollout, as the policy saw them."""
    buffer = found.model.rollout_buffer
    seen = torch.as_tensor(buffer.observations, dtype=torch.float32, device=found.model.device)
    return seen.reshape(-1, *buffer.obs_shape)[-most:].flatten(1)


def _flops(found: Trained, sizes: Sizes) -> float:
    """Operations per step of the environment: one forward pass in the rollout, and PPO's passes over the data."""
    policy: Any = found.model.policy
    observations = _observations(found, min(sizes.batch, 256))
    count = observations.shape[0]
    shaped = observations.reshape(count, *found.model.rollout_buffer.obs_shape)

    def forward() -> None:
        with torch.no_grad():
            policy(shaped)

    def step() -> None:
        with torch.enable_grad():
            actions, _, _ = policy(shaped)
            values, likelihood, _ = policy.evaluate_actions(shaped, actions.detach())
            (values.mean() + likelihood.mean()).backward()

    policy.set_training_mode(False)
    once = counting.flops(forward)
    twice = counting.flops(step)  # a forward pass for the actions, and a step
    policy.zero_grad()
    return (once + sizes.epochs * (twice - once)) / count


def with_steps(found: Outcome) -> Outcome:
    """An outcome with what claims of sample efficiency are judged by: the logarithm of the steps to the threshold, all
    of them where it was not reached, and whether it was, in percent."""
    steps = found.metrics["steps to threshold, or all"].value
    assert steps is not None
    reached = 100.0 * (found.metrics["steps to threshold"].value is not None)
    more = {SPENT: Quantity(math.log(max(steps, 1.0)), "ln steps"), REACHED: Quantity(reached, "%")}
    return replace(found, metrics={**found.metrics, **more})
