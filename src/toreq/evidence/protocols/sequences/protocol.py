"""One side on one task: what a claim calls, and what tunes a side's rate for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from toreq.data import SequenceTask
from toreq.evidence import counting
from toreq.evidence.claim import Cost, Outcome, Quantity, Trial
from toreq.evidence.protocols.sequences import models, plans, scores
from toreq.evidence.protocols.sequences.training import Progress, flops_per_sample, train
from toreq.layer import equilibria
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

SPACE = Space({"rate": Real(5e-4, 2e-2, log=True)})
"""What is tuned for every side: Adam's rate."""


def side(name: str, trial: Trial, task: str) -> Outcome:
    """Train one side on one task and test it, also on longer sequences.

    Metrics: the task's metric and loss on the test set; ``samples to threshold`` (None where it was not reached), that
    threshold; percent of whole sequences right, where positions have targets; the metric on longer sequences; seconds
    of training, and of the processor in it; for looped sides the radius, the share of relaxations that settled, and the
    relaxation steps of a training step, free and nudged together. Curves: the metric and the loss over samples.

    Args:
        name: of `models.SIDES`.
        trial: budget (sizes), seed, device, scratch folder (an interrupted training goes on there), tuned ``rate``.
        task: of `plans.tasks()`.
    """
    plan = plans.plan(task, trial.budget)
    recipe = replace(plan.recipe, rate=float(str(trial.tuned.get("rate", plan.recipe.rate))))
    made = plans.make(task, plan, trial.seed)
    model = models.build(name, made, plan.parameters, trial.seed, trial.device)
    at = train(model, made, recipe, seed=trial.seed, scratch=trial.scratch, device=trial.device)
    score = scores.evaluate(model, made, made.test, device=trial.device)
    unit = scores.unit(made)
    metrics = {
        made.metric: Quantity(score.metric, unit),
        "loss": Quantity(score.loss, "nats" if made.classes else ""),
        "samples to threshold": Quantity(at.reached, "samples"),
        "threshold": Quantity(recipe.threshold, unit),
        "rate": Quantity(recipe.rate, ""),
        "training time": Quantity(at.seconds, "s"),
        "processor time": Quantity(at.processor, "s"),
    }
    if score.whole is not None:
        metrics["whole sequences"] = Quantity(score.whole, "%")
    for length, part in made.longer.items():
        longer = scores.evaluate(model, made, part, device=trial.device)
        metrics[f"{made.metric}, {length} length"] = Quantity(longer.metric, unit)
    metrics |= _relaxation(model, made, at, trial.device)
    samples = at.step * recipe.batch
    cost = Cost(counting.parameters(model), flops_per_sample(model, made) * samples, samples)
    notes = (made.variant, *(("continued from a checkpoint",) if at.resumed else ()))
    return Outcome(metrics, {made.metric: list(at.curve), "loss": list(at.losses)}, cost, notes)


def _relaxation(model: models.nn.Module, task: SequenceTask, at: Progress, device: str) -> dict[str, Quantity]:
    layers = equilibria(model)
    if not layers:
        return {}
    assert isinstance(model, models.Looped)
    drive = model.embed(task.batch(task.test, slice(0, 8), device).x).detach()
    return {
        "radius": Quantity(layers[0].radius(drive), ""),
        "relaxations settled": Quantity(100 * at.settled / at.step, "%"),
        "relaxation steps": Quantity(at.relaxed / at.step, "steps"),
    }


def rate_of(name: str, task: str, trial: Trial, parameters: Mapping[str, Value]) -> float:
    """The objective of tuning: how good a side gets with a rate after a part of its steps, on held-out training data.

    Larger is better: the negative loss. The test set is not looked at.

    Args:
        name, task: as for `side`.
        trial: its seed should be none of those that are evaluated.
        parameters: ``rate``, as in `SPACE`.
    """
    plan = plans.plan(task, trial.budget)
    steps = max(1, plan.recipe.steps // 3)
    recipe = replace(plan.recipe, steps=steps, evaluate_every=steps, rate=float(str(parameters["rate"])))
    made = plans.held_out(plans.make(task, plan, trial.seed))
    model = models.build(name, made, plan.parameters, trial.seed, trial.device)
    at = train(model, made, recipe, seed=trial.seed, scratch=trial.scratch, device=trial.device)
    return -at.losses[-1][1]
