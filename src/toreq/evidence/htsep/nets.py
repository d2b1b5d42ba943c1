"""What the protocols of HTSEP share: networks drawn from a seed, and a short training on images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toreq.data import Dataset
from toreq.estimators import Implicit
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Trial
from toreq.evidence.tpeqprop import fitting
from toreq.layer import Equilibrium, equilibria
from toreq.solvers import Anderson
from toreq.systems.htsep import ARCHITECTURES, HTSEP

SEED_FILE = "001_66dbb9ed4a3e8c19.txt"


def build(arch: str, seed: int, shape: tuple[int, ...] = (1, 28, 28), classes: int = 10, **options: Any) -> HTSEP:
    """A network of HTSEP, freshly drawn from a seed, at the fast settings; what has not settled is counted.

    Args:
        arch: ``"dense"`` or ``"conv"``.
        seed: of the weights.
        shape: of one example.
        classes: number of logits.
        options: of the architecture.
    """
    torch.manual_seed(seed)
    net = ARCHITECTURES[arch](shape, classes, **options)  # pyright: ignore[reportCallIssue]
    assert isinstance(net, HTSEP)
    for layer in equilibria(net):
        layer.warn = False
        layer.hasten()
    return net


def layer(net: nn.Module) -> Equilibrium:
    """The only equilibrium layer of a network."""
    (found,) = equilibria(net)
    return found


def exact(net: nn.Module, tolerance: float = 1e-5) -> None:
    """Settle the only equilibrium layer to a tolerance, and take the implicit gradient to it."""
    found = layer(net)
    found.solver = Anderson(length=3, tolerance=tolerance, max_steps=500)
    found.estimator = Implicit(tolerance=tolerance, max_steps=500)


def train(
    net: nn.Module, trial: Trial, data: Dataset, epochs: float, rate: float, batch: int | None = None
) -> fitting.Progress:
    """Train by Adam for so many epochs; an interrupted run goes on."""
    size = trial.budget.pick(16, 64, 64) if batch is None else batch
    plan = fitting.Plan(epochs, rate, size, tests=trial.budget.pick(1, 2, 2))
    return fitting.fit(net, data, plan, seed=trial.seed, scratch=trial.scratch)


def digits(train: int, test: int) -> Dataset:
    """So many digits of MNIST, balanced over the classes."""
    return shared.mnist(train, test)
