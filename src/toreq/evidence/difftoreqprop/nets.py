"""What the protocols of DiffTorEqProp share: networks by name, how they are trained, and noise on test images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toreq import systems
from toreq.data import Dataset
from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Cost, Quantity
from toreq.evidence.tpeqprop import fitting
from toreq.layer import Equilibrium, equilibria
from toreq.systems import DiffTorEqProp

SEED_FILE = "000_dc6fb7035960aa85.txt"
SHAPE, CLASSES = (1, 28, 28), 10
TUNING_SHARE = 0.2
"""Of the training images that tuning holds out."""


def build(seed: int, device: str = "cpu", **options: Any) -> DiffTorEqProp:
    """A network of DiffTorEqProp on MNIST, freshly drawn from a seed.

    Args:
        seed: of the weights.
        device: a torch device.
        options: of :func:`toreq.systems.create`.
    """
    torch.manual_seed(seed)
    net = systems.create("difftoreqprop", SHAPE, CLASSES, **options).to(device)
    assert isinstance(net, DiffTorEqProp)
    return quiet(net)


def quiet(net: Any) -> Any:
    """The network without warnings: what did not settle is counted."""
    for found in equilibria(net):
        found.warn = False
    return net


def layer(net: nn.Module) -> Equilibrium:
    """The only equilibrium layer of a network."""
    (found,) = equilibria(net)
    return found


@dataclass(frozen=True)
class Trained:
    """A trained side: the network, the data, and how far the training came."""

    net: nn.Module
    data: Dataset
    at: fitting.Progress

    @property
    def cost(self) -> Cost:
        """Parameters, operations of the training, and samples seen."""
        flops = fitting.step_flops(self.net, self.data) * self.at.samples
        return Cost(counting.parameters(self.net), flops, self.at.samples)

    @property
    def notes(self) -> tuple[str, ...]:
        """What went wrong."""
        return (f"training ended early: {self.at.diverged}",) if self.at.diverged else ()


def fit(net: nn.Module, data: Dataset, plan: fitting.Plan, seed: int, scratch: Path | None = None) -> Trained:
    """Train a network in place, which observes the training images first; see
    :func:`toreq.evidence.tpeqprop.fitting.fit`."""
    if isinstance(net, systems.System):
        net.observe(data.inputs("train", slice(None)))
    return Trained(net, data, fitting.fit(quiet(net), data, plan, seed=seed, scratch=scratch))


def coupled(net: nn.Module, x: Tensor, y: Tensor) -> Mapping[str, Quantity]:
    """What shows that couplings matter: the radius of the relaxation, and the accuracy without couplings."""
    found = equilibria(net)
    if not found:
        return {}
    with found[0].couplings_off():
        off = 100 * float((shared.predictions(net, x) == y).double().mean())
    return {
        "radius": Quantity(net.radius(x[:32]) if isinstance(net, DiffTorEqProp) else found[0].radius(x[:32]), ""),
        "accuracy, couplings off": Quantity(off, "%"),
    }


def shown(data: Dataset, device: str) -> tuple[Tensor, Tensor]:
    """All test images with their labels."""
    return data.inputs("test", slice(None)).to(device), data.test_y.to(device)
