"""The networks that the benches train, and every side that trains them, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toreq import systems
from toreq.bench.references import AutogradEP, DEQTrainer, LayeredNet, ModuleTrainer, RedBlackEP, Trainer, conv, mlp
from toreq.errors import ConfigError, nearest
from toreq.estimators import Unrolled
from toreq.layer import equilibria
from toreq.systems import System

TOREQ = {"toreq": "fast", "toreq-exact": "exact"}
"""Side -> settings of the sides that are toreq's own, see :func:`toreq.systems.create`."""

OPTIONS: dict[str, dict[str, Any]] = {
    # the papers' network: no norm control
    "mlp": {"arch": "hopfield", "output": "node", "nonlinearity": "hard_sigmoid", "norm_bound": None},
    "lateral": {"arch": "mlp"},
    "conv": {"arch": "conv"},
}
"""Net -> options of the system ``toreqprop`` beside its sizes."""

LEARNING_RATE = {"mlp": 1e-3, "lateral": 1e-3, "conv": 2e-3}
"""Adam's, the same for all sides of a net."""

STEPS = {"mlp": {"autograd": (30, 10), "red-black": (15, 15)}, "conv": {"autograd": (200, 10), "red-black": (60, 15)}}
"""Net -> paper's side -> steps of the free phase and of each nudged one."""

BETA = 0.5
"""Nudge of the papers' sides."""

SIDES: dict[str, tuple[str, ...]] = {
    "mlp": ("toreq", "toreq-exact", "backprop", "unrolled", "autograd", "red-black", "torchdeq"),
    "lateral": ("toreq", "toreq-exact", "backprop", "unrolled"),
    "conv": ("toreq", "toreq-exact", "backprop", "unrolled", "autograd", "red-black"),
}
"""Net -> its sides."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks, the benches' own unless told otherwise.

    Args:
        width: hidden units of ``mlp`` and ``lateral``, and of the deep equilibrium model.
        channels, kernel: of ``conv``, whose stride is 2.
    """

    width: int = 512
    channels: tuple[int, ...] = (32, 64)
    kernel: int = 5


def names(net: str) -> tuple[str, ...]:
    """The sides of a net.

    Raises:
        ConfigError: for an unknown net, with the nearest one.
    """
    if net not in SIDES:
        raise ConfigError(f"bench: expected a net, got {net!r}; {nearest(net, SIDES)}")
    return SIDES[net]


def build(
    net: str,
    side: str,
    input_shape: Sequence[int] = (1, 28, 28),
    classes: int = 10,
    sizes: Sizes | None = None,
    seed: int = 0,
) -> Trainer:
    """One side of a net, freshly initialised.

    Args:
        net, side: see :data:`SIDES`.
        input_shape: shape of one image.
        classes: number of classes.
        sizes: of the network.
        seed: of the initial weights (torch's generator is left as it was).

    Raises:
        ConfigError: for an unknown name, or torchdeq when it is not installed.
    """
    if side not in names(net):
        raise ConfigError(f"bench: expected a side of {net!r}, got {side!r}; {nearest(side, names(net))}")
    sizes = Sizes() if sizes is None else sizes
    lr = LEARNING_RATE[net]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if side == "torchdeq":
            return DEQTrainer(input_shape, sizes.width, classes, lr=lr)
        if side in ("autograd", "red-black"):
            free, nudged = STEPS[net][side]
            kind = AutogradEP if side == "autograd" else RedBlackEP
            return kind(_layered(net, input_shape, classes, sizes), free, nudged, beta=BETA, lr=lr)
        system = _system(net, side, input_shape, classes, sizes)
        model: nn.Module = system.feedforward() if side == "backprop" else system
        for layer in equilibria(model):
            # counted and reported in every table instead
            layer.warn = False
        return ModuleTrainer(model, system.criterion, lr)


def settings(net: str, side: str) -> str:
    """What distinguishes a side in words, so that curves of different settings are not taken for one another."""
    parts = [f"Adam {LEARNING_RATE[net]:g}"]
    if side in TOREQ or side == "unrolled":
        (layer,) = equilibria(_system(net, side, (1, 28, 28), 10, Sizes()))
        parts.append(f"{layer.solver}, {layer.estimator}")
    elif side in STEPS.get(net, {}):
        free, nudged = STEPS[net][side]
        parts.append(f"{free} free and {nudged} nudged steps, beta {BETA:g}")
    return "; ".join(parts)


def settling(trainer: Trainer) -> dict[str, float | None]:
    """Mean steps of the latest batch in each phase, and the share of its examples that settled in both.

    None for sides that count nothing.
    """
    found: dict[str, float | None] = {"free_steps": None, "nudged_steps": None, "settled": None}
    for layer in equilibria(trainer.model):
        shares = []
        for phase, statistics in (("free", layer.last.free), ("nudged", layer.last.nudged)):
            if statistics is not None:
                found[f"{phase}_steps"] = float(statistics.steps.double().mean())
                shares.append(float(statistics.converged.double().mean()))
        found["settled"] = min(shares) if shares else None
    return found


def _layered(net: str, input_shape: Sequence[int], classes: int, sizes: Sizes) -> LayeredNet:
    builders: dict[str, Callable[[], LayeredNet]] = {
        "mlp": lambda: mlp(input_shape, (sizes.width,), classes),
        "conv": lambda: conv(input_shape, sizes.channels, sizes.kernel, 2, classes),
    }
    return builders[net]()


def _system(net: str, side: str, input_shape: Sequence[int], classes: int, sizes: Sizes) -> System:
    options: dict[str, Any] = dict(OPTIONS[net])
    if net == "conv":
        options |= {"channels": sizes.channels, "kernel": sizes.kernel}
    else:
        options |= {"hidden": (sizes.width,)}
    estimator = Unrolled() if side == "unrolled" else None
    return systems.create(
        "toreqprop", input_shape, classes, estimator=estimator, settings=TOREQ.get(side, "fast"), **options
    )
