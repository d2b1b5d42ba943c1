"""The shared sides: what they are, how they are trained, and how large they are at each budget."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from toreq import systems
from toreq.data import Dataset
from toreq.errors import ConfigError, nearest
from toreq.estimators import Centered, Implicit
from toreq.evidence.base import nets
from toreq.evidence.budgets import Budget
from toreq.evidence.protocols.robustness import baselines
from toreq.evidence.protocols.robustness.fitting import Fitted, Matching, Recipe, fit

WIDTH = 512
SURROGATE_SEED = 10_000
"""Added to a seed for the network that transferred attacks are made on: never a network under attack."""


@dataclass(frozen=True)
class Sizes:
    """What a budget buys: data, training, and how much is attacked."""

    train: int
    held: int
    test: int
    width: int
    channels: tuple[int, int]
    recipe: Recipe
    matching: Matching | None
    attacked: int
    queried: int
    steps: int
    queries: int
    rounds: int
    restarts: int

    @staticmethod
    def of(budget: Budget) -> Sizes:
        """The sizes of a budget, the same for every side.

        In a quick run sides stop at the same clean accuracy; in a full one they are trained for as many epochs.
        """
        match budget.name:
            case "smoke":
                return Sizes(60, 20, 20, 16, (2, 2), Recipe(2, 1e-2, 16), Matching(50.0, 50.0, 2), 10, 4, 2, 4, 1, 1)
            case "quick":
                matching = Matching(93.0, 0.5, 20)
                return Sizes(10_000, 1_000, 1_000, WIDTH, (16, 32), Recipe(12), matching, 60, 20, 40, 40, 8, 1)
            case _:
                return Sizes(60_000, 5_000, 10_000, WIDTH, (16, 32), Recipe(12), None, 1_000, 200, 40, 100, 25, 5)


Maker = Callable[[Sizes], nn.Module]


@dataclass(frozen=True)
class Side:
    """A shared side.

    Attributes:
        words: what it is.
        make: an untrained network; the part that is trained, for the sides that put something before it.
        sigma: noise on its training images.
        prepend: makes the classifier of the trained network and the training images.
        attacked: whether attacks are run on it; closed-form sides are compared on noise alone.
    """

    words: str
    make: Maker | None
    sigma: float = 0.0
    prepend: Callable[[nn.Module, Dataset], nn.Module] | None = None
    attacked: bool = True


def _equilibrium(estimator: type[Centered] | type[Implicit]) -> Maker:
    return lambda sizes: systems.create(
        "toreqprop", (1, 28, 28), 10, arch="mlp", hidden=(sizes.width,), estimator=estimator()
    )


def _mlp(sizes: Sizes) -> nn.Module:
    return baselines.mlp(width=sizes.width)


def _cnn(sizes: Sizes) -> nn.Module:
    return baselines.cnn(sizes.channels)


def _denoised(net: nn.Module, data: Dataset) -> nn.Module:
    return baselines.Wiener(net, data.inputs("train", slice(None)))


SIDES: dict[str, Side] = {
    "bp mlp": Side("backprop, one hidden layer of ReLUs", _mlp),
    "bp cnn": Side("backprop, two convolutions", _cnn),
    "bp mlp, noise-trained": Side("the MLP, trained on images with Gaussian noise of 0.5", _mlp, 0.5),
    "wiener + bp mlp": Side(
        "the MLP after a Wiener filter that is told sigma",
        _mlp,
        prepend=_denoised,
        attacked=False,
    ),
    "gaussians": Side("a Gaussian for each class (QDA) that is told sigma", None, attacked=False),
    "eqprop mlp": Side("Equilibrium Propagation (CEP): toreqprop mlp as shipped", _equilibrium(Centered)),
    "bp-eq mlp": Side("the same network trained by the implicit gradient", _equilibrium(Implicit)),
}


def find(name: str) -> Side:
    """A shared side; raises ConfigError for an unknown name, with the nearest."""
    if name not in SIDES:
        raise ConfigError(f"robustness: expected a side, got {name!r}; {nearest(name, SIDES)}")
    return SIDES[name]


def trained(name: str, budget: Budget, seed: int, device: str) -> tuple[nn.Module, Fitted | None]:
    """The classifier of a shared side with how it was trained; None for one in closed form."""
    side, sizes = find(name), Sizes.of(budget)
    data = nets.mnist(sizes.train, sizes.test)
    if side.make is None:
        x, y = data.inputs("train", slice(None)), data.train_y
        return baselines.Gaussians(x, y, data.num_classes).to(device), None
    net, fitted = _network(side.make, budget, seed, device, side.sigma)
    return (net if side.prepend is None else side.prepend(net, data).to(device)).eval(), fitted


@functools.lru_cache(maxsize=4)
def _network(make: Maker, budget: Budget, seed: int, device: str, sigma: float) -> tuple[nn.Module, Fitted]:
    # kept, since the MLP is a side, the classifier behind a filter and the surrogate
    return prepared(lambda: make(Sizes.of(budget)), budget, seed, device, sigma)


def prepared(
    make: Callable[[], nn.Module], budget: Budget, seed: int, device: str, sigma: float = 0.0
) -> tuple[nn.Module, Fitted]:
    """Any network, trained like the shared sides of this budget.

    Args:
        make: an untrained network from ``(B, 1, 28, 28)`` to 10 logits; torch's generator is seeded before.
        budget: decides data, epochs and whether the clean accuracy is matched.
        seed: of weights, order and noise.
        device: a torch device.
        sigma: standard deviation of Gaussian noise on the training images.
    """
    sizes = Sizes.of(budget)
    data = nets.mnist(sizes.train, sizes.test)
    torch.manual_seed(seed)
    net = make().to(device)
    recipe = replace(sizes.recipe, sigma=sigma)
    return net, fit(net, data, recipe, seed, sizes.held, sizes.matching)


def surrogate(budget: Budget, seed: int, device: str) -> nn.Module:
    """The backprop MLP of another seed, on which transferred attacks are made."""
    return trained("bp mlp", budget, seed + SURROGATE_SEED, device)[0]
