"""Training the sides alike: for as many epochs, or until they are equally good on clean images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toreq.data import Batches, Dataset, gaussian_noise, seeded
from toreq.diagnostics.gradients import criterion
from toreq.errors import ConfigError
from toreq.evidence.protocols.robustness.corruptions import accuracy
from toreq.layer import equilibria
from toreq.training.evaluation import unwarned


@dataclass(frozen=True)
class Matching:
    """When to stop, so that sides of equal clean accuracy are compared.

    Attributes:
        target: clean accuracy to stop at, in percent, on images held out from the training set.
        tolerance: points around it that count as equal.
        every: steps between two looks.
    """

    target: float
    tolerance: float = 0.5
    every: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.target <= 100 or self.tolerance < 0 or self.every < 1:
            raise ConfigError(f"Matching: expected a target in (0, 100], tolerance >= 0, every >= 1, got {self}")


@dataclass(frozen=True)
class Recipe:
    """How a side is trained.

    Attributes:
        epochs: the most; all of them without a matching.
        rate: Adam's learning rate.
        batch: examples in a step.
        sigma: standard deviation of Gaussian noise, not clipped, on every training image.
    """

    epochs: int
    rate: float = 1e-3
    batch: int = 128
    sigma: float = 0.0


@dataclass(frozen=True)
class Fitted:
    """What came of a training.

    Attributes:
        steps, samples: how much it saw.
        held_out: clean accuracy on held-out images at its end, in percent.
        matched: whether that is within the tolerance of the target; None where all epochs were run on purpose.
    """

    steps: int
    samples: int
    held_out: float
    matched: bool | None


def held_out(data: Dataset, number: int) -> tuple[Dataset, Tensor, Tensor]:
    """The data without its last ``number`` training images, and these images with their labels."""
    if not 0 < number < len(data.train_y):
        raise ConfigError(
            f"held_out: expected 1 to {len(data.train_y) - 1} images to hold out, got {number}; hold out fewer"
        )
    cut = len(data.train_y) - number
    rest = Dataset(
        data.name,
        data.variant,
        data.train_x[:cut],
        data.train_y[:cut],
        data.test_x,
        data.test_y,
        data.num_classes,
        data.input_shape,
        data.licence,
    )
    return rest, data.inputs("train", slice(cut, None)), data.train_y[cut:]


def fit(
    net: nn.Module, data: Dataset, recipe: Recipe, seed: int, held: int, matching: Matching | None = None
) -> Fitted:
    """Train a network in place by Adam and its own loss, and leave it in evaluation mode.

    With a matching it stops at the first look at which the held-out accuracy is no more than half the tolerance below
    the target; a side that never comes there has all epochs and ``matched`` False.

    Args:
        net: any module from images to logits.
        data: its training part without the last ``held`` images is trained on.
        recipe: epochs, rate, batch, noise.
        seed: of order and noise.
        held: images held out.
        matching: stop at equal clean accuracy; None for equal epochs.
    """
    rest, x_held, y_held = held_out(data, held)
    device = next(net.parameters()).device
    x_held, y_held = x_held.to(device), y_held.to(device)
    batches = Batches(*rest.split("train"), recipe.batch, seed=seed, device=device)
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.rate)
    noise = seeded(seed, 21, device=device)
    enough = math.inf if matching is None else matching.target - matching.tolerance / 2
    steps = samples = 0
    found = 0.0
    with unwarned(equilibria(net)):
        for epoch in range(recipe.epochs):
            for x, y in batches.epoch(epoch):
                net.train()
                optimizer.zero_grad()
                seen = gaussian_noise(x, recipe.sigma, None, generator=noise) if recipe.sigma else x
                criterion(net)(net(seen), y).backward()
                optimizer.step()
                steps, samples = steps + 1, samples + len(y)
                if matching is not None and steps % matching.every == 0:
                    found = accuracy(net.eval(), x_held, y_held)
                    if found >= enough:
                        return Fitted(steps, samples, found, found <= matching.target + matching.tolerance)
        found = accuracy(net.eval(), x_held, y_held)
    matched = None if matching is None else abs(found - matching.target) <= matching.tolerance
    return Fitted(steps, samples, found, matched)
