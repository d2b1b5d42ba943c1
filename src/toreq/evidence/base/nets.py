"""What the base protocols share: the systems as sides, MNIST in parts, and a few steps of training."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from toreq import systems, training
from toreq.core import control_norm
from toreq.data import Batches, Dataset, load
from toreq.diagnostics.gradients import criterion
from toreq.diagnostics.relaxation import predictions
from toreq.evidence.budgets import Budget
from toreq.layer import Equilibrium, equilibria, wrap

SEED_FILE = "the base's own statements (no seed file)"
ASYMMETRIC = "asymmetric block"
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": (16,)},
    "hopfield": {"hidden": (16, 8)},
    "conv": {"channels": (4, 6)},
    "transformer": {"features": 8, "heads": 2, "hidden": 8, "patch": 14},
    "dense": {"hidden": (16,)},
    "residual": {"width": 8, "levels": 3},
    "classifier": {"features": 8, "heads": 2, "hidden": 8, "patch": 14, "pool": 2},
    "sequence": {"features": 8, "heads": 2, "hidden": 8, "patch": 14},
}
"""Options of a smoke run by architecture."""


def architectures() -> dict[str, tuple[str, str]]:
    """Side name -> (system, architecture), every one that is registered."""
    return {f"{name} {arch}": (name, arch) for name in systems.names() for arch in systems.architectures(name)}


class Asymmetric(nn.Module):
    r"""A classifier around a block without an energy, :math:`h^* = \tanh(W h^* + U x + c)`, W not symmetric.

    Args:
        inputs: pixels.
        width: units.
        classes: logits.
        bound: norm of W, at which it starts: the relaxation contracts, and couples strongly.
    """

    def __init__(self, inputs: int, width: int, classes: int, bound: float = 0.8) -> None:
        super().__init__()
        self.equilibrium = wrap(_Block(inputs, width, bound), width, form="vector_field")
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, classes)``."""
        return self.head(self.equilibrium(x.flatten(1)))


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int, bound: float) -> None:
        super().__init__()
        self.inner, self.drive = nn.Linear(width, width, bias=False), nn.Linear(inputs, width)
        # above the bound: at it, where the control sets in, the loss would have a kink
        nn.init.orthogonal_(self.inner.weight, 1.25 * bound)
        control_norm(self.inner, bound)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(h) + self.drive(x))


def build(side: str, budget: Budget, seed: int, device: str, **options: Any) -> nn.Module:
    """The network of a side, freshly drawn; small for a smoke run."""
    torch.manual_seed(seed)
    if side == ASYMMETRIC:
        return Asymmetric(784, budget.pick(12, 256, 256), 10).to(device)
    system, arch = architectures()[side]
    small = SMALL.get(arch, {}) if budget.name == "smoke" else {}
    return systems.create(system, (1, 28, 28), 10, arch=arch, **{**small, **options}).to(device)


def layer(net: nn.Module) -> Equilibrium:
    """The only equilibrium layer of a network."""
    (found,) = equilibria(net)
    return found


@functools.lru_cache(maxsize=1)
def _whole() -> Dataset:
    # unpacking takes longer than many a trial, and a worker runs many
    return load("mnist")


def mnist(train: int, test: int) -> Dataset:
    """So many examples of MNIST, balanced over the classes."""
    return _whole().limit(train, test)


def fit(net: nn.Module, data: Dataset, steps: int, *, batch: int, rate: float, seed: int, summed: bool = False) -> int:
    """Train a network by Adam for so many steps; returns the number of samples seen.

    With ``summed`` the loss that reaches the estimator is the batch's sum, so that an absolute beta is one per example,
    and the gradient is divided by the batch size after it: the update is the same otherwise.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    device = next(net.parameters()).device
    batches = Batches(*data.split("train"), batch, seed=seed, device=device)
    net.train()
    for layer_ in equilibria(net):
        layer_.warn = False
    done = seen = epoch = 0
    while done < steps:
        for x, y in batches.epoch(epoch):
            if done == steps:
                break
            optimizer.zero_grad()
            (criterion(net)(net(x), y) * (len(y) if summed else 1)).backward()
            if summed:
                for parameter in net.parameters():
                    if parameter.grad is not None:
                        parameter.grad /= len(y)
            optimizer.step()
            done, seen = done + 1, seen + len(y)
        epoch += 1
    net.eval()
    return seen


def rate(side: str) -> float:
    """Adam's rate for a side: that of its recipe."""
    if side == ASYMMETRIC:
        return 1e-3
    system, arch = architectures()[side]
    return training.config_for(system, {"arch": arch}).learning_rate


def accuracy(net: nn.Module, data: Dataset) -> float:
    """Percent of the test examples that are classified correctly."""
    device = next(net.parameters()).device
    x, y = data.inputs("test", slice(None)).to(device), data.test_y.to(device)
    return 100 * float((predictions(net, x) == y).double().mean())
