"""What the protocols of TPEqProp share: networks by side, built directly, with equal weights at the start."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toreq.estimators import Estimator, Implicit
from toreq.layer import Equilibrium, equilibria
from toreq.systems.tpeqprop import TPEqProp
from toreq.systems.tpeqprop_coding import PredictiveCoding
from toreq.systems.tpeqprop_nets import ARCHITECTURES

SEED_FILE = "002_df77675667cd5631.txt"
OWN, FORWARD, IMPLICIT, CENTERED, CODING = "tpeqprop", "bp-ff", "bp-eq", "eqprop", "coding"
"""Names of the sides that most of the claims have."""
CODING_STEPS, CODING_RATE = 20, 0.1
"""Of standard predictive coding; beta is 1, as its papers have it."""
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": (12, 12, 12)},
    "residual": {"width": 8, "levels": 3},
    "conv": {"channels": (3, 4)},
    "transformer": {"features": 8, "heads": 2, "hidden": 8, "patch": 14},
}
"""Options of a smoke run by architecture."""


def build(
    arch: str,
    seed: int,
    shape: tuple[int, ...] = (1, 28, 28),
    classes: int = 10,
    estimator: Estimator | None = None,
    **options: Any,
) -> TPEqProp:
    """A network of TPEqProp, freshly drawn from a seed.

    Args:
        arch: key of `toreq.systems.tpeqprop_nets.ARCHITECTURES`.
        seed: of the weights.
        shape: of one example.
        classes: number of logits.
        estimator: the shipped one when None.
        options: of the architecture.
    """
    torch.manual_seed(seed)
    net = ARCHITECTURES[arch](shape, classes, estimator=estimator, **options)  # pyright: ignore[reportCallIssue]
    assert isinstance(net, TPEqProp)
    for layer in equilibria(net):
        layer.warn = False  # what did not settle is counted
    return net


def trained_by(
    side: str, arch: str, seed: int, shape: tuple[int, ...] = (1, 28, 28), classes: int = 10, **options: Any
) -> nn.Module:
    """The module that a side trains: the same blocks with the same weights at the start, another gradient.

    Args:
        side: one of ``tpeqprop``, ``bp-ff`` (backprop through the blocks), ``bp-eq`` (the implicit gradient) and
            ``coding`` (standard predictive coding).
        arch, seed, shape, classes, options: as for `build`.
    """
    if side == FORWARD:
        net = build(arch, seed, shape, classes, **options)
        torch.manual_seed(seed)  # the twin draws its blocks in the order of the network itself
        return net.feedforward()
    found = {OWN: None, IMPLICIT: Implicit(), CODING: coding()}
    return build(arch, seed, shape, classes, found[side], **options)


def coding(steps: int = CODING_STEPS) -> PredictiveCoding:
    """Predictive coding as its papers run it (Whittington and Bogacz 2017): beta 1, T gradient steps, guarded.

    Unguarded, a network trained on Fashion-MNIST left the stable limit of its steps and learned no more.
    """
    return PredictiveCoding(steps=steps, rate=CODING_RATE, beta=1.0)


def layer(net: nn.Module) -> Equilibrium:
    """The only equilibrium layer of a network."""
    (found,) = equilibria(net)
    return found
