"""Accuracy, loss, confusion matrix and settle statistics on held-out data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toreq.layer import Equilibrium, equilibria
from toreq.training.rng import preserved
from toreq.training.totals import Totals, means


@dataclass(frozen=True)
class Evaluation:
    """Results on `examples` examples.

    `confusion[i][j]` counts those of class i taken for class j. `settling` holds the means of `totals.means` for the
    free phase (None for a network that does not settle).
    """

    examples: int
    accuracy: float
    loss: float
    confusion: list[list[int]]
    settling: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Return the results as JSON-able values."""
        return {
            "examples": self.examples,
            "accuracy": self.accuracy,
            "loss": self.loss,
            "confusion": self.confusion,
            **{f"{name}": value for name, value in self.settling.items()},
        }


@contextlib.contextmanager
def unwarned(layers: Sequence[Equilibrium]) -> Iterator[None]:
    """Keep `layers` from warning about every batch that does not settle, where that is counted and reported instead."""
    before = [layer.warn for layer in layers]
    for layer in layers:
        layer.warn = False
    try:
        yield
    finally:
        for layer, warn in zip(layers, before, strict=True):
            layer.warn = warn


def evaluate(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    batch_size: int = 500,
    corrupt: Callable[[Tensor], Tensor] | None = None,
    couplings: bool = True,
) -> Evaluation:
    """Evaluate `model` on inputs `x` (N, ...) and labels `y` (N,) without gradients, in evaluation mode.

    `corrupt` changes each batch of inputs; with `couplings=False` every coupling but the drive is off, which shows how
    much of the result the settling does. Random generators are left as they were. Under distributed training each
    process takes its share of the examples and all return the joint result.
    """
    from torchmetrics.classification import MulticlassConfusionMatrix

    device = x.device
    layers = equilibria(model)
    confusion = MulticlassConfusionMatrix(num_classes, validate_args=False).to(device)
    totals = Totals(device)
    world, rank = 1, 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    was_training = model.training
    model.eval()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(preserved(model))
        stack.enter_context(unwarned(layers))
        if not couplings:
            for layer in layers:
                stack.enter_context(layer.couplings_off())
        for start in range(rank * batch_size, len(x), batch_size * world):
            inputs, labels = x[start : start + batch_size], y[start : start + batch_size]
            if corrupt is not None:
                inputs = corrupt(inputs)
            logits = model(inputs).float()
            confusion.update(logits, labels)
            totals.add(layers, criterion(logits, labels), logits, labels)
    model.train(was_training)
    if world > 1:
        torch.distributed.all_reduce(totals.sums)
    sums = totals.read()
    found = means(sums)
    return Evaluation(
        examples=len(x),
        accuracy=sums["correct"] / sums["examples"],
        loss=sums["loss"] / sums["examples"],
        confusion=confusion.compute().tolist(),
        settling={name: found[name] for name in ("free_steps_mean", "free_converged_fraction")},
    )


def radius(model: nn.Module, x: Tensor) -> float | None:
    """Return the spectral radius of the relaxation Jacobian at the equilibria of inputs `x` (B, ...).

    It is the mean over the batch, the largest over the layers of `model`, and None for a network that does not settle.
    Random generators are left as they were.
    """
    layers = equilibria(model)
    found: list[float] = []
    was_training = model.training
    model.eval()
    with torch.no_grad(), preserved(model), unwarned(layers):
        inputs: dict[int, Tensor] = {}
        handles = [
            layer.register_forward_pre_hook(lambda module, args: inputs.__setitem__(id(module), args[0]))
            for layer in layers
        ]
        try:
            model(x)
        finally:
            for handle in handles:
                handle.remove()
        for layer in layers:
            if id(layer) in inputs:
                found.append(float(layer.radius(inputs[id(layer)])))
    model.train(was_training)
    return max(found) if found else None
